"""One run over its checkpoints: planted routings, and a run of three steps."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.adapters.load import load
from analysis.measure.sweep import sweep
from analysis.overlap.measure import measure_overlap
from analysis.overlap.training import TOGETHER, over_training, saturation
from analysis.perturb.masks import DropTop
from cartmoe import LanguageModel, ModelConfig
from cartmoe.checkpoint import save, step_folder
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import capture_routing
from cartmoe.recipe import TrainConfig
from cartmoe.routing import LinearGate
from cartmoe.run import start_run
from cartmoe.train import train

QUIET = dict(progress=False)


@pytest.fixture(scope="module")
def docs() -> Sequences:
    """About 300 tokens in forty documents, some padded."""
    rows = torch.randint(1, 13, (40, 11), generator=torch.Generator().manual_seed(4))
    padded = torch.arange(10) >= torch.tensor([10, 6, 3, 10] * 10)[:, None]
    names = [f"doc{i}" for i in range(40)]
    return Sequences(
        rows[:, :-1], rows[:, 1:].masked_fill(padded, IGNORE), torch.arange(40), names, names,
        torch.full((40,), 20),
    )  # fmt: skip


@pytest.fixture
def run_of(tmp_path):
    """run_of({step: model}) -> a run with these checkpoints."""

    def build(models):
        start_run(tmp_path, {"train": asdict(TrainConfig())}, {})
        for step, model in models.items():
            save(model, step_folder(tmp_path, step), {"train_seed": 7, "step": step})
        return tmp_path

    return build


def turned(model):
    """With the first router's gate turned round: its lowest logits are now its highest."""
    with torch.no_grad():
        model.trunk.blocks[0].ffn.stages[0].router.gate.weight.neg_()
    return model


@pytest.mark.parametrize("family", ["smoe", "top_p"])
def test_planted(family, tiny_model, run_of, docs):
    options = dict(top_p=0.3, num_experts=16) if family == "top_p" else {}
    last, other = (tiny_model(family, **options) for _ in range(2))
    out = run_of({3: turned(tiny_model(family, **options)), 20: other, 100: last})
    table = saturation(out, docs, sites="layer 0", **QUIET)
    assert table.columns.tolist() == [
        *("model", "family", "train_seed", "step", "layer", "stage"),
        *("value", "low", "high", "null"),
    ]  # fmt: skip
    assert table.step.tolist() == [3, 20, 100]
    assert (table.model == family).all()
    assert (table.train_seed == 7).all()
    first, equal, final = table[["value", "low", "high"]].to_numpy()
    assert equal.tolist() == final.tolist() == [1, 1, 1]
    if family == "smoe":  # two of six experts, so the two lowest are others
        assert first.tolist() == [0, 0, 0]
    else:
        assert first[0] < 0.2
    assert (table.null > 0).all()


def ids_of(routing, counts_T):
    """Lists of ids, None in the place of one that has no weight."""
    for ids, weights in zip(routing.ids_TK[counts_T], routing.weights_TK[counts_T], strict=True):
        yield [i if w else None for i, w in zip(ids.tolist(), weights.tolist(), strict=True)]


def used(model, docs):
    """By site, token by token, the set of experts that have weight."""
    with torch.no_grad(), capture_routing(model) as captured:
        model(docs.tokens_SL)
    counts_T = (docs.targets_SL != IGNORE).flatten()
    return {
        site: [set(ids) - {None} for ids in ids_of(routing, counts_T)]
        for site, (routing,) in captured.items()
    }


def extreme(model):
    """With gates so steep that a sigmoid is 0 or 1: of some tokens all scores are 0."""
    with torch.no_grad():
        for gate in (module for module in model.modules() if isinstance(module, LinearGate)):
            gate.weight.mul_(1e4)
    return model


@pytest.mark.parametrize("family", ["cartesian", "top_p", "steep"])
def test_against_sets(family, tiny_model, run_of, docs):
    """More checkpoints than are in memory at once; chance by pairing all tokens with all."""
    steps = range(1, TOGETHER + 3)
    if family == "steep":
        models = {step: extreme(tiny_model("smoe", step, score="sigmoid")) for step in steps}
    else:
        models = {step: tiny_model(family, seed=step) for step in steps}
    table = saturation(run_of(models), docs, batch_size=3, **QUIET)
    final = used(models[TOGETHER + 2], docs)
    assert any(not b for end in final.values() for b in end) == (family == "steep")
    whole_T = np.repeat(docs.document_id, (docs.targets_SL != IGNORE).sum(1))
    assert len(table) == len(models) * len(final)
    for step in (1, TOGETHER + 1):
        for site, now in used(models[step], docs).items():
            document_T = whole_T[[bool(b) for b in final[site]]]
            now, end = zip(
                *((a, b) for a, b in zip(now, final[site], strict=True) if b), strict=True
            )
            row = table[(table.step == step) & (table.layer == site.layer)]
            row = row[row.stage == site.stage].squeeze()
            share_T = np.array([len(a & b) / len(b) for a, b in zip(now, end, strict=True)])
            assert row.value == pytest.approx(share_T.mean())
            chance = np.mean([len(a & b) / len(b) for a in now for b in end])
            assert row.null == pytest.approx(chance)
            # Forty documents in 32 units: the first eight are left out with another one each.
            unit_T = np.array([int(d[3:]) % 32 for d in document_T])
            left_out = np.array([share_T[unit_T != u].mean() for u in range(32)])
            spread = np.sqrt(31 / 32 * ((left_out - left_out.mean()) ** 2).sum())
            half = 2.0395134  # of Student's distribution with 31 degrees of freedom
            assert row.low == pytest.approx(row.value - half * spread)
            assert row.high == pytest.approx(row.value + half * spread)


@pytest.fixture(scope="module")
def run(texts, environment, tmp_path_factory):
    """Three steps of a tiny model, and as many checkpoints."""
    shape = dict(d_model=16, ffn_width=32, num_layers=2, num_heads=2, num_experts=4, init_std=0.3)
    config = TrainConfig(
        steps=3, corpus=str(texts), batch_size=2, length=16, precision="fp32", learning_rate=0.1,
        checkpoint_every=1, keep=3,
    )  # fmt: skip
    model = ModelConfig.preset("nano", "smoe", **shape)
    return train(model, config, tmp_path_factory.mktemp("run"), progress=False)


def test_over_training(run, docs):
    conditions, metrics = [DropTop(1), DropTop(2)], ["flat_cosine", "output_norm"]
    found = over_training(run, docs, conditions, metrics, seed=3, **QUIET)
    assert found.steps == [1, 2, 3]
    for step in found.steps:
        model = load(step_folder(run, step))
        damage = sweep(model, docs, conditions, controls=False, batch_size=8, seed=3, **QUIET)
        own = found.damage[found.damage.step == step]
        pd.testing.assert_frame_equal(
            own.drop(columns="step").reset_index(drop=True), damage.damage(full=True)
        )
        overlap = measure_overlap(model, docs, metrics, seed=3, **QUIET)
        for name in ("experts", "pairs"):
            now = getattr(found.at(step), name)
            assert now.columns[3] == "step"
            pd.testing.assert_frame_equal(now.drop(columns="step"), getattr(overlap, name))
        np.testing.assert_array_equal(
            found.at(step).matrix("flat_cosine", 0), overlap.matrix("flat_cosine", 0)
        )
    assert found.damage.groupby("step").delta_nats.sum().nunique() == 3
    with pytest.raises(ValueError, match="step is 4; choose one of 1, 2, 3"):
        found.at(4)


def test_a_trained_run_settles(run, docs):
    table = saturation(run, docs, **QUIET)
    by_step = table.groupby("step").value.mean()
    assert by_step[3] == 1
    assert (by_step[[1, 2]] < 1).all()
    assert (table.low <= table.value).all()
    assert (table.null < 1).all()


def test_bad_arguments(tiny_model, run_of, run, docs, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run: it has no run"):
        saturation(tmp_path / "nowhere", docs)
    with pytest.raises(ValueError, match="run_folder is a LanguageModel; give a path"):
        saturation(tiny_model("smoe"), docs)
    with pytest.raises(ValueError, match="docs has no sequence"):
        saturation(run, docs[:0])
    of_others = replace(docs, tokens_SL=docs.tokens_SL + 1000)
    with pytest.raises(ValueError, match=r"docs has token 1\d+, and \w+ a vocabulary of"):
        saturation(run, of_others)
    with pytest.raises(ValueError, match="sites is 'stage 4'"):
        saturation(run, docs, sites="stage 4")
    with pytest.raises(ValueError, match="batch_size is 0"):
        saturation(run, docs, batch_size=0)
    one = run_of({5: tiny_model("smoe")})
    for function, arguments in ((saturation, ()), (over_training, (DropTop(1),))):
        with pytest.raises(ValueError, match=r"has 1 checkpoint; .* keep = 2: train with "):
            function(one, docs, *arguments)


def test_dense(tiny_config, run_of, docs):
    torch.manual_seed(0)
    dense = LanguageModel(tiny_config("dense"))
    with pytest.raises(ValueError, match="dense has no router"):
        saturation(run_of({1: dense, 2: dense}), docs)
