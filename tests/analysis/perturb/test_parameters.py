"""What the parameters of perturbations may be, what they are called, and classes of one's own."""

import json
import math
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from analysis.perturb.base import EXPECTS
from analysis.perturb.catalogue import PERTURBATIONS, perturbation_from_dict
from analysis.perturb.compound import Compose, Custom, ResidualNoise
from analysis.perturb.condition import POINTS, Condition
from analysis.perturb.decisions import DropSlots, Lag, NoRouted, TopK, UniformWeights
from analysis.perturb.flips import Worst
from analysis.perturb.logits import (
    GaussianNoise,
    GumbelNoise,
    Quantize,
    RandomRouting,
    SwapRanks,
    Temperature,
)
from analysis.perturb.masks import DropChosen, DropExperts, DropTop, DropUnchosen, KeepRanks

from ..examples import ALL, EVERY, OWN_EXAMPLES, name_of, soften
from ..routers import routings

# ---- names and parameters


@EVERY
def test_dict_round_trip(p):
    text = json.dumps(p.to_dict())
    again = perturbation_from_dict(json.loads(text))
    assert again == p
    assert hash(again) == hash(p)
    assert json.dumps(again.to_dict()) == text
    assert perturbation_from_dict(p.identity().to_dict()) == p.identity()


@EVERY
def test_expects_one_thing(p):
    assert p.expects in EXPECTS
    assert set(p.points) <= set(POINTS)
    assert p.points


@pytest.mark.parametrize("cls", [c for n, c in PERTURBATIONS.items() if n not in OWN_EXAMPLES])
def test_defaults(cls):
    name = cls.__name__
    if cls in (Compose, Custom):  # of nothing there is none
        with pytest.raises(ValueError, match=r"^(Compose lacks parts|'' )"):
            perturbation_from_dict({"name": name})
    else:
        assert perturbation_from_dict({"name": name}) == cls()
        assert cls().label == cls().label.split("(")[0] or cls is ResidualNoise


def test_labels_name_one_perturbation():
    """Conditions that differ have another label or another strength, but for fixed sets."""
    named = Counter((p.label, p.strength) for p in ALL if not math.isnan(p.strength))
    assert set(named.values()) == {1}


def test_labels_and_strengths():
    assert (DropTop(3).label, DropTop(3).strength) == ("DropTop", 3)
    assert (DropTop(ratio=0.25).label, DropTop(ratio=0.25).strength) == ("DropTop(ratio)", 0.25)
    assert GaussianNoise(2, scale="site").label == "GaussianNoise(scale=site)"
    assert GaussianNoise(2).label == "GaussianNoise"
    assert math.isnan(NoRouted().strength)
    assert KeepRanks((3, 1)).label == "KeepRanks(ranks=1+3)"
    assert DropExperts(0.5, "most_used").label == "DropExperts(which=most_used)"
    assert math.isnan(DropExperts(ids=[1]).strength)
    assert (Quantize(4).label, Quantize(4).strength) == ("Quantize(bits)", 4)
    assert Quantize("fp8").label == "Quantize(fp8)"
    assert Lag(2, "sites").label == "Lag(over=sites)"
    noise = GaussianNoise(2, scale="site", within="chosen")
    part = "GaussianNoise scale=site within=chosen"
    assert Compose((DropTop(2), noise)).label == f"Compose(parts=DropTop 2+{part} 2)"
    assert ResidualNoise(noise).label == f"ResidualNoise(of={part})"
    assert ResidualNoise(noise).strength == 2
    assert Custom(soften, title="soften", version=3).label == "soften"
    assert Worst(4, rounds=2).label == "Worst(rounds=2)"


def test_identity_is_at_strength_zero():
    for p in ALL:
        assert p.identity().strength in (0, pytest.approx(math.nan, nan_ok=True))


MUST = "must be a whole number"
WHOLE = f"it {MUST}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropTop(-1), "m is -1; it must be at least 0"),
        (lambda: DropTop(1.5), f"m is 1.5; {WHOLE}"),
        (lambda: DropTop(True), "m is True"),
        (lambda: DropTop("2"), "m is '2'"),
        (lambda: DropTop([1]), r"m is \[1\]"),
        (lambda: DropTop(ratio=1.5), "ratio is 1.5; it must be at most 1"),
        (lambda: DropTop(ratio="half"), "ratio is 'half'; it must be a finite number"),
        (lambda: DropTop(2, ratio=0.5), "give one of them"),
        (lambda: KeepRanks(()), r"ranks is \(\); it must be a list that is not empty"),
        (lambda: KeepRanks((0, 1)), "ranks has 0; each must be at least 1"),
        (lambda: KeepRanks((1, 1)), r"ranks is \(1, 1\); it must be a list of different ones"),
        (lambda: KeepRanks(2), "ranks is 2; it must be a list"),
        (lambda: KeepRanks("12"), "ranks is '12'"),
        (lambda: TopK(0), "k is 0; it must be at least 1"),
        (lambda: TopK(None), "k is None"),
        (lambda: DropExperts(-0.1), "fraction is -0.1"),
        (lambda: DropExperts("all"), "fraction is 'all'"),
        (lambda: DropExperts(which="x"), "which is 'x'; choose one of 'random', 'most_used'"),
        (lambda: DropExperts(which=["random"]), r"which is \['random'\]; choose one of"),
        (lambda: DropExperts(0.5, ids=[1]), "ids name the experts already"),
        (lambda: DropExperts(ids=[]), r"ids is \[\]"),
        (lambda: DropExperts(ids={}), r"ids is \(\)"),
        (lambda: DropExperts(ids=[-1]), "ids has -1; each must be at least 0"),
        (lambda: DropExperts(ids=3), "ids is 3"),
        (lambda: DropExperts(ids="34"), "ids is '34'"),
        (lambda: DropExperts(ids={"layer 0": 3}), "ids has 3; each must be a list"),
        (lambda: DropExperts(ids={"layer 0": [0.5]}), f"ids has 0.5; each {MUST}"),
        (lambda: DropSlots(2), "probability is 2; it must be at most 1"),
        (lambda: DropSlots(renormalize=1), "renormalize is 1; it must be True or False"),
        (lambda: DropChosen(-1), "m is -1"),
        (lambda: DropUnchosen(None), "m is None"),
        (lambda: GaussianNoise(-0.1), "sigma is -0.1"),
        (lambda: GaussianNoise(math.nan), "sigma is nan; it must be a finite number"),
        (lambda: GaussianNoise(math.inf), "sigma is inf"),
        (lambda: GaussianNoise(scale="row"), "scale is 'row'; choose one of 'token', 'site'"),
        (lambda: GaussianNoise(within="some"), "within is 'some'"),
        (lambda: GumbelNoise(-1), "tau is -1; it must be at least 0"),
        (lambda: Temperature(65), "log2_t is 65; it must be at most 64"),
        (lambda: Temperature("hot"), "log2_t is 'hot'"),
        (lambda: SwapRanks(0, 1), "r is 0"),
        (lambda: SwapRanks(1, 1.5), "s is 1.5"),
        (lambda: RandomRouting(1.1), "share is 1.1; it must be at most 1"),
        (lambda: RandomRouting(draw="x"), "draw is 'x'; choose one of 'reservoir', 'permute'"),
        (lambda: UniformWeights(1.5), "mix is 1.5; it must be at most 1"),
        (lambda: Quantize("fp16"), "to is 'fp16'; choose one of 'bf16', 'fp8' or it must be a wh"),
        (lambda: Quantize(0), "to is 0"),
        (lambda: Quantize(True), "to is True"),
        (lambda: Quantize([8]), r"to is \[8\]"),
        (lambda: Lag(-1), "n is -1"),
        (lambda: Lag(over="layers"), "over is 'layers'; choose one of 'tokens', 'sites'"),
        (lambda: Compose(()), r"parts is \(\); it must be a list that is not empty"),
        (lambda: Compose(DropTop()), "parts is DropTop"),
        (lambda: Compose(("DropTop",)), "parts has 'DropTop'; each must be a perturbation"),
        (lambda: Compose((ResidualNoise(),)), "parts has ResidualNoise"),
        (lambda: ResidualNoise(3), "of is 3; it must be a perturbation of routing"),
        (lambda: ResidualNoise(ResidualNoise()), "of is ResidualNoise"),
        (lambda: Custom(), "'' cannot be imported"),
        (lambda: Custom("math:nothing", title="x"), "'math:nothing' cannot be imported"),
        (lambda: Custom("no_such_module:f", title="x"), "'no_such_module:f' cannot be imported"),
        (lambda: Custom("math:pi", title="x"), r"function is 3.14\d*; give \(logits_TE, ctx\)"),
        (lambda: Custom(soften), "title is ''; it must be a text without"),
        (lambda: Custom(soften, title="a(b)"), r"title is 'a\(b\)'"),
        (lambda: Custom(soften, title="x", version="1"), f"version is '1'; {WHOLE}"),
        (lambda: Custom(soften, title="x", changes="output"), "changes is 'output'; choose one"),
        (lambda: Worst(-1), "flips is -1"),
        (lambda: Worst(rounds=0), "rounds is 0; it must be at least 1"),
        (lambda: Worst(per="batch"), "per is 'batch'; choose one of 'token', 'sequence'"),
        (lambda: Worst(choose="best"), "choose is 'best'; choose one of 'worst', 'random'"),
        (lambda: perturbation_from_dict({"name": "DropTpo"}), "choose one of 'Identity', 'DropTop"),
        (lambda: perturbation_from_dict({"name": ["DropTop"]}), r"perturbation is \['DropTop'\]"),
        (lambda: perturbation_from_dict({"m": 1}), "perturbation is None; choose one of"),
        (lambda: perturbation_from_dict({"name": "DropTop", "k": 1}), "of DropTop is 'k'"),
        (lambda: perturbation_from_dict({"name": "math:pi"}), "'math:pi' is no class derived from"),
        (lambda: perturbation_from_dict({"name": "math:"}), "'math:' cannot be imported"),
    ],
)  # fmt: skip
def test_wrong_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (DropTop(7), "m is 7; .* has only 6 experts"),
        (DropChosen(7), "m is 7; .* has only 6 experts"),
        (DropUnchosen(7), "m is 7; .* has only 6 experts"),
        (KeepRanks((7,)), "ranks has 7; .* has only 6 experts"),
        (TopK(7), "k is 7; .* has only 6 experts"),
        (SwapRanks(1, 7), "s is 7; .* has only 6 experts"),
        (DropExperts(ids=[6]), "ids has 6; .* has only 6 experts"),
        (DropExperts(ids={"layer 0": [9]}), "ids has 9; .* has only 6 experts"),
        (DropExperts(ids={"layer 1": [0]}), "router of ids is 'layer 1'; choose one of 'layer 0'"),
        (Compose((DropExperts(ids=[6]),)), "ids has 6"),
        (GaussianNoise(scale="site"), r"needs statistics .* pass stats=analysis\.calibrate"),
        (RandomRouting(), r"RandomRouting.*pass stats=analysis\.calibrate"),
        (DropExperts(which="most_used"), r"needs statistics"),
        (Worst(), r"Worst is searched for with the targets .* use analysis\.sweep"),
        (Custom(lambda z, ctx: z[:, :2], title="half"), r"returned .*32 of shape \(48, 2\)"),
        (Custom(lambda z, ctx: z.double(), title="wide"), "returned torch.float64"),
        (Custom(lambda z, ctx: None, title="none"), "returned None; it must return torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)  # fmt: skip
def test_what_does_not_fit_the_model_says_why(model_of, p, message):
    with pytest.raises(ValueError, match=message):
        routings(model_of("cartesian"), p)


def test_numbers_of_numpy_are_numbers():
    assert DropTop(np.int64(2)).to_dict() == DropTop(2).to_dict()
    assert GaussianNoise(np.float32(0.5)).to_dict() == GaussianNoise(0.5).to_dict()
    assert KeepRanks(tuple(np.arange(1, 3))).to_dict() == KeepRanks((1, 2)).to_dict()
    assert DropExperts(ids={"layer 0": list(np.arange(2))}) == DropExperts(ids={"layer 0": [0, 1]})
    assert json.dumps(Quantize(np.int64(4)).to_dict())
    assert GaussianNoise(1).to_dict() == GaussianNoise(1.0).to_dict()


# ---- of one's own

OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from analysis.perturb import Perturbation

class Base(Perturbation):
    def factor(self):
        return {factor}

@dataclass(frozen=True)
class Sharpen(Base):
    """Mine."""
    expects: ClassVar[str] = "weights"
    strength_field: ClassVar[str] = "by"
    by: float = 0.0

    def __call__(self, logits_TE, ctx):
        return logits_TE * (1 + self.factor() * self.by) if self.by else logits_TE

class NotFrozen(Perturbation):
    def __call__(self, logits_TE, ctx):
        return logits_TE

class Other:
    pass
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(factor) -> the module `own_perturbation` whose source has that factor."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(factor=1):
        import importlib
        import linecache

        (tmp_path / "own_perturbation.py").write_text(OWN.format(factor=factor))
        sys.modules.pop("own_perturbation", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return importlib.import_module("own_perturbation")

    yield load
    sys.modules.pop("own_perturbation", None)


def test_ones_own_class(own, model_of):
    p = own().Sharpen(2)
    assert p.to_dict()["name"] == "own_perturbation:Sharpen"
    assert (p.label, p.strength) == ("Sharpen", 2)
    again = Condition.from_dict(json.loads(Condition(p).id))
    assert again == Condition(p)
    assert again.id == Condition(p).id
    _, decisions = routings(model_of("cartesian"), p, where="layer 0 stage 0")
    assert not next(iter(decisions.values())).weights_TK.isnan().any()
    inside = Compose((DropTop(1), p))
    assert perturbation_from_dict(json.loads(json.dumps(inside.to_dict()))) == inside


def test_ones_own_class_is_known_by_its_source(own):
    before = Condition(own(1).Sharpen(2.0)).id
    assert Condition(own(1).Sharpen(2.0)).id == before
    assert Condition(own(3).Sharpen(2.0)).id != before  # what it inherits counts


def test_ones_own_class_in_a_notebook():
    """There is no file of the class, only the cells' lines; another cell is another source."""
    import linecache

    def cell(number, factor):
        text, name = OWN.format(factor=factor), f"/tmp/ipykernel_1/{number}.py"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        namespace = {"__name__": "__no_file__"}
        exec(compile(text, name, "exec"), namespace)
        return namespace["Sharpen"](2.0).to_dict()

    sys.modules["__no_file__"] = type(sys)("__no_file__")
    try:
        first, same, other = cell(1, 1), cell(2, 1), cell(3, 4)
    finally:
        del sys.modules["__no_file__"]
    assert first == same
    assert first["source"] is not None
    assert first["source"] != other["source"]


def test_ones_own_class_must_be_a_frozen_dataclass(own):
    module = own()
    with pytest.raises(ValueError, match=r"must be a @dataclass\(frozen=True\)"):
        Condition(module.NotFrozen())
    with pytest.raises(ValueError, match=r"'own_perturbation:Other' is no class derived from"):
        perturbation_from_dict({"name": "own_perturbation:Other"})


def test_numbers_become_plain_ones():
    p = DropTop(np.int32(3))
    assert type(p.m) is int
    assert type(GaussianNoise(np.float32(3)).sigma) is float
    assert type(GaussianNoise(3).sigma) is float
    assert replace(p, m=4) == DropTop(4)
    with pytest.raises(ValueError, match="m is -1"):
        replace(p, m=-1)


def test_all_mistakes_at_once():
    with pytest.raises(ValueError, match="sigma is -1") as error:
        GaussianNoise(-1, "row", within=3, seed=1)
    assert str(error.value).splitlines() == [
        "sigma is -1; it must be at least 0",
        "scale is 'row'; choose one of 'token', 'site', 'absolute'",
        "within is 3; choose one of 'all', 'chosen'",
        "field of GaussianNoise is 'seed'; choose one of 'sigma', 'scale', 'within'",
    ]


def test_a_module_that_raises_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'broken:X' cannot be imported \(boom\)"):
        perturbation_from_dict({"name": "broken:X"})


def test_experts_of_a_router_are_a_set():
    assert DropExperts(ids={"layer 0": [3, 1, 3]}) == DropExperts(ids={"layer 0": [1, 3]})
