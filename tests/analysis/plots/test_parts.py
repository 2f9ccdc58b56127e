"""Pictures of damage taken apart draw their tables' own numbers, and clip nothing."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from analysis import plots, stats
from analysis.plots.style import COLUMN_WIDTH, PAGE_WIDTH
from analysis.stats.apart import COALITIONS
from analysis.stats.bootstrap import Bootstrap

from ..synthetic import arm, losses, routing, set_costs, tokens
from .test_plots import is_clipped

MODELS = {"smoe_share": ["layer 0 stage 0", "layer 2 stage 0"],
          "cartesian": [f"layer {n} stage {s}" for n in (0, 2) for s in (0, 1)]}  # fmt: skip


def arms(sites: list[str], scale: float) -> list[dict]:
    out = [arm("DropTop", 1, scale * (0.3 + 0.1 * i), effect=effect)
           for i, effect in enumerate(COALITIONS.values())]  # fmt: skip
    out += [arm("DropTop", m, scale * 0.6 * m) for m in (2, 3)]
    out += [arm("DropTop", 1, scale * 0.7, downstream="replay")]
    out += [arm("DropTop", 1, scale * 0.2, where=where) for where in sites]
    out += [arm("GaussianNoise", s, scale * 0.3 * s) for s in (0.5, 1.0, 2.0)]
    for n in (1, 2, 4):
        out += [arm("Worst", n, scale * n), arm("Worst(choose=random)", n, scale * 0.1 * n)]
    return [*out, arm("Worst(per=sequence)", 8, 0.3), arm("Worst(per=sequence, choose=random)", 8)]


class Tables:
    """What a Results offers to pictures, each table made once."""

    def __init__(self):
        table = pd.concat(
            losses(arms(sites, 1 + 0.5 * i), model=model, documents=12, rng=3)
            for i, (model, sites) in enumerate(MODELS.items())
        )
        table["domain"] = np.where(table.document_id < "doc006", "code", "tests")
        self.losses, dose, kept = table, routing(table), tokens(table)
        few, subject = {"bootstrap": Bootstrap(resamples=99)}, ["DropTop(1)"]
        tables = {
            "damage": stats.damage(table, dose, **few),
            "split": stats.split(table, **few),
            "cascade": stats.cascade(table, **few),
            "additivity": stats.additivity(table, **few),
            "gap": stats.gap(table, None, dose, **few),
            "tail_curve": stats.tail_curve(table, kept, subject),
        }
        for name, frame in tables.items():
            setattr(self, name, lambda *_, frame=frame: frame)
        self.groups = {
            by: stats.damage_by(table, by, kept, subject, **few)
            for by in ("position", "frequency", "domain")
        }

    def damage_by(self, by="position", conditions=None):
        return self.groups[by]


WIDE = {"cascade_dots": 2, "gap_curve": 2, "dose_panels": 4}  # pictures of so many panels
PICTURES = {
    "catalogue_dots": ("damage", plots.catalogue_dots),
    "split_bars": ("split", plots.split_bars),
    "cascade_dots": ("cascade", plots.cascade_dots),
    "layer_profile": ("additivity", plots.layer_profile),
    "gap_curve": ("gap", plots.gap_curve),
    "tail_shares": ("tail_curve", plots.tail_shares),
    "group_curve": ("damage_by", plots.group_curve),
    "dose_panels": ("damage", plots.dose_panels),
}


@pytest.fixture(scope="module")
def results():
    return Tables()


@pytest.fixture(scope="module")
def table(results):
    return lambda name: getattr(results, name)()


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", PICTURES)
def test_one_or_two_columns_wide_and_nothing_clipped(name, results, table):
    kind, draw = PICTURES[name]
    for source in (results, table(kind)):
        figure = draw(source).figure
        assert figure.get_size_inches()[0] == (PAGE_WIDTH if name in WIDE else COLUMN_WIDTH)
        assert not is_clipped(figure)


@pytest.mark.parametrize("name", PICTURES)
def test_no_tick_labels_overlap(name, table):
    kind, draw = PICTURES[name]
    figure = draw(table(kind)).figure
    figure.canvas.draw()
    for ax in figure.axes:
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            boxes = [t.get_window_extent() for t in labels if t.get_text() and t.get_visible()]
            turned = any(t.get_rotation() for t in labels)
            for a, b in pairwise(boxes):
                assert turned or not a.overlaps(b)


@pytest.mark.parametrize("name", PICTURES)
def test_wrong_sources_are_refused(name, table):
    kind, draw = PICTURES[name]
    with pytest.raises(ValueError, match=f"frame is a list; give the table of stats.{kind} or"):
        draw([1])
    with pytest.raises(ValueError, match=f"table {kind} lacks the columns delta_nats|carried"):
        draw(table(kind).drop(columns=["delta_nats", "carried"], errors="ignore"))
    with pytest.raises(ValueError, match=f"table {kind} has no rows"):
        draw(table(kind)[:0])
    assert not plt.get_fignums()


def shown(drawing) -> set[float]:
    """The x and y of all markers, of axes or all of a figure's."""
    axes = drawing.figure.axes
    lines = [li for ax in axes for li in ax.get_lines() if li.get_marker() not in ("None", "")]
    return {round(v, 9) for line in lines for v in np.ravel(line.get_xydata()) if v == v}


def test_catalogue_has_a_row_a_condition_in_groups_the_costliest_first(table):
    damage = table("damage")
    ax = plots.catalogue_dots(damage)
    names = [t.get_text().replace("\n", " ") for t in ax.get_yticklabels()]
    headings = ["experts taken away", "logits moved", "decisions replaced"]
    assert [n for n in names if n in headings] == headings
    assert sorted(set(names) - set(headings)) == sorted(damage.label.unique())
    assert [t.get_fontweight() == "bold" for t in ax.get_yticklabels()] == [
        n in headings for n in names
    ]
    cost = damage.groupby("label").delta_nats.median()
    first = names[1 : names.index(headings[1])]
    assert first == sorted(first, key=lambda name: -cost[name])
    assert {round(v, 9) for v in damage.delta_nats} <= shown(ax)
    one = plots.catalogue_dots(damage, ["cartesian"])
    assert [t.get_text() for t in one.legend_.get_texts()] == ["cartesian"]
    with pytest.raises(ValueError, match="models is 'olmoe'; choose one of 'smoe_share'"):
        plots.catalogue_dots(damage, ["olmoe"])


def test_every_perturbation_has_a_group():
    from analysis.perturb import PERTURBATIONS

    known = {name for names in plots.conditions.GROUPS.values() for name in names}
    assert known == set(PERTURBATIONS) - {"Compose", "Custom"}


def test_catalogue_is_symlog_where_a_linear_scale_hides_half(table):
    damage = table("damage")
    far = np.where(damage.label == "Worst(4)", 100, 1)
    ax = plots.catalogue_dots(damage.assign(delta_nats=damage.delta_nats * far))
    assert ax.get_xscale() == "symlog"
    assert not is_clipped(ax.figure)


def test_split_is_a_waterfall_that_ends_at_the_whole(table):
    split = table("split")
    ax = plots.split_bars(split)
    steps = ["set alone", "weights alone", "mass alone", "interaction"]
    for i, model in enumerate(MODELS):
        parts = split[split.model == model].set_index("part").delta_nats
        bars = ax.patches[i * len(steps) : (i + 1) * len(steps)]
        np.testing.assert_allclose([bar.get_width() for bar in bars], parts[steps])
        starts = [bar.get_x() for bar in bars]
        np.testing.assert_allclose(starts, np.cumsum([0, *parts[steps[:-1]]]), atol=1e-12)
        end = bars[-1].get_x() + bars[-1].get_width()
        assert end == pytest.approx(parts["full"])
    (whole,) = {line.get_label() for line in ax.get_legend().legend_handles[-1:]}
    assert whole == "damage of the whole"
    assert len(ax.get_yticks()) == len(MODELS)
    with pytest.raises(ValueError, match=r"condition is 'x'; choose one of 'DropTop\(1\)'"):
        plots.split_bars(split, "x")


def test_steps_that_are_next_to_nothing_are_left_out_of_the_legend(table):
    split = table("split")
    nothing = split.assign(delta_nats=split.delta_nats.where(split.part != "mass alone", 0.0))
    labels = [text.get_text() for text in plots.split_bars(nothing).get_legend().get_texts()]
    assert labels == ["set alone", "weights alone", "interaction", "damage of the whole"]


def test_a_split_of_nothing_is_drawn(table):
    split = table("split")
    nothing = split.assign(**dict.fromkeys(["delta_nats", "low", "high"], 0.0))
    assert len(plots.split_bars(nothing).patches) == 4 * len(MODELS)


def test_cascade_has_both_arms_and_their_difference(table):
    cascade = table("cascade")
    figure = plots.cascade_dots(cascade)
    both, difference = figure.axes
    assert [t.get_text() for t in both.get_yticklabels()] == list(MODELS)
    arms = [text.get_text() for text in both.get_legend().get_texts()]
    assert arms == ["later routers react", "later routers frozen"]
    points = {
        round(line.get_xdata()[0], 9)
        for line in difference.get_lines()
        if len(line.get_xdata()) == 1
    }
    assert points == {round(v, 9) for v in cascade[cascade.part == "cascade"].delta_nats}
    assert {round(v, 9) for v in cascade.delta_nats} <= shown(figure)


def test_several_conditions_stand_under_headings(table):
    cascade = table("cascade")
    other = cascade.assign(condition="DropTop(2)")
    names = plots.cascade_dots(pd.concat([cascade, other])).axes[0].get_yticklabels()
    assert [t.get_text() for t in names] == ["DropTop(1)", *MODELS, "DropTop(2)", *MODELS]
    assert [t.get_fontweight() for t in names] == 2 * ["bold", *["normal"] * len(MODELS)]


def test_layers_in_order_with_the_second_stage_between_and_the_wholes_at_the_end(table):
    additivity = table("additivity")
    ax = plots.layer_profile(additivity)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2", "sum", "joint"]
    assert ax.get_xticks(minor=True).tolist() == [0.5, 2.5]
    assert ax.get_xlabel() == "layer at which DropTop(1) acts alone\n(short ticks: stage 1)"
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(np.diff(lines["cartesian"].get_xdata()), [0.5, 1.5, 0.5])
    np.testing.assert_allclose(np.diff(lines["smoe_share"].get_xdata()), [2.0])
    assert np.abs(lines["cartesian"].get_xdata() - [0, 0.5, 2, 2.5]).max() < 0.25
    drawn = additivity[additivity.part != "joint - sum"]
    assert {round(v, 9) for v in drawn.delta_nats} <= shown(ax)


def test_gaps_have_a_panel_each_for_worst_and_random(table):
    gap = table("gap")
    for x in ("budget", "flips"):
        figure = plots.gap_curve(gap, x=x)
        assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
        for ax, part in zip(figure.axes, ("worst", "random"), strict=True):
            rows = gap[(gap.part == part) & ~gap.condition.str.contains("sequence")]
            for line in ax.get_lines():
                if (model := line.get_label()) in MODELS:
                    own = rows[rows.model == model].sort_values(x)
                    np.testing.assert_allclose(line.get_xydata(), own[[x, "delta_nats"]])
    with pytest.raises(ValueError, match="x is 'dose'; choose one of 'budget', 'flips'"):
        plots.gap_curve(gap, x="dose")
    with pytest.raises(ValueError, match="flips per sequence only"):
        plots.gap_curve(gap[gap.condition.str.contains("sequence")])


def test_tails_over_the_share_of_tokens(table):
    curve = table("tail_curve")
    for y in ("carried", "rise"):
        ax = plots.tail_shares(curve, y=y)
        lines = {line.get_label(): line for line in ax.get_lines()}
        rows = curve[curve.model == "cartesian"]
        np.testing.assert_array_equal(lines["cartesian"].get_ydata(), rows[y])
    assert ax.get_xscale() == "log"
    with pytest.raises(ValueError, match="y is 'loss'; choose one of 'carried', 'rise'"):
        plots.tail_shares(curve, y="loss")


@pytest.mark.parametrize("by", ["position", "frequency", "domain"])
def test_groups_of_tokens_in_their_order(results, by):
    frame = results.damage_by(by)
    ax = plots.group_curve(frame)
    names = [t.get_text() for t in ax.get_xticklabels()]
    assert names == frame[frame.model == "cartesian"].group.tolist()
    assert {round(v, 9) for v in frame.delta_nats} <= shown(ax)
    joined = {line.get_linestyle() for line in ax.get_lines() if line.get_label() == "cartesian"}
    assert joined == ({"None"} if by == "domain" else {"-"})
    assert not is_clipped(ax.figure)


def test_panels_share_the_scale_of_damage(table):
    figure = plots.dose_panels(table("damage"), doses=["strength", "mass_moved", "flips"])
    panels = [ax for ax in figure.axes if ax.get_xlabel()]
    for ax in panels:
        assert [line.get_label() for line in ax.get_lines() if line.get_label() in MODELS] == [
            *MODELS
        ]
    assert len({ax.get_ylim() for ax in panels}) == 1
    with pytest.raises(ValueError, match="x is 'dose'; choose one of"):
        plots.dose_panels(table("damage"), doses=["dose"])
    assert len(plt.get_fignums()) == 1


def test_settings_are_left_alone_and_given_axes_drawn_on(table):
    before = dict(plt.rcParams)
    for name, (kind, draw) in PICTURES.items():
        figure, axes = plt.subplots(1, WIDE.get(name, 1))
        drawn = draw(table(kind), ax=axes)
        assert drawn is (figure if name in WIDE else axes)
        if name in WIDE:
            with pytest.raises(ValueError, match=f"ax has 1 axes; the picture has {WIDE[name]}"):
                draw(table(kind), ax=axes[0])
    plots.dose_panels(table("damage"))
    assert dict(plt.rcParams) == before


def test_symlog_costs(results):
    """The profile of a model whose first layer is all."""
    costs = {f"DropTop(1), {where}": 0.001 for where in MODELS["smoe_share"]}
    one = results.losses[results.losses.model == "smoe_share"]
    table = stats.additivity(
        set_costs(one, costs | {"DropTop(1)": 5.0}), bootstrap=Bootstrap(resamples=99)
    )
    assert plots.layer_profile(table).get_yscale() == "symlog"
