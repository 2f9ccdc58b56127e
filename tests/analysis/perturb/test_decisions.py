"""Perturbations of the decision itself: what each does."""

import copy
import itertools

import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.perturb.condition import Condition
from analysis.perturb.context import RouterContext, Tokens
from analysis.perturb.decisions import (
    DropSlots,
    Lag,
    NoRouted,
    TopK,
    UniformWeights,
    fit,
    where_tokens,
)
from analysis.perturb.noise import Noise
from cartmoe.hooks import RouterSite

from ..routers import OPTIONS, TOKENS_BL, decide, router_of, routings

EACH_OPTIONS = pytest.mark.parametrize("options", OPTIONS, ids=str)


# ---- TopK


@EACH_OPTIONS
@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k(context_of, options, k):
    router = router_of(**options)
    clean, got = decide(router, TopK(k), torch.randn(50, 6), context_of)
    assert got.ids_TK.shape == got.weights_TK.shape == (50, k)
    expected_TK = clean.scores_TE.topk(k)
    assert got.ids_TK.equal(expected_TK.indices)
    weights_TK = expected_TK.values
    if router.renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(got.weights_TK, weights_TK)
    assert got.scores_TE is clean.scores_TE


def test_top_k_of_the_routers_own_number_is_its_decision(context_of):
    clean, got = decide(router_of(K=3), TopK(3), torch.randn(50, 6), context_of)
    assert all(map(torch.equal, clean, got))


def test_top_k_chooses_as_the_router_does(context_of):
    """A bias counts for choosing, and not for weighing."""
    router = router_of(score="sigmoid", bias=[9.0, 0, 0, 0, 0, 8.0])
    _, got = decide(router, TopK(2), torch.randn(50, 6), context_of)
    assert got.ids_TK.eq(torch.tensor([0, 5])).all()
    _, one = decide(router, TopK(1), torch.randn(50, 6), context_of)
    assert one.ids_TK.eq(0).all()
    torch.testing.assert_close(one.weights_TK, torch.ones(50, 1))


# ---- DropSlots


@EACH_OPTIONS
def test_drop_slots(context_of, options):
    router, logits_TE = router_of(K=3, **options), torch.randn(3000, 6)
    clean, got = decide(router, DropSlots(0.3), logits_TE, context_of)
    used_TK, kept_TK = clean.weights_TK != 0, got.weights_TK != 0
    assert got.ids_TK.equal(clean.ids_TK)
    assert got.weights_TK.equal(clean.weights_TK * kept_TK)  # lost, and not refilled
    assert kept_TK[used_TK].double().mean() == pytest.approx(0.7, abs=0.02)
    _, full = decide(router, DropSlots(0.3, renormalize=True), logits_TE, context_of)
    assert (full.weights_TK != 0).equal(kept_TK)
    sums_T = clean.weights_TK.sum(-1).where(kept_TK.any(-1), torch.tensor(0.0))
    torch.testing.assert_close(full.weights_TK.sum(-1), sums_T)
    shares = got.weights_TK / got.weights_TK.sum(-1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(full.weights_TK, shares * sums_T[:, None])


def test_slots_are_lost_independently(context_of):
    _, got = decide(router_of(K=2), DropSlots(0.5), torch.randn(8000, 6), context_of)
    left = (got.weights_TK != 0).sum(-1).bincount(minlength=3) / 8000
    torch.testing.assert_close(left, torch.tensor([0.25, 0.5, 0.25]), atol=0.025, rtol=0)


def test_higher_probabilities_lose_more_of_the_same(context_of):
    router, logits_TE = router_of(K=3), torch.randn(500, 6)
    few, many = (
        decide(router, DropSlots(p), logits_TE, context_of)[1].weights_TK == 0 for p in (0.2, 0.6)
    )
    assert not (few & ~many).any()
    _, all_lost = decide(router, DropSlots(1.0, renormalize=True), logits_TE, context_of)
    assert (all_lost.weights_TK == 0).all()


# ---- UniformWeights, NoRouted


@EACH_OPTIONS
def test_uniform_weights(context_of, options):
    router, logits_TE = router_of(K=3, **options), torch.randn(200, 6)
    clean, even = decide(router, UniformWeights(), logits_TE, context_of)
    _, half = decide(router, UniformWeights(0.5), logits_TE, context_of)
    used_TK = clean.weights_TK != 0
    mean_T1 = clean.weights_TK.sum(-1, keepdim=True) / used_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(even.weights_TK, mean_T1 * used_TK)
    torch.testing.assert_close(half.weights_TK, (clean.weights_TK + even.weights_TK) / 2)
    for got in (even, half):
        assert got.ids_TK.equal(clean.ids_TK)
        assert (got.weights_TK != 0).equal(used_TK)
        torch.testing.assert_close(got.weights_TK.sum(-1), clean.weights_TK.sum(-1))


@pytest.mark.parametrize("kind", ["smoe", "top_p", "cartesian"])
def test_no_routed_is_experts_that_give_nothing(model_of, kind):
    model = model_of(kind)
    out, decisions = routings(model, NoRouted())
    assert all((r.weights_TK == 0).all() for r in decisions.values())
    mute = copy.deepcopy(model.model)
    for name, weights in mute.named_parameters():
        if name.endswith("experts.down_EDF"):
            torch.nn.init.zeros_(weights)
    with torch.no_grad():
        torch.testing.assert_close(out, mute(TOKENS_BL))


# ---- Lag


def context_over(clean, B, L, own=None):
    tokens = Tokens.of(torch.zeros(B, L, dtype=torch.int64), torch.arange(B))
    noise = Noise(0, (0, 0), tokens.sequence_T, tokens.position_T, {})
    site = RouterSite("here", 4, 0, clean.logits_TE.shape[-1], 2)
    return RouterContext(site, clean, None, tokens, noise, own=own or {})


@pytest.mark.parametrize("n", [1, 3, 7])
def test_lag_over_tokens(n):
    """Row by row: the decision of the token n before in the same sequence."""
    B, L, router = 3, 5, router_of()
    clean = router.route(torch.randn(B * L, 6))
    got = Condition(Lag(n)).apply(clean, router, context_over(clean, B, L))
    for b in range(B):
        for t in range(L):
            source = b * L + (t - n if t >= n else t)
            for new, old in zip(got, clean, strict=True):
                assert new[b * L + t].equal(old[source])


def test_lag_over_sites():
    """Of the nth site before that has as many experts, what its router came to of itself."""
    router = router_of()
    clean = router.route(torch.randn(4, 6))
    widths = [6, 8, 6, 6, 8]
    own = {
        RouterSite(f"s{i}", i, 0, E, 2): router_of(E).route(torch.randn(4, E))
        for i, E in enumerate(widths)
    }
    alike = [r for s, r in own.items() if s.num_experts == 6]
    for n, expected in ((1, alike[2]), (2, alike[1]), (3, alike[0]), (4, clean)):
        ctx = context_over(clean, 1, 4, own)
        assert Condition(Lag(n, "sites")).apply(clean, router, ctx) is expected


def test_lags_over_sites_do_not_add_up(model_of):
    """Every router uses what the one before decided on its own input, not what was imposed on
    that one: else all of them would repeat the first."""
    model, own = model_of("cartesian"), {}
    with model.hooked(router=lambda routing, router, site, x: own.update({site: routing})):
        _, taken = routings(model, Lag(over="sites"))
    sites = model.sites()
    assert taken[sites[0]].ids_TK.equal(own[sites[0]].ids_TK)
    for before, site in itertools.pairwise(sites):
        assert all(map(torch.equal, taken[site], own[before]))


def test_lag_of_another_number_of_experts_is_none(context_of):
    clean, got = decide(router_of(), Lag(1, "sites"), torch.randn(5, 6), context_of)
    assert got is clean


# ---- decisions of several widths


def test_fit():
    rows = torch.tensor([[1.0, 2.0]])
    assert fit(rows, 2) is rows
    assert fit(rows, 4).tolist() == [[1, 2, 0, 0]]
    assert fit(rows, 1).tolist() == [[1]]


@pytest.mark.parametrize("k", [1, 4])
def test_where_tokens(context_of, k):
    """Decisions that use another number of slots, for some tokens."""
    router, logits_TE = router_of(), torch.randn(10, 6)
    clean, other = decide(router, TopK(k), logits_TE, context_of)
    inside_T = torch.arange(10) % 3 == 0
    mixed = DenseRouting(where_tokens(inside_T, other, clean)).weights_TE
    a, b = DenseRouting(other).weights_TE, DenseRouting(clean).weights_TE
    assert mixed.equal(torch.where(inside_T[:, None], a, b))
    everywhere, ctx = context_of(router, logits_TE)
    got = Condition(TopK(k), "positions 0:3").apply(everywhere, router, ctx)
    assert DenseRouting(got).weights_TE[3:].equal(b[3:])
    assert DenseRouting(got).weights_TE[:3].equal(a[:3])
