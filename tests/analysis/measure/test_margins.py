"""Predicted flips: formulas against sampling, and against what noise does in models."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import same_color
from scipy.stats import norm

from analysis import plots
from analysis.adapters.base import as_adapter
from analysis.measure.calibrate import calibrate
from analysis.measure.margins import change_probability, flip_prediction, pair_probability
from analysis.measure.shard import measure
from analysis.perturb.condition import Condition
from analysis.perturb.logits import GaussianNoise
from analysis.stats.bootstrap import Bootstrap
from cartmoe.data import Sequences

NUMBERS = ["margin", "pair_predicted", "pair_measured", "changed_predicted", "changed_measured"]


@pytest.fixture(scope="module")
def docs() -> Sequences:
    """1200 tokens in thirty documents."""
    rows = torch.randint(1, 13, (30, 41), generator=torch.Generator().manual_seed(4))
    names = [str(i) for i in range(30)]
    return Sequences(
        rows[:, :-1], rows[:, 1:], torch.arange(30), names, names, torch.full((30,), 40)
    )


def test_two_experts_are_one_pair():
    margin_T = torch.tensor([0.0, 0.1, 1.0, 3.0, 12.0], dtype=torch.float64)
    logits_TE = torch.stack([margin_T, torch.zeros(5)], 1)
    std_T = torch.full((5,), 0.7, dtype=torch.float64)
    expected = norm.sf(margin_T / (2**0.5 * 0.7))
    np.testing.assert_allclose(pair_probability(margin_T, std_T), expected, atol=1e-12)
    np.testing.assert_allclose(change_probability(logits_TE, 1, std_T), expected, atol=1e-7)


@pytest.mark.parametrize(("E", "k"), [(6, 2), (6, 5), (16, 1), (24, 8)])
@pytest.mark.parametrize("std", [0.03, 0.4, 3.0])
def test_change_probability_by_sampling(E, k, std):
    generator = torch.Generator().manual_seed(E + k)
    logits_TE = torch.randn(5, E, generator=generator)
    logits_TE[0, :2] = 2.0  # a tie
    draws = 20000
    noisy = logits_TE + std * torch.randn(draws, 5, E, generator=generator)
    before = torch.zeros(5, E).scatter(1, logits_TE.topk(k).indices, 1.0)
    after = torch.zeros(draws, 5, E).scatter(2, noisy.topk(k).indices, 1.0)
    sampled_T = (before != after).any(-1).double().mean(0)
    got_T = change_probability(logits_TE, k, torch.full((5,), std, dtype=torch.float64))
    error_T = (got_T * (1 - got_T) / draws).sqrt()
    assert ((got_T - sampled_T).abs() <= 4.5 * error_T + 1e-9).all()


def test_limits():
    logits_TE = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    none_T = torch.zeros(2, dtype=torch.float64)
    assert change_probability(logits_TE, 1, none_T).tolist() == [0, 0]
    assert pair_probability(torch.zeros(2), none_T).tolist() == [0, 0]
    assert change_probability(logits_TE, 3, none_T + 5).tolist() == [0, 0]
    huge_T = change_probability(logits_TE, 1, none_T + 1e6)
    torch.testing.assert_close(huge_T, torch.full_like(huge_T, 2 / 3), atol=1e-5, rtol=0)
    tiny_T = change_probability(logits_TE, 1, none_T + 1e-3)
    torch.testing.assert_close(tiny_T, torch.tensor([0, 2 / 3]).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", ["smoe", "hash", "cartesian", "top1", "raw", "top_p", "sigmoid"])
@pytest.mark.parametrize("scale", ["token", "absolute"])
def test_predicted_is_measured(model_of, docs, kind, scale):
    """Up to what chance allows, over 1200 tokens a site."""
    table = flip_prediction(
        model_of(kind), docs, [0.2, 1.0], scale=scale, bootstrap=Bootstrap(resamples=99), draws=16
    )
    by_margins = kind not in ("top_p", "sigmoid")
    assert set(table.predicted_by) == {"margins" if by_margins else "simulation"}
    assert table.pair_measured.notna().all() == by_margins
    for name in ("pair", "changed") if by_margins else ("changed",):
        p = table[f"{name}_predicted"]
        error = np.sqrt(p * (1 - p) / table.num_tokens * (1 if by_margins else 1 + 1 / 16))
        assert ((table[f"{name}_measured"] - p).abs() < 4 * error).all()
    if by_margins:
        # Some other change may undo the pair's, but the pair is the likeliest one of many.
        assert (table.changed_predicted >= table.pair_predicted * 0.9).all()
    big = table[table.sigma == 1.0].changed_measured.to_numpy()
    assert (big > table[table.sigma == 0.2].changed_measured.to_numpy()).all()


def test_measured_is_what_a_sweep_sees(model_of, docs):
    """The same draws: single sites under downstream "replay" flip the very same tokens."""
    model = model_of("cartesian")
    table = flip_prediction(model, docs, 0.5, seed=3, bootstrap=Bootstrap(resamples=99)).set_index(
        "where"
    )
    condition = Condition(GaussianNoise(0.5), downstream="replay", eval_seed=3)
    cell = measure(model, [condition], docs)[1]
    sums = cell.routing.groupby(["layer", "stage"])[["changed", "num_tokens"]].sum()
    for (layer, stage), row in sums.iterrows():
        share = row.changed / row.num_tokens
        assert table.changed_measured[f"layer {layer} stage {stage}"] == pytest.approx(share)
    total = sums.sum()
    assert table.changed_measured["all"] == pytest.approx(total.changed / total.num_tokens)
    assert table.num_tokens["all"] == total.num_tokens


def test_form_of_the_table(model_of, docs):
    table = flip_prediction(
        model_of("cartesian"),
        docs,
        [1.0, 0.5],
        where="stage 1",
        scale="site",
        bootstrap=Bootstrap(resamples=99),
    )
    assert table["where"].tolist() == 2 * ["all", "layer 0 stage 1", "layer 2 stage 1"]
    assert table.sigma.tolist() == [0.5] * 3 + [1.0] * 3
    assert (table[["model", "family", "scale"]] == ["cartesian", "cartesian", "site"]).all(
        axis=None
    )
    assert (table.num_documents == 30).all()
    for name in NUMBERS:
        assert (table[f"{name}_low"] <= table[name] + 1e-12).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-12).all()
    mean = table.changed_predicted[1:3].mean()  # as many tokens at each site
    assert table.changed_predicted[0] == pytest.approx(mean)


def test_site_scale_is_that_of_the_calibration(model_of, docs):
    model = model_of("smoe_share")
    site = model.sites()[0]
    std = calibrate(model, docs[:32]).sites[site].std
    a = flip_prediction(
        model, docs, 0.5, where="layer 0", scale="site", bootstrap=Bootstrap(resamples=9)
    )
    b = flip_prediction(
        model, docs, 0.5 * std, where="layer 0", scale="absolute", bootstrap=Bootstrap(resamples=9)
    )
    np.testing.assert_allclose(a[NUMBERS], b[NUMBERS], atol=2e-3)


def test_batches_do_not_matter(model_of, docs):
    a, b = (
        flip_prediction(
            model_of("top_p"), docs, 0.5, batch_size=size, bootstrap=Bootstrap(resamples=9)
        )
        for size in (7, 30)
    )
    np.testing.assert_allclose(a[NUMBERS[3:]], b[NUMBERS[3:]], atol=2e-3)


def test_all_experts_in_use(tiny_model, docs):
    model = as_adapter(tiny_model("smoe_share", num_experts=2, top_k=2))
    table = flip_prediction(model, docs, 2.0, bootstrap=Bootstrap(resamples=9))
    assert (table[["margin", "changed_predicted", "changed_measured"]] == 0).all(axis=None)
    assert table[["pair_predicted", "pair_measured"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("sigmas", "options", "message"),
    [
        ([], {}, r"sigmas is \[\]; give numbers above 0"),
        ([0.5, 0], {}, "give numbers above 0"),
        (-1.0, {}, "sigma is -1.0"),
        (1.0, dict(scale="row"), "scale is 'row'; choose one of"),
        (1.0, dict(where="layer 1"), "where is 'layer 1'; it must select routers"),
        (1.0, dict(where="positions 0:4"), "all their tokens"),
    ],
)
def test_wrong_arguments(model_of, docs, sigmas, options, message):
    with pytest.raises(ValueError, match=message):
        flip_prediction(model_of("cartesian"), docs, sigmas, **options)


def test_dense_and_empty(model_of, docs):
    with pytest.raises(ValueError, match="dense has no router"):
        flip_prediction(model_of("dense"), docs, 1.0)
    with pytest.raises(ValueError, match="docs has no sequence"):
        flip_prediction(model_of("cartesian"), docs[:0], 1.0)


# ---- the picture


@pytest.fixture(scope="module")
def frame(model_of, docs):
    kinds = ("cartesian", "top_p")
    return pd.concat(
        [
            flip_prediction(model_of(k), docs, [0.2, 1.0], bootstrap=Bootstrap(resamples=99))
            for k in kinds
        ]
    )


def test_picture_draws_the_sites_of_the_table(frame):
    one = frame[frame.model == "cartesian"]
    ax = plots.flip_calibration(one)
    assert ax.figure.get_size_inches()[0] == plots.style.COLUMN_WIDTH
    drawn = {line.get_label(): line for line in ax.get_lines() if line.get_label()[0] != "_"}
    assert list(drawn) == ["any change of the set", "pair at the border"]
    sites = one[one["where"] != "all"]
    for (label, line), kind in zip(drawn.items(), ("changed", "pair"), strict=True):
        assert line.get_xdata().tolist() == sites[f"{kind}_predicted"].tolist()
        assert line.get_ydata().tolist() == sites[f"{kind}_measured"].tolist()
        assert same_color(line.get_markerfacecolor(), "white") == (kind == "pair"), label


def test_picture_of_several_models_and_of_one_row(frame):
    _, ax = plt.subplots()
    assert plots.flip_calibration(frame, ax=ax) is ax
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [
        "cartesian: any change of the set",
        "cartesian: pair at the border",
        "top_p: any change of the set",
    ]
    overall = frame[frame["where"] == "all"]
    ax = plots.flip_calibration(overall[overall.model == "top_p"])
    assert len(ax.get_lines()) == 2  # the line of agreement, and one kind of points
    with pytest.raises(ValueError, match="table flips lacks the columns pair_predicted"):
        plots.flip_calibration(frame.drop(columns="pair_predicted"))
