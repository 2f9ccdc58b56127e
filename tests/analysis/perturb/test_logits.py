"""Perturbations that move logits: what each does."""

import math

import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.measure.calibrate import calibrate
from analysis.perturb.base import chosen_mask
from analysis.perturb.compound import Compose
from analysis.perturb.condition import POINTS
from analysis.perturb.context import SiteStats
from analysis.perturb.logits import (
    GaussianNoise,
    GumbelNoise,
    Quantize,
    RandomRouting,
    SwapRanks,
    Temperature,
)
from analysis.perturb.masks import DropExperts, DropUnchosen
from cartmoe.hooks import router_sites

from ..routers import OPTIONS, decide, router_of, routings, same_sets

POINT = pytest.mark.parametrize("point", POINTS)
INF = math.inf


# ---- noise


def test_gaussian_noise_scales(context_of):
    router, logits_TE = router_of(16), 3 * torch.randn(3000, 16) + 7
    clean, ctx = context_of(router, logits_TE)
    unit_TE = ctx.noise.normal(16)
    stats = SiteStats(logits_TE, 2.5, torch.ones(16) / 16)
    _, with_stats = context_of(router, logits_TE, stats=stats)
    for p, context, scale in [
        (GaussianNoise(0.5), ctx, logits_TE.std(-1, correction=0, keepdim=True)),
        (GaussianNoise(0.5, scale="absolute"), ctx, 1.0),
        (GaussianNoise(0.5, scale="site"), with_stats, 2.5),
    ]:
        torch.testing.assert_close(p(logits_TE, context), logits_TE + 0.5 * scale * unit_TE)
    within = GaussianNoise(0.5, within="chosen")(logits_TE, ctx)
    assert (within == logits_TE).equal(~chosen_mask(clean))
    with pytest.raises(ValueError, match=r"needs statistics .*analysis\.calibrate"):
        GaussianNoise(0.5, scale="site")(logits_TE, ctx)


def test_strengths_share_their_noise(context_of):
    router, logits_TE = router_of(), torch.zeros(9, 6)
    _, ctx = context_of(router, logits_TE)
    for make in (lambda s: GaussianNoise(s, scale="absolute"), GumbelNoise):
        one, two = (make(s)(logits_TE, ctx) for s in (1.0, 2.0))
        assert two.equal(2 * one)


def test_the_scale_of_a_token_is_that_of_the_experts_it_has_left(context_of):
    logits_TE = torch.randn(5, 6)
    logits_TE[:, 2] = 100.0  # would make the scale large
    mask = DropExperts(ids=[2])
    _, ctx = context_of(router_of(), logits_TE)
    left_TE = mask(logits_TE, ctx)
    noisy = GaussianNoise(3.0)(left_TE, ctx)
    assert (noisy == -INF).equal(left_TE == -INF)
    kept = [0, 1, 3, 4, 5]
    std_T1 = logits_TE[:, kept].std(-1, correction=0, keepdim=True)
    expected = logits_TE[:, kept] + 3 * std_T1 * ctx.noise.normal(6)[:, kept]
    torch.testing.assert_close(noisy[:, kept], expected)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@POINT
def test_gumbel_samples_without_replacement(context_of, tau, point):
    """Pairs (i, j) in order have probability p_i p_j / (1 - p_i), p = softmax(z / tau)."""
    T, E = 40_000, 4
    z_E = torch.tensor([1.0, 0.0, -0.5, 0.7])
    _, got = decide(router_of(E), GumbelNoise(tau), z_E.expand(T, E), context_of, point)
    p_E = (z_E / tau).softmax(-1)
    expected_EE = p_E[:, None] * p_E / (1 - p_E[:, None])
    expected_EE.fill_diagonal_(0)
    pairs_EE = torch.zeros(E, E).index_put_(tuple(got.ids_TK.T), torch.tensor(1.0), accumulate=True)
    # Five standard deviations of a share.
    atol = 5 * (expected_EE * (1 - expected_EE) / T).sqrt().max().item()
    torch.testing.assert_close(pairs_EE / T, expected_EE, atol=atol, rtol=0)


# ---- temperature


@POINT
@pytest.mark.parametrize("log2_t", [-3, -1, 1, 6])
def test_temperature(context_of, log2_t, point):
    """Weights are a softmax of z / t over the chosen, who stay."""
    router, logits_TE = router_of(8, 3), torch.randn(50, 8)
    clean, got = decide(router, Temperature(log2_t), logits_TE, context_of, point)
    assert got.ids_TK.equal(clean.ids_TK)
    chosen_TK = logits_TE.gather(-1, clean.ids_TK)
    torch.testing.assert_close(got.weights_TK, (chosen_TK / 2**log2_t).softmax(-1))
    if log2_t > 0:
        assert (got.weights_TK.amax(-1) < clean.weights_TK.amax(-1)).all()


def test_temperature_moves_the_border_of_top_p(context_of):
    router, logits_TE = router_of(8, top_p=0.4, renormalize=False), torch.randn(200, 8)
    clean, flat = decide(router, Temperature(2), logits_TE, context_of)
    _, sharp = decide(router, Temperature(-4), logits_TE, context_of)
    counts = [DenseRouting(r).count_T.double().mean() for r in (sharp, clean, flat)]
    assert counts[0] < counts[1] < counts[2]
    assert counts[0] == pytest.approx(1, abs=0.1)


def test_temperatures_without_end_are_finite(context_of):
    for log2_t in (-64, 64):
        for point in POINTS:
            for options in OPTIONS:
                router = router_of(**options)
                p = Temperature(log2_t)
                _, got = decide(router, p, 10 * torch.randn(50, 6), context_of, point)
                assert got.weights_TK.isfinite().all()


# ---- ranks


@pytest.mark.parametrize(("r", "s"), [(1, 2), (2, 1), (1, 6), (3, 5)])
def test_swap_ranks(context_of, r, s):
    router, logits_TE = router_of(), torch.randn(40, 6)
    clean, got = decide(router, SwapRanks(r, s), logits_TE, context_of)
    order_TE = logits_TE.argsort(-1, descending=True)
    swapped_TE = order_TE.clone()
    swapped_TE[:, [r - 1, s - 1]] = order_TE[:, [s - 1, r - 1]]
    assert got.logits_TE.argsort(-1, descending=True).equal(swapped_TE)
    assert got.logits_TE.sort(-1).values.equal(logits_TE.sort(-1).values)
    assert same_sets(clean, got).all() == (max(r, s) <= 2 or min(r, s) > 2)


def test_swapping_twice_or_with_itself_is_nothing(context_of):
    logits_TE = torch.randn(40, 6)
    _, ctx = context_of(router_of(), logits_TE)
    assert SwapRanks(2, 2)(logits_TE, ctx) is logits_TE
    once = SwapRanks(1, 4)(logits_TE, ctx)
    assert SwapRanks(1, 4)(once, ctx).equal(logits_TE)


# ---- random routing


@POINT
@pytest.mark.parametrize("kind", ["smoe_share", "top_p", "sigmoid", "raw"])
def test_random_routing_keeps_the_marginal_load(model_of, shard, kind, point):
    """Tokens get decisions that other tokens really got, weights included."""
    model = model_of(kind)
    stats = calibrate(model, shard)
    site, router = next(iter(router_sites(model.model).items()))
    tokens_BL = torch.randint(0, 13, (200, 8), generator=torch.Generator().manual_seed(2))
    _, after = routings(
        model, RandomRouting(), tokens_BL, torch.arange(200), point=point, stats=stats
    )
    expected = DenseRouting(router.route(stats.sites[site].reservoir_RE))
    got = DenseRouting(after[site])
    load_E = got.used_TE.double().mean(0)
    torch.testing.assert_close(load_E, expected.used_TE.double().mean(0), atol=0.05, rtol=0)
    apart = (got.weights_TE[:, None] - expected.weights_TE).abs().amax(-1)
    assert apart.amin(-1).max() < 1e-5


@POINT
def test_random_routing_of_peaked_routers(context_of, point):
    """Scores far below those of the row that takes their place, and above 0: nothing overflows."""
    router, logits_TE = router_of(), torch.randn(50, 6)
    logits_TE[:, 0] = 100.0  # the others' scores are denormal
    stats = SiteStats(torch.randn(20, 6), 1.0, torch.ones(6) / 6)
    _, got = decide(router, RandomRouting(), logits_TE, context_of, point, stats=stats)
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got.weights_TK.sum(-1), torch.ones(50))


def test_share_of_tokens(context_of):
    router, logits_TE = router_of(), torch.randn(2000, 6)
    stats = SiteStats(torch.randn(50, 6), 1.0, torch.ones(6) / 6)
    _, ctx = context_of(router, logits_TE, stats=stats)
    moved = {}
    for share in (0.25, 0.75):
        moved[share] = (RandomRouting(share)(logits_TE, ctx) != logits_TE).any(-1)
        assert moved[share].double().mean() == pytest.approx(share, abs=0.03)
    assert not (moved[0.25] & ~moved[0.75]).any()  # a larger share has the smaller one's tokens
    permuted = RandomRouting(draw="permute")(logits_TE, ctx)
    assert permuted.sort().values.equal(logits_TE.sort().values)
    assert (permuted != logits_TE).any(-1).double().mean() > 0.99


def test_permuting_spreads_over_all_experts(context_of):
    logits_TE = torch.tensor([3.0, 2, 1, 0, -1, -2]).expand(6000, 6)
    _, ctx = context_of(router_of(), logits_TE)
    best_T = RandomRouting(draw="permute")(logits_TE, ctx).argmax(-1)
    shares_E = torch.bincount(best_T, minlength=6) / 6000
    torch.testing.assert_close(shares_E, torch.full((6,), 1 / 6), atol=0.025, rtol=0)


@pytest.mark.parametrize("draw", ["reservoir", "permute"])
def test_random_routing_among_those_left(context_of, draw):
    router, logits_TE = router_of(), torch.randn(600, 6)
    stats = SiteStats(torch.randn(50, 6), 1.0, torch.ones(6) / 6)
    p = Compose((DropExperts(ids=[0, 5]), RandomRouting(draw=draw)))
    _, got = decide(router, p, logits_TE, context_of, stats=stats)
    assert (got.logits_TE == -INF).all(0).tolist() == [True, False, False, False, False, True]
    assert DenseRouting(got).count_T.eq(2).all()
    if draw == "permute":
        kept = slice(1, 5)
        assert got.logits_TE[:, kept].sort().values.equal(logits_TE[:, kept].sort().values)


# ---- quantize


def test_quantize_to_floats(context_of):
    logits_TE = 30 * torch.randn(100, 6)
    logits_TE[0] = torch.tensor([-1e30, -1000.0, 0.0, 1e-30, 1000.0, 3e38])
    _, ctx = context_of(router_of(), logits_TE)
    assert Quantize()(logits_TE, ctx)[1:].equal(logits_TE[1:].bfloat16().float())
    fp8 = Quantize("fp8")(logits_TE, ctx)
    assert fp8[0].tolist() == [-448, -448, 0, 0, 448, 448]  # e4m3 has no infinity
    assert fp8[1:].equal(logits_TE[1:].to(torch.float8_e4m3fn).float())
    assert Quantize()(logits_TE, ctx).isfinite().all()


@pytest.mark.parametrize("bits", [1, 3, 8, 24])
def test_quantize_to_levels(context_of, bits):
    logits_TE = torch.randn(200, 6)
    logits_TE[:, 4] = -INF
    logits_TE[0] = 2.0  # no range at all
    _, ctx = context_of(router_of(), logits_TE)
    got = Quantize(bits)(logits_TE, ctx)
    assert (got == -INF).equal(logits_TE == -INF)
    assert got[0].equal(logits_TE[0])
    finite = logits_TE[1:, [0, 1, 2, 3, 5]]
    low, high = finite.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rounded = got[1:, [0, 1, 2, 3, 5]]
    assert ((rounded - finite).abs() <= step * 0.5001 + 1e-6).all()
    level = (rounded - low) / step
    assert (level - level.round()).abs().max() < 1e-2 * max(1, 2 ** (bits - 20) * 100)
    torch.testing.assert_close(rounded.aminmax(dim=-1, keepdim=True), (low, high))


# ---- the point


@pytest.mark.parametrize(
    "p",
    [
        *(GaussianNoise(2.0), GumbelNoise(1.0), Temperature(2.0), SwapRanks(1, 4)),
        *(RandomRouting(), RandomRouting(draw="permute"), DropUnchosen(2)),
    ],
    ids=str,
)
def test_points_agree_where_weights_are_renormalized(context_of, p):
    """paper.md: K > 1, renormalized, softmax."""
    router, logits_TE = router_of(), torch.randn(200, 6)
    stats = SiteStats(torch.randn(20, 6), 1.0, torch.ones(6) / 6)
    before = decide(router, p, logits_TE, context_of, stats=stats)[1]
    after = decide(router, p, logits_TE, context_of, "scores", stats=stats)[1]
    torch.testing.assert_close(DenseRouting(before).weights_TE, DenseRouting(after).weights_TE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_noise_without_measure_is_finite_at_both_points(context_of, options):
    for point in POINTS:
        p = GaussianNoise(1e6, scale="absolute")
        _, got = decide(router_of(**options), p, torch.randn(100, 6), context_of, point)
        assert got.weights_TK.isfinite().all()
        assert (DenseRouting(got).count_T > 0).all()
