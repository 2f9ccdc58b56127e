"""Perturbations that take experts away: what each does."""

import math

import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.measure.intervene import perturbed
from analysis.perturb.base import chosen_mask
from analysis.perturb.compound import Compose
from analysis.perturb.condition import POINTS
from analysis.perturb.context import SiteStats
from analysis.perturb.logits import GaussianNoise
from analysis.perturb.masks import DropChosen, DropExperts, DropTop, DropUnchosen, KeepRanks

from ..routers import OPTIONS, decide, router_of, routings

POINT = pytest.mark.parametrize("point", POINTS)
INF = math.inf


def masked(routing):
    return routing.logits_TE == -INF


# ---- DropTop


def test_drop_top_is_a_mask(context_of):
    router = router_of()
    logits_TE = torch.tensor([[0.0, 5, 1, 4, 2, 3], [2.0, 2, 2, 2, 1, 0]])
    _, got = decide(router, DropTop(2), logits_TE, context_of)
    masked_TE = torch.tensor([[0.0, -INF, 1, -INF, 2, 3], [-INF, -INF, 2, 2, 1, 0]])
    assert got.logits_TE.equal(masked_TE)  # ties: the lower index is dropped first
    assert got.ids_TK.tolist() == [[5, 4], [2, 3]]
    assert all(map(torch.equal, got, router.route(masked_TE)))


@pytest.mark.parametrize(("ratio", "m"), [(0.0, 0), (0.25, 2), (0.5, 3), (2 / 3, 4), (1.0, 6)])
def test_drop_top_by_ratio(context_of, ratio, m):
    router, logits_TE = router_of(), torch.randn(20, 6)
    a = decide(router, DropTop(ratio=ratio), logits_TE, context_of)[1]
    b = decide(router, DropTop(m), logits_TE, context_of)[1]
    assert all(map(torch.equal, a, b))


@POINT
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dropping_all_leaves_nothing(context_of, point, options):
    router = router_of(**options)
    _, got = decide(router, DropTop(6), torch.randn(4, 6), context_of, point)
    assert (got.weights_TK == 0).all()
    _, got = decide(router, DropTop(5), torch.randn(4, 6), context_of, point)
    assert ((got.weights_TK > 0).sum(-1) == 1).all()


def test_one_mask_after_the_other(context_of):
    """Each drops the best of those that are left."""
    router, logits_TE = router_of(), torch.randn(20, 6)
    twice = decide(router, Compose((DropTop(1), DropTop(2))), logits_TE, context_of)[1]
    assert all(map(torch.equal, twice, decide(router, DropTop(3), logits_TE, context_of)[1]))


def test_golden_top1_disabled(golden):
    """Against outputs of the authors' code, with the router's first choice masked everywhere."""
    from cartmoe.reference import from_reference

    weights, config, expected = golden
    model = from_reference(weights, config)
    with perturbed(model, DropTop(1)):
        got = model(expected["input_ids"])
    torch.testing.assert_close(got, expected["logits_disable_top1"], rtol=0, atol=1e-5)


# ---- KeepRanks


def test_keep_ranks(context_of):
    router = router_of()
    logits_TE = torch.tensor([[0.0, 5, 1, 4, 2, 3], [2.0, 2, 2, 2, 1, 0]])
    _, got = decide(router, KeepRanks((2, 5)), logits_TE, context_of)
    kept_TE = torch.tensor([[-INF, -INF, 1, 4, -INF, -INF], [-INF, 2, -INF, -INF, 1, -INF]])
    assert got.logits_TE.equal(kept_TE)
    assert got.ids_TK.tolist() == [[3, 2], [1, 4]]


@POINT
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_keep_ranks_and_drop_top_are_complements(context_of, options, point):
    router, logits_TE = router_of(**options), torch.randn(30, 6)
    kept = decide(router, KeepRanks((3, 4, 5, 6)), logits_TE, context_of, point)[1]
    rest = decide(router, DropTop(2), logits_TE, context_of, point)[1]
    assert all(map(torch.equal, kept, rest))


def test_keeping_fewer_than_k_ranks(context_of):
    clean, got = decide(router_of(), KeepRanks((1,)), torch.randn(30, 6), context_of)
    assert DenseRouting(got).count_T.eq(1).all()
    assert got.ids_TK[:, 0].equal(clean.ids_TK[:, 0])
    assert got.weights_TK[:, 0].eq(1).all()


# ---- DropExperts


@POINT
def test_dead_for_every_token(context_of, point):
    router, logits_TE = router_of(), torch.randn(200, 6)
    _, got = decide(router, DropExperts(0.5), logits_TE, context_of, point)
    dead_E = (got.scores_TE == 0).all(0)
    assert dead_E.sum() == 3
    assert not DenseRouting(got).used_TE[:, dead_E].any()
    assert (got.scores_TE[:, ~dead_E] > 0).all()


def test_the_random_dead_nest_and_depend_on_seed_and_site(model_of):
    model = model_of("cartesian")

    def dead(fraction, seed=0):
        _, decisions = routings(model, DropExperts(fraction), seed=seed)
        return [frozenset(masked(r).all(0).nonzero()[:, 0].tolist()) for r in decisions.values()]

    two, four = dead(1 / 3), dead(2 / 3)
    assert [len(d) for d in two + four] == [2] * 4 + [4] * 4
    assert all(a < b for a, b in zip(two, four, strict=True))
    assert len(set(two)) > 1
    assert dead(1 / 3, seed=1) != two
    assert all(len(d) == 6 for d in dead(1.0))


def test_random_dead_are_any():
    from analysis.perturb.noise import Noise

    nothing = torch.zeros(1, dtype=torch.int64)
    counts_E = torch.zeros(8)
    for seed in range(4000):
        order_E = Noise(seed, (0, 0), nothing, nothing, {}).of_experts(8, "dead").argsort()
        counts_E[order_E[:2]] += 1
    torch.testing.assert_close(counts_E / 4000, torch.full((8,), 0.25), atol=0.03, rtol=0)


def test_dead_by_load(context_of):
    load_E = torch.tensor([0.1, 0.3, 0.05, 0.2, 0.2, 0.15])
    stats = SiteStats(torch.randn(5, 6), 1.0, load_E)
    for which, dead in (("most_used", [1, 3]), ("least_used", [0, 2])):
        p = DropExperts(1 / 3, which)
        _, got = decide(router_of(), p, torch.randn(9, 6), context_of, stats=stats)
        assert masked(got).all(0).nonzero()[:, 0].tolist() == dead


def test_dead_by_name_of_router(model_of):
    """A layer's, a stage's and a router's own lists add up; routers without any stay whole."""
    model = model_of("cartesian")
    name = model.sites()[3].name
    ids = {"layer 0": [1], "layer 0 stage 1": [4, 5], name: [0]}
    _, decisions = routings(model, DropExperts(ids=ids))
    dead = [masked(r).all(0).nonzero()[:, 0].tolist() for r in decisions.values()]
    assert dead == [[1], [1, 4, 5], [], [0]]
    _, everywhere = routings(model, DropExperts(ids=[2]))
    assert all(masked(r).all(0).nonzero().tolist() == [[2]] for r in everywhere.values())


def test_a_wrong_name_of_a_router_is_found_before_the_model_runs(model_of):
    model = model_of("cartesian")
    with pytest.raises(ValueError, match="a router of ids is 'layer 7'; choose one of 'layer 0'"):
        perturbed(model, DropExperts(ids={"layer 0": [1], "layer 7": [1]})).__enter__()


# ---- the controls


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drop_chosen_and_unchosen(context_of, options):
    router, logits_TE = router_of(**options), torch.randn(400, 6)
    clean, inside = decide(router, DropChosen(1), logits_TE, context_of)
    _, outside = decide(router, DropUnchosen(1), logits_TE, context_of)
    used_TE = chosen_mask(clean)
    dropped_in, dropped_out = masked(inside), masked(outside)
    assert (dropped_in.sum(-1) == 1).all()
    assert not (dropped_in & ~used_TE).any()
    assert (dropped_out.sum(-1) == 1).all()
    assert not (dropped_out & used_TE).any()
    # Any one in use, not the best: each with the same chance.
    chance_TE = used_TE / used_TE.sum(-1, keepdim=True)
    best_T1 = clean.ids_TK[:, :1]
    first, expected = (
        m.gather(-1, best_T1).double().mean().item() for m in (dropped_in, chance_TE)
    )
    assert first == pytest.approx(expected, abs=0.08)
    shares_E = dropped_out.sum(0) / (~used_TE / (~used_TE).sum(-1, keepdim=True)).sum(0)
    torch.testing.assert_close(shares_E, torch.ones(6), atol=0.35, rtol=0)


def test_fewer_than_m_to_drop(context_of):
    router, logits_TE = router_of(), torch.randn(50, 6)
    clean, got = decide(router, DropChosen(5), logits_TE, context_of)
    assert masked(got).equal(chosen_mask(clean))
    clean, got = decide(router, DropUnchosen(5), logits_TE, context_of)
    assert masked(got).equal(~chosen_mask(clean))
    assert got.ids_TK.equal(clean.ids_TK)
    clean, got = decide(router, DropChosen(6), logits_TE, context_of)
    assert masked(got).equal(chosen_mask(clean))


def test_chosen_leaves_out_unused_slots(context_of):
    """With top_p all experts have a slot; only those with weight are chosen."""
    router = router_of(top_p=0.4)
    logits_TE = torch.tensor([[9.0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 0]])
    clean, got = decide(router, DropChosen(6), logits_TE, context_of)
    assert chosen_mask(clean).sum(-1).tolist() == [1, 2]
    assert masked(got).sum(-1).tolist() == [1, 2]


def test_the_control_drops_others_than_a_mask_before_it(context_of):
    """Of what is out already there is nothing to drop: the number is kept."""
    mask = DropExperts(ids=[0, 1])
    for control in (DropChosen(1), DropUnchosen(1)):
        p = Compose((mask, control))
        _, got = decide(router_of(), p, torch.randn(100, 6), context_of)
        assert (masked(got).sum(-1) == 3).all()


# ---- the point


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("p", [DropTop(1), KeepRanks((2, 3)), DropExperts(0.5)], ids=str)
def test_masks_are_exact_after_the_score(context_of, options, p):
    """Scores of the others stay, bit by bit: nothing is normalized anew."""
    router, logits_TE = router_of(**options), torch.randn(50, 6)
    _, got = decide(router, p, logits_TE, context_of)
    gone_TE = masked(got)
    clean, got = decide(router, p, logits_TE, context_of, "scores")
    assert got.scores_TE.equal(clean.scores_TE.masked_fill(gone_TE, 0))
    assert got.logits_TE is clean.logits_TE


def test_a_score_of_zero_stays(context_of):
    logits_TE = torch.tensor([[500.0, 0, 1, 2, 3, -500]])  # zeros after a softmax
    for p in (DropTop(1), GaussianNoise(1.0), DropUnchosen(2)):
        _, got = decide(router_of(), p, logits_TE, context_of, "scores")
        assert not got.scores_TE.isnan().any()
        assert (got.scores_TE[0, 1:] == 0).all()


def test_points_differ_with_top_p(context_of):
    """On random logits: 2.6 experts clean, 2.95 masked before, 4.39 after the softmax (E 16)."""
    router = router_of(16, top_p=0.4)
    logits_TE = torch.randn(4000, 16)
    clean, before = decide(router, DropTop(1), logits_TE, context_of)
    _, after = decide(router, DropTop(1), logits_TE, context_of, "scores")
    active = [DenseRouting(r).count_T.double().mean().item() for r in (clean, before, after)]
    assert active == pytest.approx([2.6, 2.95, 4.39], abs=0.1)
