"""Pictures draw the table's own numbers, can be told apart in grey, and are saved whole."""

from __future__ import annotations

from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from analysis import plots, stats
from analysis.plots.names import spread
from analysis.plots.scales import ZONE
from analysis.plots.style import (
    FAMILY_STYLE,
    PAGE_WIDTH,
    darker,
    family_styles,
    model_styles,
    tint,
)
from analysis.stats.bootstrap import Bootstrap

from ..synthetic import FAMILIES, routing, study

ROUTED = FAMILIES[1:]


@pytest.fixture(scope="module")
def frame():
    losses = study(documents=8)
    return stats.damage(losses, routing(losses), bootstrap=Bootstrap(resamples=199))


@pytest.fixture(scope="module")
def two_seeds():
    return stats.damage(study((0, 1), documents=5), bootstrap=Bootstrap(resamples=99))


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def named(ax):
    """Lines that a name at their end, or a legend, tells of."""
    return {label: line for label, line in lines(ax).items() if not label.startswith("_")}


def is_clipped(figure) -> bool:
    """Whether anything that is drawn reaches over the figure's edge."""
    figure.canvas.draw()
    (left, bottom), (right, top) = figure.get_tightbbox(figure.canvas.get_renderer()).get_points()
    width, height = figure.get_size_inches()
    slack = 0.01
    return min(left, bottom, width - right, height - top) < -slack


@pytest.mark.parametrize("draw", [plots.damage_curve, plots.control_dots, plots.stage_dots])
def test_every_picture_is_a_column_wide_and_clips_nothing(draw, frame):
    ax = draw(frame)
    assert ax.figure.get_size_inches()[0] == plots.style.COLUMN_WIDTH
    assert ax.xaxis.label.get_fontsize() == 8
    assert not is_clipped(ax.figure)


@pytest.mark.parametrize("draw", [plots.damage_curve, plots.control_dots, plots.stage_dots])
def test_given_axes_are_drawn_on_and_settings_left_alone(draw, frame):
    before = dict(mpl.rcParams)
    _, ax = plt.subplots()
    assert draw(frame, ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    draw(frame)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("draw", [plots.damage_curve, plots.control_dots, plots.stage_dots])
def test_results_with_a_damage_method_serve_as_well(draw, frame):
    class Results:
        def damage(self):
            return frame

    assert len(draw(Results()).get_lines()) == len(draw(frame).get_lines())
    with pytest.raises(ValueError, match="frame is a list; give the table of"):
        draw([1])
    with pytest.raises(ValueError, match="table damage lacks the columns model"):
        draw(frame.drop(columns="model"))


@pytest.mark.parametrize(
    ("x", "y", "low"),
    [
        ("strength", "delta_nats", "low"),
        ("mass_moved", "delta_bits_per_byte", "bpb_low"),
        ("flips", "perplexity_ratio", "ratio_low"),
        ("changed", "kl", None),
    ],
)
def test_curves_show_the_tables_points_and_intervals(frame, x, y, low):
    ax = plots.damage_curve(frame, "GaussianNoise", x=x, y=y)
    drawn = named(ax)
    assert list(drawn) == ROUTED
    bands = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert len(bands) == (len(ROUTED) if low else 0)
    rows = frame[(frame.perturbation == "GaussianNoise") & (frame.model == "cartesian")]
    np.testing.assert_allclose(drawn["cartesian"].get_xydata(), rows[[x, y]].to_numpy())
    if low:
        vertices = bands[-1].get_paths()[0].vertices
        assert vertices[:, 1].min() == pytest.approx(rows[low].min())
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_families_keep_their_look_whatever_else_is_drawn(frame):
    alone = lines(plots.damage_curve(frame[frame.family == "cartesian"]))["cartesian"]
    among = lines(plots.damage_curve(frame))["cartesian"]
    for line in (alone, among):
        assert (to_hex(line.get_color()).upper(), line.get_marker()) == FAMILY_STYLE["cartesian"]
    assert len({marker for _, marker in FAMILY_STYLE.values()}) == len(FAMILIES)
    assert len({color for color, _ in FAMILY_STYLE.values()}) == len(FAMILIES)


def test_a_family_of_elsewhere_keeps_its_look_whatever_stands_beside_it():
    looks = family_styles(["olmoe", "mixtral", "dense"])
    assert looks["olmoe"] == family_styles(["olmoe"])["olmoe"]
    alike = next(f"f{i}" for i in range(99) if family_styles([f"f{i}"])[f"f{i}"] == looks["olmoe"])
    assert family_styles(["olmoe", alike])["olmoe"] != family_styles(["olmoe", alike])[alike]


def test_models_of_one_family_and_unknown_families_differ(frame):
    models = frame.iloc[:4].assign(
        model=["a", "b", "olmoe", "qwen"], family=["cartesian", "cartesian", "olmoe", "qwen"]
    )
    styles = model_styles(models)
    assert styles["a"]["color"] == styles["b"]["color"]
    assert styles["a"]["linestyle"] != styles["b"]["linestyle"]
    assert styles["olmoe"]["marker"] != styles["qwen"]["marker"]


def test_seeds_are_thin_lines_behind_their_mean(two_seeds):
    ax = plots.damage_curve(two_seeds)
    assert list(named(ax)) == ROUTED
    rows = two_seeds[stats.is_plain(two_seeds) & (two_seeds.perturbation == "GaussianNoise")]
    mean = rows[rows.model == "cartesian"].groupby("strength").delta_nats.mean()
    line = named(ax)["cartesian"]
    np.testing.assert_allclose(line.get_xydata(), mean.reset_index().to_numpy())
    thin = [
        one for one in ax.get_lines() if len(one.get_xdata()) > 2 and one not in named(ax).values()
    ]
    single = [rows[rows.model == "cartesian"].query("train_seed == @s").delta_nats for s in (0, 1)]
    for seed in single:
        assert any(np.array_equal(one.get_ydata(), seed) for one in thin)
    assert all(one.get_linewidth() < line.get_linewidth() for one in thin)
    assert not ax.collections  # no band: another seed is not in it
    assert ax.get_xlabel().endswith("means of 2 training seeds,\neach of them faint")


def test_a_mean_is_of_points_that_all_seeds_have(two_seeds):
    """A seed alone at the last strength would pull the line to itself."""
    rows = two_seeds[(two_seeds.perturbation == "DropTop") & (two_seeds.model == "smoe")]
    lacks = rows[(rows.strength == rows.strength.max()) & (rows.train_seed == 1)]
    line = named(plots.damage_curve(two_seeds.drop(lacks.index), "DropTop"))["smoe"]
    assert line.get_xdata().tolist() == sorted(rows.strength.unique())[:-1]
    some = two_seeds[(two_seeds.label != "DropChosen(1)") | (two_seeds.train_seed == 0)]
    marks = [line.get_marker() for line in plots.control_dots(some).get_lines()]
    full = [line.get_marker() for line in plots.control_dots(two_seeds).get_lines()]
    assert full.count("^") - marks.count("^") == len(ROUTED)  # no mean of one seed of two


def test_two_seeds_of_one_model_have_room(two_seeds):
    one = two_seeds[two_seeds.model == "cartesian"]
    for draw in (plots.control_dots, plots.stage_dots, plots.catalogue_dots):
        assert not is_clipped(draw(one).figure)


def test_what_has_no_strength_has_no_curve(frame):
    with pytest.raises(ValueError, match="perturbation 'NoRouted' has no strength to draw it over"):
        plots.damage_curve(frame, "NoRouted")
    unknown = frame.assign(delta_nats=np.nan, low=np.nan, high=np.nan)
    said = [text.get_text() for text in plots.damage_curve(unknown, "DropTop").texts]
    assert said == ["n = 8: too few documents"]  # no line to name


def test_unfinished_results_are_marked(frame):
    class Results:
        finished, planned = 3, 4

        def damage(self):
            return frame.assign(num_documents=30)

    texts = [text.get_text() for text in plots.control_dots(Results()).texts]
    assert "Unfinished: 3 of 4 cells" in texts
    Results.finished = 4
    assert not any("Unfinished" in text.get_text() for text in plots.control_dots(Results()).texts)


def test_names_at_the_ends_are_apart_and_in_their_colors(frame):
    ax = plots.damage_curve(frame)
    assert ax.get_legend() is None
    texts = {text.get_text(): text for text in ax.texts if text.get_text() in ROUTED}
    assert list(texts) == ROUTED
    ax.figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in texts.values()), key=lambda box: box.y0)
    for low, high in pairwise(boxes):
        assert low.y1 <= high.y0 + 2.5  # letters have room in their boxes
    for name, line in named(ax).items():
        assert texts[name].get_color() == darker(line.get_color())


def test_names_that_do_not_fit_stand_in_a_legend(frame):
    many = pd.concat(
        frame[frame.model == "smoe"].assign(model=f"m{i}", delta_nats=frame.delta_nats + i)
        for i in range(40)
    )
    ax = plots.damage_curve(many)
    assert len(ax.get_legend().get_texts()) == 40
    assert not is_clipped(ax.figure)
    assert min(ax.get_window_extent().size) > 50  # pixels
    _, plain = plt.subplots()  # nothing would make room beside these axes
    assert plots.damage_curve(frame, ax=plain).get_legend() is not None


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([0.5], [0.5]),
        ([0.1, 0.9], [0.1, 0.9]),
        ([0.5, 0.5], [0.55, 0.45]),
        ([0.0, 0.0, 1.0], [0.1, 0.0, 1.0]),
        ([0.99, 1.0], [0.9, 1.0]),
    ],
)
def test_places_are_a_step_apart_and_as_near_as_can_be(wanted, found):
    places = spread(np.array(wanted), 0.1)
    np.testing.assert_allclose(np.sort(places), np.sort(found), atol=1e-12)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(places[order]) >= 0.1 - 1e-12).all()


def test_curve_errors_list_the_choices(frame):
    for options, message in [
        ({"perturbation": "Lag"}, "perturbation is 'Lag'; choose one of .*'DropTop'"),
        ({"x": "dose"}, "x is 'dose'; choose one of 'strength', 'mass_moved'"),
        ({"y": "loss"}, "y is 'loss'; choose one of 'delta_nats'"),
        ({"where": "stage 7"}, "where is 'stage 7'; choose one of 'all'"),
        ({"point": "scores"}, "point is 'scores'; choose one of 'logits'"),
    ]:
        with pytest.raises(ValueError, match=message):
            plots.damage_curve(frame, **options)
    with pytest.raises(ValueError, match=r"x is 'mass_moved'; choose one of 'strength'$"):
        plots.damage_curve(frame.drop(columns=list(plots.curves.X)[1:]), x="mass_moved")
    assert not plt.get_fignums()


def points(ax):
    """(x, row) of every marker."""
    marked = [line for line in ax.get_lines() if line.get_marker() not in ("None", "")]
    return [(line.get_xdata()[0], round(line.get_ydata()[0])) for line in marked]


def test_controls_show_every_condition_of_every_model(frame):
    ax = plots.control_dots(frame)
    assert [text.get_text() for text in ax.get_yticklabels()] == ROUTED
    shown = points(ax)
    assert len(shown) == 5 * len(ROUTED)
    expected = frame.set_index(["model", "label"]).delta_nats
    for label in ("DropTop(1)", "DropChosen(1)", "DropUnchosen(1)", "RandomRouting(1)", "NoRouted"):
        for i, model in enumerate(ROUTED):
            assert (expected[model, label], i) in shown
    with pytest.raises(ValueError, match=r"frame has none of the conditions DropUnchosen\(1\)"):
        plots.control_dots(frame[frame.perturbation == "GaussianNoise"])


def test_seeds_are_small_dots_beside_their_mean(two_seeds):
    ax = plots.control_dots(two_seeds)
    assert [text.get_text() for text in ax.get_yticklabels()] == ROUTED
    own = two_seeds[(two_seeds.model == "smoe") & (two_seeds.label == "DropTop(1)")].delta_nats
    found = points(ax)
    for value in (*own, own.mean()):
        assert any(row == 0 and x == pytest.approx(value) for x, row in found)
    assert "means of 2 training seeds" in ax.get_xlabel()


def test_stages_stand_beneath_their_model_and_single_ones_are_left_out(frame):
    ax = plots.stage_dots(frame)
    names = [text.get_text() for text in ax.get_yticklabels()]
    stages = ["cartesian, all", "cartesian, stage 0", "cartesian, stage 1"]
    assert names == [*ROUTED[:-1], *stages]
    expected = frame.set_index(["model", "label"]).delta_nats
    assert (expected["cartesian", "DropTop(1), stage 1, scores"], len(names) - 1) in points(ax)
    assert len(points(ax)) == 2 * len(names)
    with pytest.raises(ValueError, match=r"condition is 'DropTop\(9\)'; choose one of"):
        plots.stage_dots(frame, "DropTop(9)")


def test_perplexities_that_explode_have_a_log_axis(frame):
    assert plots.damage_curve(frame, y="perplexity").get_yscale() == "linear"
    far = frame.assign(perplexity=frame.perplexity * np.where(frame.strength == 4, 1000, 1))
    assert plots.damage_curve(far, y="perplexity").get_yscale() == "log"


def test_the_scale_widens_only_where_it_must(frame):
    assert plots.control_dots(frame).get_xscale() == "linear"
    spread = np.where(frame.perturbation == "NoRouted", 100.0, 1.0)
    columns = {name: frame[name] * spread for name in ("delta_nats", "low", "high")}
    ax = plots.control_dots(frame.assign(**columns))
    assert ax.get_xscale() == "symlog"
    assert not is_clipped(ax.figure)
    assert "linear" in [text.get_text() for text in ax.texts]  # the zone where it is
    (zone,) = (p for p in ax.patches if to_hex(p.get_facecolor()) == tint(ZONE, 0.1))
    assert -zone.get_x() == zone.get_x() + zone.get_width() == ax.xaxis.get_transform().linthresh
    curve = frame.assign(delta_nats=frame.delta_nats * np.where(frame.strength == 4, 100, 1))
    assert plots.damage_curve(curve).get_yscale() == "symlog"


def test_save_writes_three_files_with_text_and_nothing_else(frame, tmp_path):
    ax = plots.damage_curve(frame)
    paths = plots.save(ax, tmp_path / "new" / "figure.1")
    assert paths == [tmp_path / "new" / f"figure.1.{kind}" for kind in ("png", "pdf", "svg")]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert plt.imread(paths[0]).shape[1] == round(3.3 * 300)
    pdf = paths[1].read_bytes()
    assert b"/TrueType" in pdf or b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf
    assert plt.fignum_exists(ax.figure.number)
    svg = paths[2].read_text()
    assert ">change of loss (nats per token)</text>" in svg
    assert "<dc:date>" not in svg
    assert plots.save(ax.figure, tmp_path / "again.pdf")[0] == tmp_path / "again.png"
    again = plots.save(ax, tmp_path / "new" / "figure.1", "what it shows")
    assert [path.read_bytes() for path in again[1:3]] == [pdf, svg.encode()]
    assert again[3] == tmp_path / "new" / "figure.1.txt"
    assert again[3].read_text() == "what it shows"


def test_axes_of_a_part_of_a_figure_are_saved_with_all_of_it(frame, tmp_path):
    left, _ = plt.figure(layout="constrained").subfigures(1, 2)
    plots.save(plots.damage_curve(frame, ax=left.subplots()), tmp_path / "part")
    assert (tmp_path / "part.svg").is_file()


def test_two_columns_are_wide_and_the_letters_stay(frame, tmp_path):
    ax = plots.damage_curve(frame)
    png, *_ = plots.save(ax, tmp_path / "wide", columns=2)
    assert plt.imread(png).shape[1] == round(PAGE_WIDTH * 300)
    assert ax.xaxis.label.get_fontsize() == 8
    assert not is_clipped(ax.figure)
    with pytest.raises(ValueError, match="columns is 3; choose one of 1, 2"):
        plots.save(ax, tmp_path / "wider", columns=3)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    figure = plt.figure()
    old = tmp_path / "a.png"
    old.write_bytes(b"old")

    def break_down(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", break_down)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, tmp_path / "a")
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old"


# ---- intervals that one can see, and trust


def test_points_at_equal_doses_have_whiskers(frame):
    """A band along them would have no width."""
    same = frame.assign(mass_moved=0.3)
    ax = plots.damage_curve(same, x="mass_moved")
    bars = [c for c in ax.collections if not isinstance(c, PolyCollection)]
    assert len(bars) == len(ROUTED)
    assert not any(isinstance(c, PolyCollection) for c in ax.collections)
    drawn = sorted(tuple(seg[:, 1]) for c in bars for seg in c.get_segments())
    rows = frame[frame.perturbation == "GaussianNoise"]
    rows = rows[stats.is_plain(rows)]
    np.testing.assert_allclose(drawn, sorted(zip(rows.low, rows.high, strict=True)))


def test_one_point_has_a_whisker(frame):
    strength = frame.strength[frame.perturbation == "GaussianNoise"].max()
    rows = frame[(frame.perturbation != "GaussianNoise") | (frame.strength == strength)]
    ax = plots.damage_curve(rows)
    assert not any(isinstance(c, PolyCollection) for c in ax.collections)
    assert len(ax.collections) == len(ROUTED)


@pytest.mark.parametrize("draw", [plots.damage_curve, plots.control_dots, plots.catalogue_dots])
def test_few_documents_are_said(draw, frame):
    def said(frame):
        return [t.get_text() for t in draw(frame).texts if "too few" in t.get_text()]

    assert said(frame) == ["n = 8: too few documents"]
    assert said(frame.assign(num_documents=stats.FEW_DOCUMENTS)) == []
    assert said(frame.drop(columns="num_documents")) == []
