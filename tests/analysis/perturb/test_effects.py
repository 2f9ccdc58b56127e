"""Which part of a changed decision is let through: by hand, and by definition."""

import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.perturb.condition import Condition
from analysis.perturb.decisions import DropSlots, Lag, NoRouted, TopK, UniformWeights
from analysis.perturb.effects import COALITIONS, EFFECTS, PARTS, _part
from analysis.perturb.logits import GaussianNoise
from analysis.perturb.masks import DropTop
from cartmoe.routing import Router, Routing

from ..routers import router_of

BIAS = [0.5, -0.5, 0.0, 0.3, -0.2, 0.1]
ROUTERS = [
    dict(),
    dict(K=1, renormalize=False),
    dict(K=3),
    dict(top_p=0.4, renormalize=False),
    dict(top_p=0.6, renormalize=True),
    dict(renormalize=False),
    dict(score="sigmoid", bias=BIAS),
]
EACH_ROUTER = pytest.mark.parametrize("options", ROUTERS, ids=str)
EACH_COALITION = pytest.mark.parametrize("name", COALITIONS)
CHANGES = [
    *(DropTop(1), DropTop(6), GaussianNoise(1.0), NoRouted(), UniformWeights(), DropSlots(0.5)),
    *(TopK(1), TopK(4), Lag(1)),
]
EACH_CHANGE = pytest.mark.parametrize("p", CHANGES, ids=str)


def routing(ids, weights, scores=None):
    ids_TK, weights_TK = torch.tensor([ids]), torch.tensor([weights])
    scores_TE = torch.zeros(1, 4) if scores is None else torch.tensor([scores])
    return Routing(scores_TE.log(), scores_TE, ids_TK, weights_TK)


R = routing([0, 1], [0.75, 0.25], [0.6, 0.2, 0.1, 0.1])  # clean
DROPPED = routing([1, 2], [2 / 3, 1 / 3], [0.0, 0.5, 0.25, 0.25])  # expert 0 masked
LOWERED = routing([1, 0], [0.6, 0.4], [0.2, 0.3, 0.25, 0.25])  # 0 and 1 change places
ONE_LEFT = routing([3, 0], [1.0, 0.0], [0.0, 0.0, 0.0, 1.0])
# Of the same scores: other experts with half the mass; the first slot gone.
HALVED = R._replace(ids_TK=torch.tensor([[2, 1]]), weights_TK=torch.tensor([[0.3, 0.2]]))
LOST = R._replace(weights_TK=torch.tensor([[0.0, 0.25]]))


@pytest.mark.parametrize(
    ("effect", "changed", "expected"),
    [
        ("full", DROPPED, [0, 2 / 3, 1 / 3, 0]),
        ("selection", DROPPED, [0, 0.75, 0.25, 0]),
        ("weights", DROPPED, [0, 1, 0, 0]),  # drop and renormalize
        ("no_refill", DROPPED, [0, 0.25, 0, 0]),  # drop and lose
        ("full", LOWERED, [0.4, 0.6, 0, 0]),
        ("selection", LOWERED, [0.25, 0.75, 0, 0]),
        ("weights", LOWERED, [0.4, 0.6, 0, 0]),
        ("no_refill", LOWERED, [0.75, 0.25, 0, 0]),
        ("full", ONE_LEFT, [0, 0, 0, 1]),
        ("selection", ONE_LEFT, [0, 0, 0, 0.75]),  # as many as both have
        ("weights", ONE_LEFT, [0, 0, 0, 0]),
        ("no_refill", ONE_LEFT, [0, 0, 0, 0]),
        ("selection", LOST, [0, 0.75, 0, 0]),  # the only one left is the first of R'
        ("weights", LOST, [0, 0.25, 0, 0]),
        ("no_refill", LOST, [0, 0.25, 0, 0]),
        # Coalitions: of R' the parts named, of R the others.
        ("part set", DROPPED, [0, 0.75, 0.25, 0]),
        ("part weights", DROPPED, [0, 1, 0, 0]),
        ("part mass", DROPPED, [0.75, 0.25, 0, 0]),  # both have 1
        ("part set+weights", DROPPED, [0, 2 / 3, 1 / 3, 0]),
        ("part set+mass", DROPPED, [0, 0.75, 0.25, 0]),
        ("part weights+mass", DROPPED, [0, 1, 0, 0]),
        ("part set", HALVED, [0, 0.25, 0.75, 0]),  # mass 1, in shares of 3 : 1
        ("part weights", HALVED, [0, 1, 0, 0]),  # 1 is R's only one that R' weighs
        ("part mass", HALVED, [0.375, 0.125, 0, 0]),
        ("part set+weights", HALVED, [0, 0.4, 0.6, 0]),
        ("part set+mass", HALVED, [0, 0.125, 0.375, 0]),
        ("part weights+mass", HALVED, [0, 0.5, 0, 0]),
        ("part weights", ONE_LEFT, [0.75, 0.25, 0, 0]),  # R' says nothing of R's experts
        ("part set", ONE_LEFT, [0, 0, 0, 1]),
    ],
)
def test_by_hand(effect, changed, expected):
    got = EFFECTS[effect](R, changed, Router(None, 4, 2))
    assert DenseRouting(got).weights_TE[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        ("full", [0, 0.5, 0, 0]),
        ("selection", [0, 0.35, 0, 0]),  # R uses two, R' one
        ("weights", [0, 0.5, 0, 0]),  # R's experts, whatever the running sum says
        ("no_refill", [0, 0.25, 0, 0]),
        ("part set", [0, 0.6, 0, 0]),
        ("part weights", [0, 0.6, 0, 0]),
        ("part mass", [0.5 * 0.35 / 0.6, 0.5 * 0.25 / 0.6, 0, 0]),
    ],
)
def test_with_top_p(effect, expected):
    """Weights are raw, and the number of experts is the decision's."""
    router = Router(None, 4, 2, top_p=0.4, renormalize=False)
    clean = routing([0, 1, 2, 3], [0.35, 0.25, 0.0, 0.0], [0.35, 0.25, 0.2, 0.2])
    changed = router.decide(clean.logits_TE, torch.tensor([[0.0, 0.5, 0.25, 0.25]]))
    got = EFFECTS[effect](clean, changed, router)
    assert DenseRouting(got).weights_TE[0].tolist() == pytest.approx(expected)


def test_selection_with_more_experts_than_clean():
    router = Router(None, 4, 2, top_p=0.9, renormalize=False)
    clean = routing([0, 1, 2, 3], [0.95, 0.0, 0.0, 0.0], [0.95, 0.03, 0.01, 0.01])
    changed = router.decide(clean.logits_TE, torch.tensor([[0.25, 0.25, 0.25, 0.25]]))
    assert DenseRouting(changed).count_T == 4
    got = EFFECTS["selection"](clean, changed, router)
    torch.testing.assert_close(DenseRouting(got).weights_TE, torch.tensor([[0.95, 0, 0, 0]]))


@pytest.mark.parametrize("effect", EFFECTS)
@EACH_ROUTER
def test_no_effect_without_a_change(effect, options):
    """Also with a bias, where the first choice need not have the largest weight."""
    router, logits_TE = router_of(**options), torch.randn(200, 6)
    clean, again = router.route(logits_TE), router.route(logits_TE.clone())
    got = EFFECTS[effect](clean, again, router)
    got_TE, clean_TE = DenseRouting(got).weights_TE, DenseRouting(clean).weights_TE
    if effect.startswith("part"):  # shares times mass: up to rounding
        torch.testing.assert_close(got_TE, clean_TE)
    else:
        assert got_TE.equal(clean_TE)


@pytest.mark.parametrize("effect", EFFECTS)
def test_no_routed_under_every_effect(effect, context_of):
    """It perturbs no logits, and still has an effect, but for how the weight is divided."""
    router, logits_TE = router_of(), torch.randn(10, 6)
    clean, ctx = context_of(router, logits_TE)
    got = Condition(NoRouted(), effect=effect).apply(clean, router, ctx)
    if effect == "part weights":
        torch.testing.assert_close(got.weights_TK, clean.weights_TK)
    else:
        assert (got.weights_TK == 0).all()


# ---- by definition


@pytest.fixture
def decisions(context_of):
    """decisions(options, p) -> router, R, R'"""

    def build(options, p):
        router = router_of(**options)
        clean, ctx = context_of(router, torch.randn(300, 6))
        return router, clean, Condition(p).apply(clean, router, ctx)

    return build


@EACH_ROUTER
@EACH_CHANGE
def test_selection(decisions, options, p):
    """R' uses its experts with R's weights, the largest for that which has the largest."""
    router, clean, changed = decisions(options, p)
    got = EFFECTS["selection"](clean, changed, router)
    new, after, before = map(DenseRouting, (got, changed, clean))
    fewer_T = torch.minimum(before.count_T, after.count_T)
    assert new.count_T.equal(fewer_T)
    assert not (new.used_TE & ~after.used_TE).any()
    want_TE = before.weights_TE.sort(descending=True).values
    want_TE = want_TE * (torch.arange(6) < fewer_T[:, None])
    torch.testing.assert_close(new.weights_TE.sort(descending=True).values, want_TE)
    # No expert that has less than another in R' gets more here.
    less_TEE = after.weights_TE[:, :, None] < after.weights_TE[:, None]
    more_TEE = new.weights_TE[:, :, None] > new.weights_TE[:, None]
    assert not (less_TEE & more_TEE).any()


@EACH_ROUTER
@EACH_CHANGE
def test_no_refill(decisions, options, p):
    router, clean, changed = decisions(options, p)
    got = DenseRouting(EFFECTS["no_refill"](clean, changed, router)).weights_TE
    expected = DenseRouting(clean).weights_TE * DenseRouting(changed).used_TE
    assert got.equal(expected)


@EACH_ROUTER
@EACH_CHANGE
def test_weights(decisions, options, p):
    """R's experts and no other."""
    router, clean, changed = decisions(options, p)
    got = DenseRouting(EFFECTS["weights"](clean, changed, router))
    assert not (got.used_TE & ~DenseRouting(clean).used_TE).any()
    if router.renormalize and changed.scores_TE is not clean.scores_TE:
        sums_T = got.weights_TE.sum(-1)
        assert torch.where(sums_T > 0, sums_T, 1).allclose(torch.ones(300))


@EACH_ROUTER
@EACH_CHANGE
def test_all_parts_are_the_whole_and_none_is_nothing(decisions, options, p):
    router, clean, changed = decisions(options, p)
    for parts, whole in ((frozenset(PARTS), changed), (frozenset(), clean)):
        got = _part(parts, clean, changed, router)
        torch.testing.assert_close(DenseRouting(got).weights_TE, DenseRouting(whole).weights_TE)


def test_coalitions_are_those_between():
    assert list(COALITIONS) == [
        "part set",
        "part weights",
        "part mass",
        "part set+weights",
        "part set+mass",
        "part weights+mass",
    ]
    assert COALITIONS.keys() < EFFECTS.keys()


@EACH_ROUTER
@EACH_CHANGE
@EACH_COALITION
def test_coalitions(decisions, options, p, name):
    """Each has the mass of the one it should have, and experts of the one it should have."""
    parts = COALITIONS[name]
    router, clean, changed = decisions(options, p)
    got = DenseRouting(EFFECTS[name](clean, changed, router))
    before, after = DenseRouting(clean), DenseRouting(changed)
    members, mass = (after if part in parts else before for part in ("set", "mass"))
    assert not (got.used_TE & ~members.used_TE).any()
    sums_T, want_T = got.weights_TE.sum(-1), mass.weights_TE.sum(-1)
    there_T = members.count_T > 0  # an empty set can carry no mass
    torch.testing.assert_close(sums_T[there_T], want_T[there_T])
    assert (sums_T[~there_T] == 0).all()
    if "weights" not in parts:  # the shares are R's
        fewer_T = torch.minimum(before.count_T, members.count_T)
        share_TE = before.weights_TE.sort(descending=True).values
        share_TE = share_TE * (torch.arange(6) < fewer_T[:, None])
        share_TE = share_TE / share_TE.sum(-1, keepdim=True).clamp(min=1e-9)
        got_TE = got.weights_TE.sort(descending=True).values
        torch.testing.assert_close(got_TE, share_TE * sums_T[:, None], rtol=1e-4, atol=1e-6)
    elif "set" in parts:
        torch.testing.assert_close(
            got.weights_TE * after.weights_TE.sum(-1, keepdim=True),
            after.weights_TE * sums_T[:, None],
        )


@pytest.mark.parametrize("part", PARTS)
def test_what_changes_one_part_alone_is_that_part(context_of, part):
    """Coalitions with it make the whole change, those without it none."""
    router = router_of(K=3)
    clean, ctx = context_of(router, torch.randn(100, 6))
    changed = {
        "set": clean._replace(ids_TK=5 - clean.ids_TK),  # others, at the same weights
        "weights": Condition(UniformWeights()).apply(clean, router, ctx),
        "mass": clean._replace(weights_TK=clean.weights_TK * 0.5),
    }[part]
    for name, coalition in COALITIONS.items():
        got = DenseRouting(EFFECTS[name](clean, changed, router)).weights_TE
        if part == "set" and coalition >= {"weights"} and "set" not in coalition:
            continue  # the shares of R's experts are those that R' gives them
        whole = DenseRouting(changed if part in coalition else clean).weights_TE
        torch.testing.assert_close(got, whole)
