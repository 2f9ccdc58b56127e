"""Conditions: where they act, which part of a decision they let through, what they are called."""

import json
import math

import pytest
import torch

from analysis.conditions import DOWNSTREAM, POINTS, Condition, Where
from analysis.doses import DenseRouting, certainty_of, change_of
from analysis.effects import EFFECTS
from analysis.perturb import DropTop, GaussianNoise, Identity, NoRouted, RandomRouting
from cartmoe.hooks import RouterSite
from cartmoe.routing import Router, Routing

ZERO = -math.inf


def site(layer=0, stage=0):
    return RouterSite(f"blocks.{layer}.ffn.stages.{stage}.router", layer, stage, 6, 2)


# ---- where


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("all", Where()),
        ("layer 2", Where(2)),
        ("stage 0", Where(stage=0)),
        ("layer 12 stage 1", Where(12, 1)),
        ("positions 0:16", Where(positions=(0, 16))),
        ("stage 1 positions 3:4", Where(stage=1, positions=(3, 4))),
        ("layer 0 stage 1 positions 8:256", Where(0, 1, (8, 256))),
    ],
)
def test_where_round_trip(text, where):
    assert Where.parse(text) == where
    assert str(where) == text
    assert Where.parse(where) is where


@pytest.mark.parametrize(
    "text",
    ["", " ", "layers 2", "layer", "layer -1", "stage 0 layer 1", "all stage 0", "positions 3",
     "positions 5:5", "positions 9:2", "Layer 1", 3, None, ["all"]],
    ids=repr,
)  # fmt: skip
def test_where_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"^where is "):
        Where.parse(text)


def test_where_selects():
    sites = [site(layer, stage) for layer in (0, 2) for stage in (0, 1)]

    def chosen(text):
        return [(s.layer, s.stage) for s in sites if Where.parse(text)(s)]

    assert chosen("all") == chosen("positions 0:2") == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert chosen("layer 2") == [(2, 0), (2, 1)]
    assert chosen("stage 1") == [(0, 1), (2, 1)]
    assert chosen("layer 2 stage 0") == [(2, 0)]
    assert chosen("layer 1") == []


# ---- identity of a condition

CONDITIONS = [
    Condition(Identity()),
    Condition(DropTop(2), "stage 1", "scores", "no_refill", "replay", 3),
    Condition(DropTop(ratio=0.25)),
    Condition(GaussianNoise(0.5, scale="site", within="chosen"), "positions 0:4"),
    Condition(RandomRouting(0.5, draw="permute"), eval_seed=7),
    Condition(NoRouted(), "layer 0 stage 0"),
]


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_condition_round_trip(condition):
    assert Condition.from_dict(condition.to_dict()) == condition
    assert Condition.from_dict(json.loads(condition.id)) == condition
    assert Condition.from_dict(json.loads(condition.id)).id == condition.id


def test_ids_are_canonical():
    assert len({c.id for c in CONDITIONS}) == len(CONDITIONS)
    same = [GaussianNoise(1), GaussianNoise(1.0), GaussianNoise(torch.tensor(1.0).numpy()[()])]
    assert len({Condition(p).id for p in same}) == len({Condition(p) for p in same}) == 1
    assert Condition(DropTop(), Where(stage=1)) == Condition(DropTop(1), "stage 1")
    shuffled = dict(reversed(CONDITIONS[1].to_dict().items()))
    assert Condition.from_dict(shuffled).id == CONDITIONS[1].id


@pytest.mark.parametrize(
    "change",
    [
        dict(perturbation=DropTop(2)),
        dict(where="stage 0"),
        dict(point="scores"),
        dict(effect="weights"),
        dict(downstream="replay"),
        dict(eval_seed=1),
    ],
    ids=str,
)
def test_every_field_counts(change):
    plain = dict(perturbation=DropTop(1))
    assert Condition(**plain | change).id != Condition(**plain).id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(point="logit"), "point is 'logit'; choose one of 'logits', 'scores'"),
        (dict(effect="half"), "effect is 'half'; choose one of 'full', 'selection', 'weights', "),
        (dict(downstream="redo"), "downstream is 'redo'; choose one of 'reroute', 'replay'"),
        (dict(where="top"), "where is 'top'"),
        (dict(eval_seed="a"), "eval_seed is 'a'; it must be a whole number"),
        (dict(eval_seed=0.5), "eval_seed is 0.5"),
    ],
)
def test_wrong_fields(change, message):
    with pytest.raises(ValueError, match=message):
        Condition(DropTop(1), **change)


def test_columns_name_it():
    columns = CONDITIONS[1].columns()
    assert columns == {
        "condition": CONDITIONS[1].id,
        "perturbation": "DropTop",
        "strength": 2.0,
        "where": "stage 1",
        "point": "scores",
        "effect": "no_refill",
        "downstream": "replay",
        "eval_seed": 3,
    }


# ---- effects, on decisions written by hand


def routing(ids, weights, scores=None):
    ids_TK, weights_TK = torch.tensor([ids]), torch.tensor([weights])
    scores_TE = torch.zeros(1, 4) if scores is None else torch.tensor([scores])
    return Routing(scores_TE.log(), scores_TE, ids_TK, weights_TK)


R = routing([0, 1], [0.75, 0.25], [0.6, 0.2, 0.1, 0.1])  # clean
DROPPED = routing([1, 2], [2 / 3, 1 / 3], [0.0, 0.5, 0.25, 0.25])  # expert 0 masked
LOWERED = routing([1, 0], [0.6, 0.4], [0.2, 0.3, 0.25, 0.25])  # 0 and 1 change places
ONE_LEFT = routing([3, 0], [1.0, 0.0], [0.0, 0.0, 0.0, 1.0])


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
    ],
)
def test_effects(effect, changed, expected):
    got = EFFECTS[effect](R, changed, Router(None, 4, 2))
    assert DenseRouting(got).weights_TE[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        ("full", [0, 0.5, 0, 0]),
        ("selection", [0, 0.35, 0, 0]),  # R uses two, R' one
        ("weights", [0, 0.5, 0, 0]),  # R's experts, whatever the running sum says
        ("no_refill", [0, 0.25, 0, 0]),
    ],
)
def test_effects_with_top_p(effect, expected):
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
@pytest.mark.parametrize(
    "options", [{}, dict(top_p=0.4), dict(renormalize=False), dict(score="sigmoid")], ids=str
)
def test_no_effect_without_a_change(effect, options):
    router, logits_TE = Router(None, 6, 2, **options), torch.randn(200, 6)
    clean, again = router.route(logits_TE), router.route(logits_TE.clone())
    got = EFFECTS[effect](clean, again, router)
    assert DenseRouting(got).weights_TE.equal(DenseRouting(clean).weights_TE)


@pytest.mark.parametrize("effect", EFFECTS)
def test_no_routed_under_every_effect(effect):
    """It perturbs no logits, and still has an effect: its own weights are what counts."""
    router = Router(None, 4, 2)
    got = Condition(NoRouted(), effect=effect).apply(R, router, None)
    assert (got.weights_TK == 0).all()


# ---- applying


@pytest.mark.parametrize("point", POINTS)
def test_positions_bound_the_change(context_of, point):
    router, logits_TE = Router(None, 6, 2), torch.randn(10, 6)
    clean, ctx = context_of(router, logits_TE)
    some = Condition(DropTop(1), "positions 3:7", point).apply(clean, router, ctx)
    everywhere = Condition(DropTop(1), point=point).apply(clean, router, ctx)
    for a, b, c in zip(some, clean, everywhere, strict=True):
        assert a[:3].equal(b[:3])
        assert a[7:].equal(b[7:])
        assert a[3:7].equal(c[3:7])


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("downstream", DOWNSTREAM)
def test_identity_is_the_very_decision(context_of, effect, downstream):
    router = Router(None, 6, 2)
    clean, ctx = context_of(router, torch.randn(5, 6))
    condition = Condition(Identity(), effect=effect, downstream=downstream)
    assert condition.apply(clean, router, ctx) is clean


def test_a_plain_function_serves(context_of):
    router = Router(None, 6, 2)
    clean, ctx = context_of(router, torch.randn(5, 6))
    got = Condition(lambda logits_TE, ctx: -logits_TE).apply(clean, router, ctx)
    assert all(map(torch.equal, got, router.route(-clean.logits_TE)))


# ---- doses


def test_doses():
    lost = routing([1, 2], [0.25, 0.0], [0.0, 0.5, 0.25, 0.25])
    r, dropped, half = map(DenseRouting, (R, DROPPED, lost))
    got = {name: value.item() for name, value in change_of(r, dropped, r).items()}
    assert got == pytest.approx(
        dict(flips=0.5, flips_total=0.5, changed=1, mass_moved=0.75, mass_lost=0.75, active=2)
    )
    got = {name: value.item() for name, value in change_of(r, half, dropped).items()}
    assert got == pytest.approx(
        dict(flips=0.5, flips_total=0.5, changed=1, mass_moved=0.375, mass_lost=0.75, active=1)
    )
    nothing = change_of(r, r, r)
    assert all(nothing[name] == 0 for name in nothing.keys() - {"active"})


def test_an_expert_in_two_slots_counts_once():
    twice = DenseRouting(routing([2, 2], [0.5, 0.25]))
    assert twice.weights_TE.tolist() == [[0, 0, 0.75, 0]]
    assert twice.count_T == 1


def test_certainty():
    router = Router(None, 4, 2)
    clean = router.route(torch.tensor([[1.0, 4.0, 2.5, 0.0]]))
    got = certainty_of(clean, DenseRouting(clean))
    assert got["margin"].item() == pytest.approx(1.5)
    p = clean.scores_TE
    assert got["entropy"].item() == pytest.approx(-(p * p.log()).sum().item())
    uses_all = Router(None, 4, 4).route(clean.logits_TE)
    assert certainty_of(uses_all, DenseRouting(uses_all))["margin"] == 0


@pytest.mark.parametrize("wrong", ["DropTop", DropTop, None, 3])
def test_what_is_no_perturbation_is_refused_with_the_choices(wrong):
    with pytest.raises(ValueError, match=r"perturbation is .*DropTop\(1\), of Identity"):
        Condition(wrong)
