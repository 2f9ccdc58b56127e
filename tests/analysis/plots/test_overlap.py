"""Pictures of overlap draw their tables' own numbers, say what they show, and clip nothing."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm, to_hex
from matplotlib.lines import AxLine

from analysis import plots
from analysis.plots.matrices import NOTHING
from analysis.plots.style import COLUMN_WIDTH, FAMILY_STYLE, PAGE_WIDTH

from .overlaps import DOMAINS, FAMILIES, SHARES, SIMILAR, E, draws, pairs, site, stages_of
from .test_plots import is_clipped

NAMES = ["heatmap", "clustered", "single", "damage", "turned", "relation", "substitution", "usage",
         "domains", "saturation", "profile", "profile of sites"]  # fmt: skip


def images(figure):
    """Of the panels from left to right; color bars have none of their own."""
    return [ax.get_images()[0] for ax in figure.get_axes() if ax.get_images()]


def cells(image):
    """What is drawn, NaN where it is grey."""
    return image.get_array().filled(np.nan)


def names(labels):
    return [label.get_text() for label in labels]


def marked(ax):
    """The points of all lines with markers, by the line's label."""
    return {line.get_label(): line.get_xydata() for line in ax.get_lines() if line.get_marker()}


@pytest.mark.parametrize("name", NAMES)
def test_fits_its_columns_and_changes_no_setting(name, pictures):
    before = dict(mpl.rcParams)
    figure = pictures[name]().figure
    assert dict(mpl.rcParams) == before
    assert len(plt.get_fignums()) == 1
    wide = name in ("heatmap", "clustered", "substitution", "usage", "damage", "turned")
    assert figure.get_size_inches()[0] == (PAGE_WIDTH if wide else COLUMN_WIDTH)
    assert not is_clipped(figure)
    for ax in figure.get_axes():
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            boxes = [t.get_window_extent() for t in labels if t.get_text() and t.get_visible()]
            assert not any(a.overlaps(b) for a, b in pairwise(boxes))
            assert all(t.get_fontsize() >= 6 for t in labels)


def test_given_axes_are_drawn_on(overlap, experts, correlations, saturation):
    for draw, *source in (
        (plots.relation_dots, correlations),
        (plots.saturation_curve, saturation),
        (plots.overlap_profile, overlap, "cka"),
    ):
        _, ax = plt.subplots()
        assert draw(*source, ax=ax) is ax


def test_pictures_of_panels_take_as_many_axes(pictures, overlap, experts, substitution):
    place = dict(layer=1, stage=0)
    for number, draw in (
        (1, lambda ax: plots.overlap_heatmap(overlap, "cka", model="smoe", ax=ax)),
        (2, lambda ax: plots.overlap_heatmap(overlap, "cka", model="smoe", ax=ax)),
        (3, lambda ax: plots.damage_against_overlap(experts, "cka", ax=ax)),
        (2, lambda ax: plots.substitution_matrix(substitution, **place, ax=ax)),
        (4, lambda ax: plots.cartesian_usage(overlap, layer=3, model="cartesian", ax=ax)),
    ):
        figure, axes = plt.subplots(1, number, layout="constrained")
        assert draw(axes) is figure
        assert all(ax.has_data() for ax in np.ravel(axes))
        with pytest.raises(ValueError, match=f"ax has 5 axes; the picture has {number} panels|2 p"):
            draw(plt.subplots(1, 5)[1])
    figure, axes = plt.subplots(1, 2, layout="constrained")
    ax = plots.specialization(overlap, **place, model="smoe", ax=axes[1])
    assert ax is axes[1]
    assert len(images(figure)) == 1


def test_what_is_grey_beside_the_diagonal_is_said():
    values = draws(0, 6)
    assert not plots.overlap_heatmap(pairs(values), "cka").axes[-1].get_title(loc="left")
    values[2] = values[:, 2] = np.nan
    bar = plots.overlap_heatmap(pairs(values), "cka").axes[-1]
    assert bar.get_title(loc="left") == "grey: not used"


def test_heatmap_has_the_tables_values_beside_their_null(overlap):
    figure = plots.overlap_heatmap(overlap, "cka", model="smoe_share", layer=3)
    value, null = images(figure)
    expected = draws((1, 3, 0), E + 1)
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_array_equal(cells(value), expected)
    assert np.nanmax(cells(null)) == np.nanmin(cells(null)) == 0.05
    assert value.norm is null.norm
    assert (value.norm.vmin, value.norm.vmax) == (0.05, np.nanmax(expected))
    assert to_hex(value.get_cmap().get_bad()).upper() == NOTHING
    assert value.axes.get_title() == "smoe_share, layer 3, stage 0, measured"
    first = value.axes
    assert (first.get_xlabel(), first.get_ylabel()) == ("expert j", "expert i")
    assert names(first.get_xticklabels()) == [*map(str, range(E)), "shared"]
    assert names(first.get_yticklabels()) == [*map(str, range(E)), "shared"]
    assert len(figure.get_axes()) == 3  # one color bar for both


def test_first_site_is_the_default_and_a_table_serves_as_well(overlap):
    whole = images(plots.overlap_heatmap(overlap, "cka", model="cartesian"))[0]
    named = images(plots.overlap_heatmap(overlap, "cka", model="cartesian", layer=1, stage=0))[0]
    table = images(plots.overlap_heatmap(overlap.pairs, "cka", model="cartesian"))[0]
    second = images(plots.overlap_heatmap(overlap, "cka", model="cartesian", stage=1))[0]
    np.testing.assert_array_equal(cells(whole), cells(named))
    np.testing.assert_array_equal(cells(whole), cells(table))
    assert cells(second)[0, 1] == draws((2, 1, 1))[0, 1]


def test_lift_is_log_around_its_null_and_no_joint_choice_has_the_end_color(overlap):
    figure = plots.overlap_heatmap(overlap, "lift", model="smoe", layer=1)
    value, _ = images(figure)
    assert isinstance(value.norm, LogNorm)
    assert value.norm.vmin * value.norm.vmax == pytest.approx(1.0)
    np.testing.assert_allclose(value.cmap(value.norm(1.0)), value.cmap(0.5), atol=0.01)
    assert cells(value)[2, 5] == 0
    np.testing.assert_array_equal(value.to_rgba(value.get_array())[2, 5], value.cmap(0.0))
    bar = figure.get_axes()[-1]
    assert names(bar.get_yticklabels()) == ["1/8", "1/4", "1/2", "1", "2", "4", "8"]


def test_clustering_puts_like_experts_together_in_both_panels():
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    rng = np.random.default_rng(0)
    values = np.where(group[:, None] == group, 0.8, 0.1) + 0.05 * rng.random((12, 12))
    null = rng.random((12, 12))
    for sign, metric in ((1, "cka"), (-1, "relative_distance")):
        table = pairs(sign * values, metric, null=null, shared=False)
        shown, beside = images(plots.overlap_heatmap(table, metric, clustered=True))
        order = [int(text) for text in names(shown.axes.get_xticklabels())]
        assert sorted(order) == list(range(12))
        assert len([1 for a, b in pairwise(group[order]) if a != b]) == 2
        off = ~np.eye(12, dtype=bool)
        ordered = np.ix_(order, order)
        np.testing.assert_array_equal(cells(shown)[off], (sign * values)[ordered][off])
        np.testing.assert_array_equal(cells(beside)[off], null[ordered][off])


def test_clustering_leaves_a_shared_expert_last_and_bears_nan():
    values = draws(0, 6)
    values[1, 2] = values[2, 1] = np.nan
    figure = plots.overlap_heatmap(pairs(values, shared=True), "cka", clustered=True)
    assert names(images(figure)[0].axes.get_yticklabels())[-1] == "shared"
    nowhere = pairs(np.full((4, 4), np.nan), null=np.nan)
    image = images(plots.overlap_heatmap(nowhere, "cka", clustered=True))
    assert len(image) == 1  # there is no null
    assert np.isnan(cells(image[0])).all()
    image[0].figure.canvas.draw()


@pytest.mark.parametrize(("experts", "shared", "null"), [(2, True, True), (18, False, True),
                         (33, True, False), (64, False, False), (64, True, True)])  # fmt: skip
def test_any_number_of_experts_can_be_read(experts, shared, null):
    figure = plots.overlap_heatmap(
        pairs(draws(1, experts + shared), shared=shared), "cka", null=null
    )
    assert not is_clipped(figure)
    ax = figure.get_axes()[0]
    assert cells(images(figure)[0]).shape == (experts + shared, experts + shared)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert ("shared" in names(labels)) == shared
        boxes = [t.get_window_extent() for t in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_one_expert_constant_values_and_nothing_at_all():
    one = pairs(np.array([[1.0]]), "transition", 1.0, diagonal=True)
    for table in (one, pairs(np.ones((3, 3)), "transition", null=1.0)):
        plots.overlap_heatmap(table, "transition").canvas.draw()
    nothing = pairs(np.full((3, 3), np.nan), "lift", null=np.nan)
    heatmap = plots.overlap_heatmap(nothing, "lift")
    heatmap.canvas.draw()
    assert all(np.isnan(cells(image)).all() for image in images(heatmap))
    plots.overlap_profile(nothing, "lift").figure.canvas.draw()


def test_heatmap_errors_name_the_choices(overlap):
    heatmap = plots.overlap_heatmap
    for options, message in [
        (dict(metric="cosine"), "metric of pairs is 'cosine'; choose one of 'cka', 'lift', 'tr"),
        (dict(metric="composite_a"), "metric of pairs is 'composite_a'; choose one of 'cka'"),
        (dict(metric="cka"), "model is None; choose one of 'smoe', 'smoe_share', 'cartesian'"),
        (dict(metric="cka", model="dense"), "model is 'dense'; choose one of 'smoe'"),
        (dict(metric="cka", model="smoe", layer=2), "layer is 2; choose one of 1, 3"),
        (dict(metric="cka", model="smoe", stage=1), "stage is 1; choose one of 0"),
        (dict(metric="cka", model="smoe", train_seed=7), "train_seed is 7; choose one of 0"),
        (dict(metric="transition", model="smoe", clustered=True), "clustered is True, but pairs"),
    ]:
        with pytest.raises(ValueError, match=message):
            heatmap(overlap, **options)
    with pytest.raises(ValueError, match="overlap is a list; give an Overlap or its table pairs"):
        heatmap([1], "cka")
    with pytest.raises(ValueError, match="table pairs has no rows"):
        heatmap(overlap.pairs[:0], "cka")
    with pytest.raises(ValueError, match="table pairs lacks the columns expert_i, expert_j"):
        heatmap(overlap.sites, "composite_a")
    two = pd.concat([overlap.pairs, overlap.pairs.assign(train_seed=1)])
    with pytest.raises(ValueError, match="train_seed is None; choose one of 0, 1"):
        heatmap(two, "cka", model="smoe")
    assert not plt.get_fignums()
    figure = heatmap(two, "cka", model="smoe", train_seed=1)
    assert figure.axes[0].get_title() == "smoe #1, layer 1, stage 0, measured"
    figure = heatmap(overlap, "cka", model="cartesian", stage=1)
    assert figure.axes[0].get_title() == "cartesian, layer 1, stage 1, measured"


@pytest.mark.parametrize("draw", [plots.overlap_heatmap, plots.overlap_profile])
def test_steps_of_training_are_not_pooled(draw):
    one = pairs(draws(0)).assign(step=100)
    draw(one, "cka")
    plt.close()
    message = r"step has several values, \[100, 200\]; take one with \.at\(step\)"
    with pytest.raises(ValueError, match=message):
        draw(pd.concat([one, one.assign(step=200)]), "cka")
    assert not plt.get_fignums()


def test_scatter_has_an_experts_numbers_less_those_of_its_site(experts):
    figure = plots.damage_against_overlap(experts, "cka")
    assert [ax.get_title() for ax in figure.axes] == FAMILIES
    for family, ax in zip(FAMILIES, figure.axes, strict=True):
        (points,) = ax.collections
        own = experts[experts.family == family]
        both = own[["cka", "per_mass"]]
        centered = both - both.groupby(own.layer).transform("mean")
        np.testing.assert_allclose(points.get_offsets(), centered, atol=1e-12)
        assert to_hex(points.get_facecolor()[0]).upper() == FAMILY_STYLE[family][0]
        share = points.get_sizes() / plots.relation.LARGEST
        np.testing.assert_allclose(share, own.load / experts.load.max())
    assert "nats per unit of routed weight" in figure.get_supylabel()
    raw = plots.damage_against_overlap(experts, "token_js", "damage")
    assert raw.get_supxlabel().startswith("\N{MINUS SIGN}Jensen-Shannon")
    assert raw.get_supylabel() == "change of loss (nats per token), less\nthe mean of the site"
    load = plots.damage_against_overlap(experts, "load")
    assert load.get_supxlabel() == "load, less the mean of the site"


def test_a_second_model_of_a_family_is_hollow(experts, correlations):
    def also(table):
        other = table[table.model == "cartesian"].assign(model="parallel")
        return pd.concat([table, other], ignore_index=True)

    figure = plots.damage_against_overlap(also(experts), "cka")
    drawn = {ax.get_title(): ax.collections[0] for ax in figure.axes}
    color = FAMILY_STYLE["cartesian"][0]
    looks = {"cartesian": (color, "#FFFFFF"), "parallel": ("#FFFFFF", color)}
    for model, (face, edge) in looks.items():
        points = drawn[model]
        colors = points.get_facecolor()[0], points.get_edgecolor()[0]
        assert tuple(to_hex(c).upper() for c in colors) == (face, edge)
    ax = plots.relation_dots(also(correlations), models=True)
    for handle in ax.get_legend().legend_handles:
        if handle.get_label() in looks:
            colors = handle.get_markerfacecolor(), handle.get_markeredgecolor()
            assert tuple(to_hex(c).upper() for c in colors) == looks[handle.get_label()]
    dots = [line for line in ax.get_lines() if line.get_marker() not in ("None", "|")]
    assert len(dots) == len(also(correlations))


def test_each_of_four_models_of_a_family_has_its_look(experts):
    one = experts[experts.model == "cartesian"]
    four = pd.concat([one.assign(model=name) for name in "abcd"], ignore_index=True)
    figure = plots.damage_against_overlap(four, "cka")
    assert len({to_hex(ax.collections[0].get_facecolor()[0]) for ax in figure.axes}) == 4


def test_scatter_leaves_out_what_is_not_known(experts):
    unknown = experts.assign(cka=experts.cka.where(experts.expert > 3))
    figure = plots.damage_against_overlap(unknown, "cka")
    assert {len(ax.collections[0].get_offsets()) for ax in figure.axes} == {2 * (E - 4)}
    plots.damage_against_overlap(experts.assign(cka=np.nan), "cka").canvas.draw()


def test_scatter_errors(experts):
    draw = plots.damage_against_overlap
    with pytest.raises(ValueError, match="metric is 'lift'; choose one of 'load', 'cka', 'token_"):
        draw(experts, "lift")
    with pytest.raises(ValueError, match=r"metric is 'per_mass_a'; choose one of .*'token_js'$"):
        draw(experts, "per_mass_a")
    with pytest.raises(ValueError, match="damage is 'raw'; choose one of 'per_mass', 'damage'"):
        draw(experts, "cka", "raw")
    with pytest.raises(ValueError, match="table experts has no rows"):
        draw(experts[:0], "cka")
    with pytest.raises(ValueError, match="table experts lacks the columns load"):
        draw(experts.drop(columns="load"), "cka")
    assert not plt.get_fignums()


def test_relation_is_of_all_models_together_unless_each_is_asked_for(correlations):
    every = correlations[correlations.model == "all"]
    ax = plots.relation_dots(correlations)
    dots = [line for line in ax.get_lines() if line.get_marker() not in ("None", "|")]
    assert [line.get_xdata()[0] for line in dots] == every.r.tolist()
    assert names(ax.get_legend().get_texts()) == ["all models", "null", "noise ceiling"]
    alone = plots.relation_dots(correlations[correlations.model == "smoe"])
    assert names(alone.get_legend().get_texts())[0] == "smoe"


def test_relation_has_all_first_the_null_behind_and_the_ceiling(correlations):
    ax = plots.relation_dots(correlations, models=True)
    assert [t.replace("\n", " ") for t in names(ax.get_yticklabels())] == [
        "debiased CKA of outputs", "\N{MINUS SIGN}Jensen-Shannon div. of tokens", "load",
    ]  # fmt: skip
    bands = {(round(bar.get_x(), 9), round(bar.get_x() + bar.get_width(), 9)) for bar in ax.patches}
    assert bands == {(-0.2, 0.25)}
    assert len(ax.patches) == len(correlations)
    dots = [line for line in ax.get_lines() if line.get_marker() not in ("None", "|")]
    assert {line.get_xdata()[0] for line in dots} == set(correlations.r)
    ticks = [line for line in ax.get_lines() if line.get_marker() == "|"]
    assert {tuple(line.get_xdata()) for line in ticks} == {(-0.85, 0.85)}
    bars = {tuple(line.get_xdata()) for line in ax.get_lines() if line.get_marker() == "None"}
    assert set(zip(correlations.low, correlations.high, strict=True)) <= bars
    largest = max(dots, key=lambda line: line.get_markersize())
    first = [line for line in dots if line.get_markersize() == largest.get_markersize()]
    every = correlations[correlations.model == "all"]
    assert [line.get_xdata()[0] for line in first] == every.r.tolist()
    for i, line in enumerate(first):  # above its row's others
        others = [d.get_ydata()[0] for d in dots if i - 0.5 < d.get_ydata()[0] < i + 0.5]
        assert line.get_ydata()[0] == min(others)
    assert names(ax.get_legend().get_texts()) == ["all models", "smoe", "cartesian",
                                                  "null", "noise ceiling"]  # fmt: skip


def test_relation_bears_nan_and_several_damages(correlations):
    ax = plots.relation_dots(correlations.assign(r=np.nan, low=np.nan, ceiling=np.nan))
    assert not [line for line in ax.get_lines() if line.get_marker() == "|"]
    both = pd.concat([correlations, correlations.assign(damage="damage")])
    rows = names(plots.relation_dots(both).get_yticklabels())
    assert [rows[2], rows[5]] == ["load\n(per_mass)", "load\n(damage)"]
    with pytest.raises(ValueError, match="table relation has no rows"):
        plots.relation_dots(correlations[:0])
    with pytest.raises(ValueError, match="table relation lacks the columns null_low"):
        plots.relation_dots(correlations.drop(columns="null_low"))


def test_substitution_has_estimates_and_what_was_measured(substitution):
    figure = plots.substitution_matrix(substitution, layer=3, stage=0)
    (image,) = images(figure)
    expected = draws((7, 3)) - 0.3
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_array_equal(cells(image), expected)
    assert image.norm.vmin == -image.norm.vmax
    panel = figure.get_axes()[1]
    shown = marked(panel)
    rows = substitution[substitution.layer == 3]
    for chosen, name in {"lowest": "lowest estimates", "random": "at random"}.items():
        own = rows[rows.chosen == chosen]
        np.testing.assert_array_equal(shown[name], own[["linear", "measured"]])
    faces = {line.get_label(): to_hex(line.get_mfc()).upper() for line in panel.get_lines()}
    assert faces["lowest estimates"] == FAMILY_STYLE["smoe"][0]
    assert faces["at random"] == "#FFFFFF"
    ends = np.concatenate([c.get_segments() for c in panel.collections])[:, :, 1]
    measured = rows.dropna(subset="measured").sort_values("chosen")
    np.testing.assert_allclose(np.sort(ends[:, 0]), np.sort(measured.low))
    np.testing.assert_allclose(np.sort(ends[:, 1]), np.sort(measured.high))
    (identity,) = (line for line in panel.get_lines() if isinstance(line, AxLine))
    assert (identity.get_xy1(), identity.get_slope()) == ((0, 0), 1)
    assert "nats per routed token" in panel.get_xlabel()


def test_substitution_of_an_overlap_is_the_matrix_alone():
    table = pairs(draws(3) - 0.2, "substitution", null=np.nan)
    for source in (table, SimpleNamespace(pairs=table)):
        figure = plots.substitution_matrix(source, layer=0, stage=0)
        assert len(figure.get_axes()) == 2  # and its color bar
        assert figure.get_size_inches()[0] == COLUMN_WIDTH
        assert not is_clipped(figure)
    nowhere = table.assign(value=np.nan)
    plots.substitution_matrix(nowhere, layer=0, stage=0).canvas.draw()


def test_substitution_errors(substitution, overlap):
    place = dict(layer=1, stage=0)
    draw = plots.substitution_matrix
    with pytest.raises(ValueError, match="metric of pairs is 'substitution'; choose one of 'cka'"):
        draw(overlap, **place)
    with pytest.raises(ValueError, match="layer is 2; choose one of 1, 3"):
        draw(substitution, layer=2, stage=0)
    with pytest.raises(ValueError, match="table substitution has no rows"):
        draw(substitution[:0], **place)
    with pytest.raises(ValueError, match="table substitution lacks the columns measured"):
        draw(substitution.drop(columns="measured"), **place)
    both = pd.concat([substitution, substitution.assign(downstream="replay")])
    with pytest.raises(ValueError, match="downstream is 'reroute', 'replay' in one frame"):
        draw(both, **place)
    assert not plt.get_fignums()


def test_usage_of_a_cartesian_layer(overlap):
    figure = plots.cartesian_usage(overlap, layer=3, model="cartesian")
    usage, null = images(figure)
    np.testing.assert_array_equal(cells(usage), draws((8, 2, 3, 1)))
    np.testing.assert_array_equal(cells(null), np.full((E, E), 1 / E))
    assert usage.norm is null.norm
    assert "A_i" in usage.axes.get_ylabel()
    assert "B_j" in usage.axes.get_xlabel()
    assert usage.axes.get_title() == "cartesian, layer 3, measured"
    shares, similar = [ax for ax in figure.get_axes() if ax.get_legend()]
    for ax, expected in ((shares, SHARES), (similar, SIMILAR)):
        lines = ax.get_lines()
        points = [x.get_xdata()[0] for x in lines if x.get_marker() == FAMILY_STYLE["cartesian"][1]]
        assert points == list(expected.values())
        nulls = [line.get_xdata()[0] for line in lines if line.get_marker() == "d"]
        known = [v / 2 for name, v in expected.items() if name != "cka_unrelated"]
        assert [v for v in nulls if v == v] == known
        bars = [tuple(x.get_xdata()) for x in lines if len(x.get_xdata()) == 2][: len(expected)]
        np.testing.assert_allclose(bars, [(v - 0.05, v + 0.05) for v in expected.values()])
    assert names(shares.get_yticklabels()) == ["A", "B", "interaction"]


def test_usage_of_unequal_stages_and_errors(overlap):
    table = pairs(draws(2)[:3, :5], "transition", 0.2, diagonal=True, model="cartesian",
                  layer=3, stage=1)  # fmt: skip
    figure = plots.cartesian_usage(SimpleNamespace(pairs=table, sites=overlap.sites), layer=3)
    assert cells(images(figure)[0]).shape == (3, 5)
    plt.close(figure)
    draw = plots.cartesian_usage
    plain = overlap.pairs[overlap.pairs.model == "smoe"]
    with pytest.raises(ValueError, match="stage is 1; choose one of 0"):
        draw(SimpleNamespace(pairs=plain, sites=overlap.sites), layer=3)
    with pytest.raises(ValueError, match="layer is 2; choose one of 1, 3"):
        draw(overlap, layer=2, model="cartesian")
    few = overlap.sites[overlap.sites.metric != "composite_b"]
    with pytest.raises(ValueError, match="metric of sites is 'composite_b'; choose one of"):
        draw(SimpleNamespace(pairs=overlap.pairs, sites=few), layer=3, model="cartesian")
    with pytest.raises(ValueError, match="overlap is a SimpleNamespace; give an Overlap or its"):
        draw(SimpleNamespace(pairs=overlap.pairs), layer=3, model="cartesian")
    assert not plt.get_fignums()


def test_domains_are_over_their_null_and_experts_ordered_by_the_strongest(overlap):
    (image,) = images(plots.specialization(overlap, layer=1, stage=0, model="smoe").figure)
    order = [int(text) for text in names(image.axes.get_xticklabels())]
    ratio = np.array([[2.0 ** ((e + d) % 4 - 1) for e in order] for d in range(len(DOMAINS))])
    np.testing.assert_allclose(cells(image), ratio)
    assert names(image.axes.get_yticklabels()) == DOMAINS
    strongest = cells(image).argmax(0)
    assert (np.diff(strongest) >= 0).all()
    assert sorted(order) == list(range(E))
    assert isinstance(image.norm, LogNorm)
    assert (image.norm.vmin, image.norm.vmax) == (1 / 4, 4)


def test_domains_within_one_are_ordered_by_how_much_and_the_unused_come_last():
    value = np.array([[0.2, 0.5, 0.0, 0.3], [0.1, 0.1, 0.0, 0.4]])
    null = np.array([0.2, 0.25, 0.0, 0.2])
    table = pd.DataFrame([
        site() | dict(metric="domain_specialization", expert=e, domain=domain, value=value[d, e],
                      low=0.0, high=1.0, null=null[e])
        for e in range(4) for d, domain in enumerate(("b", "a"))
    ])  # fmt: skip
    figure = plots.specialization(table, layer=0, stage=0).figure
    (image,) = images(figure)
    assert names(image.axes.get_xticklabels()) == ["1", "0", "3", "2"]
    assert names(image.axes.get_yticklabels()) == ["b", "a"]  # as they come
    assert np.isnan(cells(image)[:, -1]).all()
    figure.canvas.draw()
    plots.specialization(table.assign(value=np.nan), layer=0, stage=0).figure.canvas.draw()
    with pytest.raises(ValueError, match="layer is 1; choose one of 0"):
        plots.specialization(table, layer=1, stage=0)
    with pytest.raises(ValueError, match="metric of experts is 'domain_specialization'; choose"):
        plots.specialization(table.assign(metric="load"), layer=0, stage=0)
    with pytest.raises(ValueError, match="table experts lacks the columns domain"):
        plots.specialization(table.drop(columns="domain"), layer=0, stage=0)


def test_saturation_has_a_line_a_site_with_interval_and_null(saturation):
    ax = plots.saturation_curve(saturation)
    curves = [line for line in ax.get_lines() if line.get_marker() not in ("None", "")]
    sites = list(saturation.groupby(["model", "layer", "stage"], sort=False))
    assert len(curves) == len(sites) == 6
    nulls = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert all((line.get_ydata() == 0.15).all() for line in nulls)
    assert len(nulls) == 6
    for ((model, layer, stage), rows), line, band in zip(
        sites, curves, ax.collections, strict=True
    ):
        np.testing.assert_array_equal(line.get_xydata(), rows[["step", "value"]])
        assert line.get_marker() == FAMILY_STYLE[model][1]
        assert line.get_linestyle() == ("--" if stage else "-")
        assert band.get_paths()[0].vertices[:, 1].min() == rows.low.min()
        last = layer == 3
        assert (to_hex(line.get_color()).upper() == FAMILY_STYLE[model][0]) == last
    assert names(ax.get_legend().get_texts()) == [
        *("smoe", "cartesian", "layer 1", "layer 3", "stage 0", "stage 1", "null")
    ]
    with pytest.raises(ValueError, match="table saturation has no rows"):
        plots.saturation_curve(saturation[:0])
    with pytest.raises(ValueError, match="table saturation lacks the columns step"):
        plots.saturation_curve(saturation.drop(columns="step"))


def test_profile_has_means_and_quartiles_of_the_routed_experts_pairs(overlap):
    ax = plots.overlap_profile(overlap, "cka")
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert [name for name in lines if not name.startswith("_")] == FAMILIES
    off = ~np.eye(E, dtype=bool)
    for k, family in enumerate(FAMILIES):
        places = [(layer, stage) for layer in (1, 3) for stage in stages_of(family)]
        n = E + (family == "smoe_share")
        values = [draws((k, *place), n)[:E, :E][off] for place in places]
        np.testing.assert_allclose(lines[family].get_ydata(), [v.mean() for v in values])
        spread = np.array(ax.collections[k].get_segments())[:, :, 1]
        np.testing.assert_allclose(spread, [np.quantile(v, (0.25, 0.75)) for v in values])
        color = to_hex(lines[family].get_color()).upper()
        assert (color, lines[family].get_marker()) == FAMILY_STYLE[family]
    np.testing.assert_allclose(np.diff(lines["cartesian"].get_xdata()), [0.5, 1.5, 0.5])
    assert ax.get_xticks(minor=True).tolist() == [1.5, 3.5]
    assert ax.get_xlabel() == "layer\n(short ticks: stage 1)"
    nulls = [line for line in ax.get_lines() if line.get_marker() == "_"]
    assert len(nulls) == len(FAMILIES)
    assert all(np.allclose(line.get_ydata(), 0.05) for line in nulls)
    assert {line.get_linestyle() for line in ax.get_lines()} == {"None"}  # of two layers: dots
    assert names(ax.get_legend().get_texts()) == [*FAMILIES, "null"]


def test_a_profile_of_many_layers_has_a_tick_at_each_site():
    stages = [site("cartesian", layer, stage) for layer in range(12) for stage in (0, 1)]
    rows = pd.DataFrame(stages).assign(metric="gini", value=0.3, low=0.2, high=0.4, null=0.0)
    ax = plots.overlap_profile(rows, "gini")
    assert [*ax.get_xticks(), *ax.get_xticks(minor=True)] == [*range(12), *np.arange(12) + 0.5]
    assert [name for name in names(ax.get_xticklabels()) if name] == ["0", "2", "4", "6", "8", "10"]
    (line,) = (line for line in ax.get_lines() if line.get_label() == "cartesian")
    np.testing.assert_allclose(line.get_xdata(), np.arange(0, 12, 0.5))
    assert line.get_linestyle() == "-"
    plain = plots.overlap_profile(rows[rows.stage == 0], "gini")
    assert (plain.get_xlabel(), plain.get_xticks(minor=True).size) == ("layer", 0)


def test_profile_of_a_sites_own_number_has_its_interval(overlap):
    ax = plots.overlap_profile(overlap, "composite_a")
    np.testing.assert_allclose(
        np.array(ax.collections[0].get_segments())[:, :, 1], [[0.5, 0.6], [0.5, 0.6]]
    )
    table = plots.overlap_profile(overlap.sites, "composite_a")
    assert len(table.get_lines()) == len(ax.get_lines())
    of_experts = plots.overlap_profile(overlap.experts, "domain_specialization")
    assert len(of_experts.collections) == len(FAMILIES)
    two = pd.concat([overlap.pairs, overlap.pairs.assign(train_seed=1)])
    seeds = plots.overlap_profile(two, "cka")
    assert names(seeds.get_legend().get_texts()) == [*FAMILIES, "null"]
    assert "means of 2 training seeds" in seeds.get_xlabel()
    with pytest.raises(ValueError, match=r"is 'cosine'; choose one of 'cka', .*'domain_sp.*_a'"):
        plots.overlap_profile(overlap, "cosine")
    with pytest.raises(ValueError, match="table pairs has no rows"):
        plots.overlap_profile(overlap.pairs[:0], "cka")


# ---- words, scales and orders that no value shows


def test_lift_is_centered_on_the_median_of_its_null(overlap):
    table = overlap.pairs.assign(null=0.5)
    shown, _ = images(plots.overlap_heatmap(table, "lift", model="smoe", layer=1))
    assert shown.norm.vmin * shown.norm.vmax == pytest.approx(0.25)
    assert "median of the null" in shown.figure.get_axes()[-1].get_ylabel()


def test_clustering_takes_both_triangles():
    group = np.arange(12) % 3
    values_EE = np.where(group[:, None] == group, 0.8, 0.1)
    values_EE[np.triu_indices(12, 1)] = 0.5  # what i says of a lower j alone tells groups
    table = pairs(values_EE, "co_activation")
    shown, _ = images(plots.overlap_heatmap(table, "co_activation", clustered=True))
    order = [int(text) for text in names(shown.axes.get_xticklabels())]
    assert sum(a != b for a, b in pairwise(group[order])) == 2


def test_transitions_say_from_where(overlap):
    figure = plots.overlap_heatmap(overlap, "transition", model="smoe", layer=3)
    assert images(figure)[0].axes.get_ylabel() == "expert i at the site before"


def test_usage_has_one_scale_and_says_what_is_what(overlap):
    table = overlap.pairs.copy()
    table.loc[table.metric == "transition", "null"] = 2.0
    both = SimpleNamespace(pairs=table, sites=overlap.sites)
    figure = plots.cartesian_usage(both, layer=3, model="cartesian")
    usage, null = images(figure)
    assert usage.norm.vmax == null.norm.vmax == 2.0
    titles = usage.axes.get_title(), null.axes.get_title()
    assert titles == ("cartesian, layer 3, measured", "null")
    shares, similar = (ax for ax in figure.get_axes() if ax.get_legend())
    rows = ["same row ($a_i$)", "same column ($b_j$)", "neither"]
    assert names(similar.get_yticklabels()) == rows
    assert "CKA" in similar.get_xlabel()
    assert shares.get_xlim()[0] <= 0 <= 1 <= shares.get_xlim()[1]


def test_substitution_says_who_replaces_whom(substitution):
    ax = plots.substitution_matrix(substitution, layer=1, stage=0).get_axes()[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("by expert j", "expert i replaced")


def test_lines_follow_their_axis_whatever_the_order_of_rows(saturation, overlap):
    ax = plots.saturation_curve(saturation.sample(frac=1, random_state=0))
    assert ax.get_ylim() == (0, 1.03)
    mixed = SimpleNamespace(pairs=overlap.pairs, experts=overlap.experts, sites=overlap.sites[::-1])
    profile = plots.overlap_profile(mixed, "composite_a")
    assert "quartiles" not in profile.get_ylabel()  # of one number a site
    of_sites = [line for line in profile.get_lines() if line.get_label() == "cartesian"]
    assert len(of_sites) == 1
    for line in (*ax.get_lines(), *of_sites):
        assert (np.diff(line.get_xdata()) > 0).all()


def test_relation_says_with_what_damage_and_given_what(correlations):
    one = correlations[correlations.damage == correlations.damage.iloc[0]]
    load, rest = one[one.metric == "load"], one[one.metric != "load"]
    assert len(load) * len(rest) > 0
    for damage, what in (("per_mass", "damage per weight dropped"), ("damage", "damage")):
        for rows, given in (
            (one, ", given load (but load itself)"),
            (rest, ", given load"),
            (load, ""),
        ):
            ax = plots.relation_dots(rows.assign(damage=damage))
            said = ax.get_xlabel().replace("\n", " ")
            assert said == f"rank correlation with {what}, within sites{given}"
            assert ax.get_xlim() == (-1.03, 1.03)


def test_domains_say_of_what_site(overlap):
    ax = plots.specialization(overlap, layer=1, stage=0, model="smoe")
    assert ax.get_title() == "smoe, layer 1, stage 0"


def test_scatter_has_areas_by_load(experts):
    handles = plots.damage_against_overlap(experts, "cka").legends[0].legend_handles
    sizes = [handle.get_markersize() for handle in handles]
    assert sizes == pytest.approx([10**0.5, 40**0.5])  # an area, and a quarter of it
