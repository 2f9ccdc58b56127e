"""Two checkpoints side by side."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.adapters.base import as_adapter
from analysis.measure.compare import compare
from analysis.measure.comparison import js_divergence
from analysis.measure.shard import measure
from analysis.measure.sweep import sweep
from analysis.perturb.compound import Compose, ResidualNoise
from analysis.perturb.condition import Condition
from analysis.perturb.gates import GateSwap
from analysis.perturb.logits import GaussianNoise
from analysis.perturb.masks import DropTop
from analysis.perturb.recorded import Replay
from analysis.perturb.trace import Trace
from cartmoe.checkpoint import save
from cartmoe.data import IGNORE
from cartmoe.tokenizers import ByteTokenizer

OPTIONS = dict(batch_size=3, progress=False)


@pytest.fixture(scope="module")
def two(tiny_model):
    """A model, and the same with other gates and slightly other experts."""
    base, tuned = tiny_model("cartesian"), tiny_model("cartesian")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            scale = 0.3 if "gate.weight" in name else 0.02
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return {"base": base, "tuned": tuned}


@pytest.fixture(scope="module")
def comparison(two, shard):
    asked = [
        DropTop(1),
        GaussianNoise(0.5),
        Replay("base"),
        GateSwap("base"),
        Compose((DropTop(1), Replay("base"))),
    ]
    return compare(two, shard, asked, **OPTIONS)


def test_measures_what_sweeps_measure(two, comparison, shard):
    """The same rows in the same order, with the same noise."""
    losses = comparison.results.losses
    for name, model in two.items():
        alone = sweep(model, shard, [DropTop(1), GaussianNoise(0.5)], **OPTIONS).losses
        mine = losses[losses.model == name]
        mine = mine[mine.condition.isin(alone.condition)].reset_index(drop=True)
        # Up to rounding: how many conditions there are decides whose outputs are reused.
        np.testing.assert_allclose(mine.nll_sum, alone.nll_sum, rtol=1e-6)
        assert mine.condition.tolist() == alone.condition.tolist()
    assert losses.model.drop_duplicates().tolist() == ["base", "tuned"]
    assert comparison.results.damage(full=True).num_documents.unique() == [4]


def test_own_decisions_and_gates_change_nothing(comparison):
    damage = comparison.results.damage(full=True).set_index(["model", "label"])
    for label in ("Replay(base)", "GateSwap(base)"):
        assert (damage.loc[("base", label), ["delta_nats", "low", "high", "kl"]] == 0).all()
        assert damage.delta_nats["tuned", label] != 0


def test_replay_by_hand(two, comparison, shard, tmp_path):
    trace = Trace.record(two["base"], shard, tmp_path / "t", **OPTIONS)
    tuned = as_adapter(two["tuned"])
    expected = measure(tuned, [Condition(Replay(trace))], shard, batch_size=3)[1].losses.nll_sum
    losses = comparison.results.losses
    got = losses[(losses.model == "tuned") & (losses.perturbation == "Replay(base)")].nll_sum
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # reused there, here not


def test_nothing_is_left(comparison, two, shard, monkeypatch, tmp_path):
    """No directory, and no trace of where it was: the same ids every time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    again = compare(two, shard, Replay("base"), controls=False, tokens=True, **OPTIONS)
    assert list(tmp_path.iterdir()) == []
    ids = set(again.results.losses.condition)
    assert ids <= set(comparison.results.losses.condition)
    kept = [again.results.tokens("tuned", 0, id) for id in sorted(ids)]
    assert [len(frame) for frame in kept] == [7, 7]
    assert (two["base"].config, as_adapter(two["base"]).name) == (two["tuned"].config, "cartesian")


def test_drift_by_hand(two, comparison, shard):
    drift = comparison.drift().set_index("where")
    used_T = (shard.targets_SL != IGNORE).flatten()
    with torch.no_grad():
        a, b = (two[name].trunk(shard.tokens_SL)[1] for name in two)
    shares = []
    for n, where in enumerate(
        ["layer 0 stage 0", "layer 0 stage 1", "layer 2 stage 0", "layer 2 stage 1"]
    ):
        same_TKK = a[n].ids_TK[used_T, :, None] == b[n].ids_TK[used_T, None, :]
        kept_T = same_TKK.any(-1).double().mean(-1)
        assert drift.flips[where] == pytest.approx(1 - kept_T.mean().item())
        assert drift.changed[where] == pytest.approx((kept_T < 1).double().mean().item())
        shares.append(1 - kept_T.mean().item())
    assert drift.index[0] == "all"
    assert drift.flips["all"] == pytest.approx(np.mean(shares))
    assert drift.num_tokens["all"] == 4 * shard.num_tokens
    assert (drift.flips_low <= drift.flips).all()
    assert (drift.flips <= drift.flips_high).all()
    assert (drift.model == "tuned").all()


def test_no_drift_without_a_difference(two, shard):
    same = compare({"a": two["base"], "b": two["base"]}, shard, Replay("a"), **OPTIONS)
    columns = ["flips", "changed", "mass_moved", "flips_low", "flips_high"]
    assert (same.drift()[columns] == 0).all(axis=None)
    assert same.drift().js.abs().max() < 1e-12
    assert (same.damage_difference()[["delta_nats", "low", "high"]] == 0).all(axis=None)
    assert same.drift_cost().delta_nats.tolist() == [0]


def test_js_divergence():
    a = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.2, 0.3, 0.4, 0.1], [2, 0, 0, 0]])
    b = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.4, 0.1], [3, 0, 0, 0]])
    half = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    expected = torch.tensor([math.log(2), half, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(js_divergence(a, b), expected)


def test_difference_of_differences(comparison):
    losses = comparison.results.losses
    sums = losses.groupby(["model", "perturbation"]).nll_sum.sum()
    tokens = losses[losses.perturbation == "clean"].groupby("model").num_tokens.sum()["base"]

    def damage(model):
        return (sums[model, "DropTop"] - sums[model, "clean"]) / tokens

    difference = comparison.damage_difference().set_index("condition")
    expected = damage("tuned") - damage("base")
    assert difference.delta_nats["DropTop(1)"] == pytest.approx(expected)
    assert difference.low["DropTop(1)"] < expected < difference.high["DropTop(1)"]
    assert set(difference.index) == set(comparison.results.damage(full=True).label)


def test_drift_cost(comparison):
    cost = comparison.drift_cost()
    assert cost.model.tolist() == ["tuned", "tuned"]
    assert cost.imposed.tolist() == ["decisions", "gates"]
    assert cost["of"].tolist() == ["base", "base"]
    damage = comparison.results.damage(full=True).set_index(["model", "label"])
    assert cost.delta_nats[0] == damage.delta_nats["tuned", "Replay(base)"]
    assert cost.flips[0] > 0.05


def test_table_and_text(comparison):
    table = comparison.table()
    assert list(table.columns[::3]) == ["base", "tuned", "tuned - base"]
    difference = table["tuned"] - table["base"]
    np.testing.assert_allclose(table["tuned - base"], difference, atol=1e-12)
    text = repr(comparison)
    assert text.startswith("4 documents; clean nats per token: base ")
    assert "tuned decides otherwise than base: " in text
    assert "DropTop(1)" in text


def test_checkpoints_and_other_seeds(two, shard, tmp_path):
    """Paths, and models that were not trained with the same seed."""
    for seed, (name, model) in enumerate(two.items()):
        save(model, tmp_path / name, {"train_seed": seed})
    paths = {"base": tmp_path / "base", "tuned": str(tmp_path / "tuned")}
    asked = [Replay("base"), GateSwap(tmp_path / "base"), ResidualNoise(Replay("base"))]
    got = compare(paths, shard, asked, controls=False, **OPTIONS)
    assert set(got.results.losses.train_seed) == {0, 1}
    assert len(got.damage_difference()) == 3
    cost = got.drift_cost().set_index("imposed")
    assert cost.delta_nats["decisions"] != 0
    assert got.results.damage(full=True).label.tolist()[2] == "ResidualNoise(of=Replay base)"


def test_three_models(two, tiny_model, shard):
    models = {**two, "other": tiny_model("cartesian", seed=9)}
    got = compare(models, shard, [Replay("tuned")], controls=False, **OPTIONS)
    assert got.drift().groupby("model", sort=False).size().to_dict() == {"tuned": 5, "other": 5}
    assert got.drift_cost().model.tolist() == ["base", "other"]
    assert list(got.table().columns[::3]) == [*models, "tuned - base", "other - base"]


def test_models_of_other_shapes(two, tiny_model, shard):
    """Drift where sites agree; decisions of another shape are refused before anything is run."""
    one, few = tiny_model("smoe_share"), tiny_model("cartesian", num_experts=4)
    mixed = compare({"base": two["base"], "one": one}, shard, DropTop(1), **OPTIONS)
    assert mixed.drift()["where"].tolist() == ["all", "layer 0 stage 0", "layer 2 stage 0"]
    apart = compare({"base": two["base"], "few": few}, shard, DropTop(1), **OPTIONS)
    with pytest.raises(ValueError, match="few and base have no router at the same layer and stage"):
        apart.drift()
    assert "DropTop(1)" in repr(apart)
    with pytest.raises(ValueError, match="no model was run with another's decisions; add an"):
        apart.drift_cost()
    for p, models, message in [
        (Replay("base"), {"base": two["base"], "few": few}, r"Replay\('base'\) does not fit 'few'"),
        (GateSwap("one"), {"base": two["base"], "one": one}, "stage 1 it has 6 .* 'one' has 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(models, shard, p, **OPTIONS)
    fits = Condition(Replay("one"), "stage 0")
    compare({"base": two["base"], "one": one}, shard, fits, controls=False, **OPTIONS)


class OtherTokenizer(ByteTokenizer):
    """One with another identity."""

    identity = "other"
    name = "other"


def test_wrong_arguments(two, model_of, shard):
    base, tuned = two.values()
    other = as_adapter(tuned)
    other.tokenizer = OtherTokenizer()
    first = as_adapter(base)
    first.tokenizer = ByteTokenizer()
    dense = model_of("dense")
    for models, p, message in [
        ({"base": base}, DropTop(1), "give at least two by name"),
        ([base, tuned], DropTop(1), "give at least two by name"),
        ({"a/b": base, "c": tuned}, DropTop(1), "models has the name 'a/b'"),
        ({"a": base, "b": dense}, DropTop(1), "dense has no router"),
        ({"a": first, "b": other}, DropTop(1), "tokens of different tokenizers"),
        ({"a": base, "b": tuned}, Replay("base"), "trace is 'base', .* choose one of 'a', 'b'"),
        ({"a": base, "b": tuned}, [Compose((GateSwap("c"),))], "checkpoint is 'c', .* 'a', 'b'"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(models, shard, p, **OPTIONS)
    with pytest.raises(FileNotFoundError, match="no-such"):
        compare({"a": base, "b": Path("no-such")}, shard, DropTop(1), **OPTIONS)
