"""Conditions: where they act, at which point, and what they are called."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from analysis.perturb.base import Identity, Perturbation
from analysis.perturb.compound import Compose, ResidualNoise
from analysis.perturb.condition import DOWNSTREAM, POINTS, Condition, perturb_scores
from analysis.perturb.context import Tokens
from analysis.perturb.decisions import NoRouted
from analysis.perturb.effects import EFFECTS
from analysis.perturb.logits import GaussianNoise, RandomRouting
from analysis.perturb.masks import DropTop
from analysis.perturb.where import KINDS, Where
from cartmoe.fields import declared
from cartmoe.hooks import RouterSite
from cartmoe.routing import Router

from ..routers import OPTIONS


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
        ("positions 3:", Where(positions=(3, None))),
        ("tokens digit", Where(tokens="digit")),
        ("layer 2 positions 0:4 tokens space", Where(2, None, (0, 4), "space")),
    ],
)
def test_where_round_trip(text, where):
    assert Where.parse(text) == where
    assert str(where) == text
    assert Where.parse(where) is where


@pytest.mark.parametrize(
    "text",
    ["", " ", "layers 2", "layer", "layer -1", "stage 0 layer 1", "all stage 0", "positions 3",
     "positions 5:5", "positions 9:2", "positions :4", "Layer 1", "layer 2stage 0",
     "layer 2  stage 0",
     "tokens", "tokens digits", "tokens digit letter", "tokens digit layer 2", 3, None, ["all"]],
    ids=repr,
)  # fmt: skip
def test_where_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"^where is "):
        Where.parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Where(tokens="digits"), "tokens is 'digits'; choose one of 'letter', 'digit'"),
        (lambda: Where(layer=0.0), "where.layer is 0.0; it must be a whole number"),
        (lambda: Where(stage=True), "where.stage is True; it must be a whole number"),
        (lambda: Where(positions=(-3, 2)), "first of where.positions is -3; it must be at least 0"),
        (lambda: Where(positions=(0, True)), "stop of where.positions is True"),
        (lambda: Where(positions=3), r"where.positions is 3; give \(first, stop\), stop None"),
        (lambda: Where(positions=(4, 2)), "is 'positions 4:2'; there is no such position"),
    ],
)
def test_where_made_by_hand_is_checked_too(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_where_takes_numbers_of_any_library():
    made = Where(np.int64(2), torch.tensor(1), [np.uint8(0), torch.tensor(3)])
    assert made == Where(2, 1, (0, 3))
    assert hash(made) == hash(Where(2, 1, (0, 3)))


def test_a_site_is_where_it_stands():
    assert Where.parse(site(2, 1)) == Where(2, 1)
    assert Condition(DropTop(1), site(0, 0)).where == Where(0, 0)


def test_where_of_tokens():
    """Positions and kinds, of a forward's tokens."""
    kinds_V = torch.tensor([KINDS.index(k) for k in ("letter", "digit", "digit", "space")])
    tokens_BL = torch.tensor([[0, 1, 2, 3], [3, 2, 0, 1]])
    tokens = Tokens.of(tokens_BL, torch.arange(2), kinds_V)

    def inside(text):
        return Where.parse(text).inside(tokens).view(2, 4).int().tolist()

    assert Where.parse("layer 2").inside(tokens) is None
    assert inside("positions 1:3") == [[0, 1, 1, 0], [0, 1, 1, 0]]
    assert inside("positions 3:") == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert inside("tokens digit") == [[0, 1, 1, 0], [0, 1, 0, 1]]
    assert inside("positions 2: tokens digit") == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert inside("tokens punctuation") == [[0] * 4] * 2
    with pytest.raises(ValueError, match="where is 'tokens digit'; kinds of tokens need a model"):
        Where.parse("tokens digit").inside(Tokens.of(tokens_BL, torch.arange(2)))


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
        (dict(point=["logits"]), r"point is \['logits'\]; choose one of"),
        (dict(effect="part all"), "'no_refill', 'part set', 'part weights', 'part mass', "),
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
        "expects": "selection",
        "name": "DropTop",
        "parameters": '{"m":2,"ratio":null}',
        "where": "stage 1",
        "point": "scores",
        "effect": "no_refill",
        "downstream": "replay",
        "eval_seed": 3,
    }


def test_a_class_that_derives_from_a_declared_one_is_declared_too():
    """Or nothing would check what its fields have."""

    @dataclass(frozen=True)
    class Mine(DropTop):
        extra: int = 0

    with pytest.raises(ValueError, match=r"decorate it with cartmoe\.fields\.declared"):
        Condition(Mine(-1))

    @declared
    class Declared(DropTop):
        extra: int = 0

    assert Condition(Declared(2)).perturbation.m == 2


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


@pytest.mark.parametrize("wrong", ["DropTop", DropTop, None, 3])
def test_what_is_no_perturbation_is_refused_with_the_choices(wrong):
    with pytest.raises(ValueError, match=r"perturbation is .*DropTop\(1\), of Identity"):
        Condition(wrong)


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ({"perturbation": {"name": "DropTop"}, "wher": "all"}, "field of a condition is 'wher'"),
        ({"where": "all"}, "perturbation is None; choose one of 'Identity'"),
    ],
)
def test_a_dict_that_is_no_condition(d, message):
    with pytest.raises(ValueError, match=message):
        Condition.from_dict(d)


def test_a_perturbation_of_some_points_only(context_of):
    """Its own class says which; a Compose has those of all its parts."""

    @dataclass(frozen=True)
    class OfLogits(Perturbation):
        points: ClassVar[tuple[str, ...]] = ("logits",)

        def __call__(self, logits_TE, ctx):
            return -logits_TE

    assert Condition(OfLogits()).point == "logits"
    for p in (OfLogits(), Compose((DropTop(1), OfLogits())), ResidualNoise(OfLogits())):
        name = type(p).__name__
        with pytest.raises(ValueError, match=f"point is 'scores'; {name} works at logits$"):
            Condition(p, point="scores")


# ---- after the score


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scores_are_moved_as_their_logarithms_are(context_of, options):
    """scores' = scores * exp(perturb(l) - l), l = log scores; what stays is the same to the bit."""
    router, logits_TE = Router(None, 6, 2, **options), torch.randn(40, 6)
    _, ctx = context_of(router, logits_TE)
    scores_TE = router.score(logits_TE).index_fill(1, torch.tensor([5]), 0.0)

    def move(l_TE, ctx):
        return l_TE + torch.tensor([1.5, -20, -math.inf, 0, 0, 0])

    got = perturb_scores(move, scores_TE, ctx)
    factors_E = torch.tensor([math.exp(1.5), math.exp(-20), 0, 1, 1, 1])
    torch.testing.assert_close(got, scores_TE * factors_E)
    assert got[:, 2:].equal((scores_TE * factors_E)[:, 2:])
    assert perturb_scores(lambda l_TE, ctx: l_TE, scores_TE, ctx) is scores_TE
    assert perturb_scores(lambda l_TE, ctx: l_TE.clone(), scores_TE, ctx).equal(scores_TE)
