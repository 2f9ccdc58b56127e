"""Pictures of damage taken apart draw their tables' own numbers, and clip nothing."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from analysis import plots, stats
from analysis.plots.style import COLUMN_WIDTH
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
def test_a_column_wide_and_nothing_clipped(name, results, table):
    kind, draw = PICTURES[name]
    for source in (results, table(kind)):
        figure = draw(source).figure
        assert figure.get_size_inches()[0] == COLUMN_WIDTH
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


def shown(ax) -> set[float]:
    """The x and y of all markers."""
    lines = [line for line in ax.get_lines() if line.get_marker() not in ("None", "")]
    return {round(v, 9) for line in lines for v in np.ravel(line.get_xydata()) if v == v}


def test_catalogue_has_a_row_a_condition_grouped_by_perturbation(table):
    damage = table("damage")
    ax = plots.catalogue_dots(damage)
    names = [t.get_text().replace("\n", " ") for t in ax.get_yticklabels()]
    assert sorted(names) == sorted(damage.label.unique())
    bases = [name.partition("(")[0] for name in names]
    assert len([b for a, b in pairwise(bases) if a != b]) == 2
    assert names[:4] == ["DropTop(1)", "DropTop(2)", "DropTop(3)", "DropTop(1), replay"]
    assert {round(v, 9) for v in damage.delta_nats} <= shown(ax)
    one = plots.catalogue_dots(damage, ["cartesian"])
    assert [t.get_text() for t in one.legend_.get_texts()] == ["cartesian"]
    with pytest.raises(ValueError, match="models is 'olmoe'; choose one of 'smoe_share'"):
        plots.catalogue_dots(damage, ["olmoe"])


def test_catalogue_is_symlog_where_a_linear_scale_hides_half(table):
    damage = table("damage")
    far = np.where(damage.label == "Worst(4)", 100, 1)
    ax = plots.catalogue_dots(damage.assign(delta_nats=damage.delta_nats * far))
    assert ax.get_xscale() == "symlog"
    assert not is_clipped(ax.figure)


def test_split_bars_have_the_tables_lengths(table):
    split = table("split")
    ax = plots.split_bars(split)
    drawn = {round(bar.get_width(), 9) for bar in ax.patches}
    wanted = split[split.part.isin(["set", "weights", "mass", "interaction"])]
    assert drawn == {round(v, 9) for v in wanted.delta_nats}
    assert len(ax.get_yticks()) == len(MODELS)
    with pytest.raises(ValueError, match=r"condition is 'x'; choose one of 'DropTop\(1\)'"):
        plots.split_bars(split, "x")


def test_groups_name_seed_and_condition_where_there_are_several(table):
    cascade = table("cascade")
    names = [t.get_text() for t in plots.cascade_dots(cascade).get_yticklabels()]
    assert names == list(MODELS)
    other = cascade.assign(condition="DropTop(2)", train_seed=1)
    names = [
        t.get_text() for t in plots.cascade_dots(pd.concat([cascade, other])).get_yticklabels()
    ]
    assert names[0] == "smoe_share #0\nDropTop(1)"
    assert {round(v, 9) for v in cascade.delta_nats} <= shown(plots.cascade_dots(cascade))


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


def test_gaps_have_a_line_each_for_worst_and_random(table):
    gap = table("gap")
    for x in ("budget", "flips"):
        ax = plots.gap_curve(gap, x=x)
        drawn = gap[(gap.part != "gap") & ~gap.condition.str.contains("sequence")]
        assert {round(v, 9) for v in drawn.delta_nats} <= shown(ax)
        assert len([line for line in ax.get_lines() if len(line.get_xdata()) == 3]) == 4
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
    assert [len(ax.get_lines()) for ax in panels] == [2, 2, 2]
    assert len({ax.get_ylim() for ax in panels}) == 1
    with pytest.raises(ValueError, match="x is 'dose'; choose one of"):
        plots.dose_panels(table("damage"), doses=["dose"])
    assert len(plt.get_fignums()) == 1


def test_settings_are_left_alone_and_given_axes_drawn_on(table):
    before = dict(plt.rcParams)
    for name, (kind, draw) in PICTURES.items():
        if name != "dose_panels":
            _, ax = plt.subplots()
            assert draw(table(kind), ax=ax) is ax
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
