"""Training: the schedule, the gradient of a step, what is recorded, what is refused."""

import itertools
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cartmoe import FAMILIES, LanguageModel, ModelConfig, load
from cartmoe.checkpoint import (
    checkpoint_sha256,
    newest,
    read_meta,
    read_tokenizer,
    run_checkpoints,
    step_of,
)
from cartmoe.corpora import open_source
from cartmoe.data import TrainBatches, prepare
from cartmoe.distributed import Ranks
from cartmoe.hooks import router_sites
from cartmoe.interrupt import Interrupt
from cartmoe.lock import locked
from cartmoe.objective import Gradient
from cartmoe.optim import clip_gradients, gradient_norm, learning_rate_factor, make_optimizer
from cartmoe.precision import probe_precision
from cartmoe.recipe import RECIPES
from cartmoe.routing import balance_loss, expert_counts, z_loss
from cartmoe.run import read_run
from cartmoe.train import TrainConfig, train

ALONE = Ranks(0, 1, "cpu")


def metrics(out):
    return pd.read_csv(out / "metrics.csv")


# The optimizer -------------------------------------------------------------------------------


def test_learning_rate():
    factors = [learning_rate_factor(step, 100, 10, 0.1) for step in range(1, 101)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert factors[-1] == pytest.approx(0.1)
    assert factors[54] == pytest.approx(0.55)  # half way down
    assert learning_rate_factor(1, 1, 0, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(5, 5, 5, 0.1) == 1  # nothing but warm-up


def test_matrices_decay_and_vectors_do_not(tiny_model):
    model = tiny_model()
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for parameter in model.parameters():
        assert decay.pop(id(parameter)) == (0.1 if parameter.dim() > 1 else 0.0)
    assert not decay


def test_clipping(tiny_model):
    parameters = list(tiny_model().parameters())
    for parameter in parameters[1:]:
        parameter.grad = torch.randn_like(parameter)
    norm = gradient_norm(parameters).item()
    flat = torch.cat([p.grad.flatten() for p in parameters[1:]])
    assert norm == pytest.approx(flat.norm().item())
    clip_gradients(parameters, norm, 2 * norm)
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters[1:]]), flat)
    clip_gradients(parameters, norm, norm / 2)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters[1:]]), flat / 2)


# The gradient of a step ----------------------------------------------------------------------


def gradients(model_config, config, tokens):
    torch.manual_seed(0)
    model = LanguageModel(model_config).train()
    parts, counts = Gradient(model, config, ALONE)(tokens, step=1)
    return {n: p.grad for n, p in model.named_parameters()}, parts, counts


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_the_written_out_loss(family, tiny_run):
    model_config, config = tiny_run(family, balance=0.5, z_loss=0.1)
    tokens = torch.randint(256, (4, 33))
    grads, (nll, balance, z), counts = gradients(model_config, config, tokens)
    torch.manual_seed(0)
    model = LanguageModel(model_config)
    x, routings = model.trunk(tokens[:, :-1])
    expected = model.mean_loss(x, tokens[:, 1:])
    assert nll == expected
    expected_balance = sum(balance_loss(r.scores_TE, expert_counts(r)) for r in routings)
    expected_z = sum(z_loss(r.logits_TE) for r in routings)
    torch.testing.assert_close(balance, torch.as_tensor(expected_balance).float())
    torch.testing.assert_close(z, torch.as_tensor(expected_z).float())
    assert [row.tolist() for row in counts] == [expert_counts(r).tolist() for r in routings]
    (expected + 0.5 * expected_balance + 0.1 * expected_z).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(score="sigmoid"), dict(composition="parallel")])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulating_changes_nothing(accumulate, changes, tiny_run):
    """Also not the balance loss: its shares are those of all micro-batches."""
    tokens = torch.randint(256, (4, 33)).sort(0).values  # parts that differ in their routing
    settings = dict(balance=2.0, z_loss=0.1) | changes
    whole, parts, counts = gradients(*tiny_run(**settings), tokens)
    model_config, config = tiny_run(accumulate=accumulate, **settings)
    grads, parts_a, counts_a = gradients(model_config, config, tokens)
    assert torch.equal(counts_a, counts)
    torch.testing.assert_close(parts_a, parts)
    for name in whole:
        torch.testing.assert_close(grads[name], whole[name], rtol=1e-4, atol=1e-6)


def test_recorded_losses_without_a_coefficient_cost_no_gradient(tiny_run):
    tokens = torch.randint(256, (4, 33))
    grads, (_, balance, z), _ = gradients(*tiny_run(balance=0.0, z_loss=0.0, top_k=1), tokens)
    assert balance > 0
    assert z > 0
    # Renormalised weights of one chosen expert are constant: only the two losses reach its gate.
    grads, *_ = gradients(*tiny_run(balance=0.0, top_k=1, renormalize=True), tokens)
    gates = [g for name, g in grads.items() if name.endswith("gate.weight")]
    assert gates
    assert all(g is None or g.abs().max() < 1e-6 for g in gates)


def test_router_noise_depends_on_seed_step_and_part_alone(tiny_run):
    model_config, config = tiny_run(router_noise=1.0)
    model = LanguageModel(model_config).train()
    gradient, tokens = Gradient(model, config, ALONE), torch.randint(256, (4, 33))
    first, _ = gradient(tokens, step=1)
    torch.manual_seed(123)
    again, _ = gradient(tokens, step=1)
    other, _ = gradient(tokens, step=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# A run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family, tiny_run, tmp_path):
    model_config, config = tiny_run(family, steps=30, learning_rate=1e-2)
    out = train(model_config, config, tmp_path / "run", progress=False)
    table = metrics(out)
    assert out == tmp_path / "run"
    assert table.step.tolist() == list(range(1, 31))
    assert table.loss.iloc[0] == pytest.approx(math.log(256), abs=0.3)
    assert table.loss.iloc[-1] < table.loss.iloc[0] - 1
    assert table.max_violation.isna().all() == (family == "dense")
    if family != "dense":
        assert set(table.worst_site) <= {"layer 0 stage 0", "layer 0 stage 1"}
    assert load(out).config == model_config


def test_what_a_run_leaves(tiny_run, texts, tmp_path):
    model_config, config = tiny_run(steps=6, checkpoint_every=2, keep=2)
    out = train(model_config, config, tmp_path / "run", progress=False)
    names = ["checkpoints", "metrics.csv", "metrics.json", "run.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [path.name for path in run_checkpoints(out)] == ["step-00000004", "step-00000006"]
    meta = read_meta(out)
    assert meta == {
        "family": "cartesian",
        "step": 6,
        "steps": 6,
        "tokens": 6 * 4 * 32,
        "train_seed": 0,
        "corpus": str(texts),
        "corpus_sha256": prepare(texts).sha256,
        "corpus_fingerprint": open_source(texts).fingerprint,
        "groups": sorted(prepare(texts).split("train").group),
        "tokenizer": "bytes",
        "length": 32,
        "precision": "fp32",
    }
    assert read_tokenizer(out).name == "bytes"
    found = json.loads((out / "run.json").read_text())["found"]
    assert (found["threads"], found["processes"], found["device"]) == (1, 1, "cpu")


def test_checkpoints_of_milestones_stay(tiny_run, tmp_path):
    model_config, config = tiny_run(steps=9, checkpoint_every=4, keep=1, milestones=[1, 2, 6])
    out = train(model_config, config, tmp_path / "run", progress=False)
    assert [step_of(path) for path in run_checkpoints(out)] == [1, 2, 6, 9]
    plain = train(model_config, replace(config, milestones=()), tmp_path / "plain", progress=False)
    assert checkpoint_sha256(newest(out)) == checkpoint_sha256(newest(plain))
    # Asked for later, they change no weight either.
    train(model_config, replace(config, milestones=(3,)), out, progress=False)


def test_training_is_the_plain_loop(tiny_run, texts, tmp_path):
    """Against torch's own AdamW and clipping, written out."""
    model_config, config = tiny_run(steps=4, balance=0.1, clip=0.5, learning_rate=1e-2, warmup=2)
    out = train(model_config, config, tmp_path / "run", progress=False)
    torch.manual_seed(0)
    model = LanguageModel(model_config)
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.95), 0.1)
    batches = TrainBatches(prepare(texts), 4, 32, seed=0)
    for step in range(4):
        tokens = batches.batch(step)
        x, routings = model.trunk(tokens[:, :-1])
        loss = model.mean_loss(x, tokens[:, 1:])
        for r in routings:
            loss = loss + 0.1 * balance_loss(r.scores_TE, expert_counts(r))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * learning_rate_factor(step + 1, 4, 2, 0.1)
        optimizer.step()
    for (name, got), expected in zip(load(out).named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_selection_biases_follow_the_load(tiny_run, tmp_path):
    model_config, config = tiny_run(score="sigmoid", steps=1, accumulate=2, bias_rate=0.25)
    out = train(model_config, config, tmp_path / "run", progress=False)
    torch.manual_seed(0)
    model = LanguageModel(model_config)
    tokens = TrainBatches(prepare(config.corpus), 4, 32, seed=0).batch(0)
    _, routings = model.trunk(tokens[:, :-1])
    for router, routing in zip(router_sites(load(out)).values(), routings, strict=True):
        load_E = expert_counts(routing).float()
        assert torch.equal(router.selection_bias_E, 0.25 * (load_E.mean() - load_E).sign())


def test_the_generator_and_threads_are_left_as_they_were(tiny_run, tmp_path):
    before = torch.random.get_rng_state()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train(*tiny_run(steps=2, router_noise=0.1), tmp_path / "run", progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == 1
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_bf16(tiny_run, tmp_path):
    model_config, config = tiny_run(precision="bf16", steps=3)
    out = train(model_config, config, tmp_path / "run", progress=False)
    assert read_meta(out)["precision"] == "bf16"
    assert {p.dtype for p in load(out).parameters()} == {torch.float32}


def test_a_trained_vocabulary(tiny_run, tmp_path):
    model_config, config = tiny_run(tokenizer="bpe:300", vocab_size=320, steps=2)
    out = train(model_config, config, tmp_path / "run", progress=False)
    assert read_tokenizer(out).identity == prepare(config.corpus, "bpe:300").tokenizer.identity
    with pytest.raises(ValueError, match="vocab_size is 256; tokenizer 'bpe:300' needs at least"):
        train(*tiny_run(tokenizer="bpe:300"), tmp_path / "small", progress=False)


def test_the_bar(tiny_run, tmp_path, capsys):
    train(*tiny_run(steps=3), tmp_path / "run")
    text = capsys.readouterr().err
    assert "3/3" in text
    assert "loss" in text
    assert "tokens/s" in text
    assert "load up to" in text
    train(*tiny_run(steps=3), tmp_path / "run")
    assert "run is finished: it has all of its 3 steps" in capsys.readouterr().out


# Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dense", "cartesian"])
def test_probe(family):
    found = probe_precision(ModelConfig.preset("nano", family), 64, "cpu")
    times = found["milliseconds"]
    assert found["precision"] == ("bf16" if 1.25 * times["bf16"] < times["fp32"] else "fp32")


def test_the_precision_that_was_found_stays(tiny_run, tmp_path, monkeypatch):
    model_config, config = tiny_run(precision="auto", steps=2)
    probes = iter([{"precision": "bf16"}])  # a second probe would raise StopIteration
    monkeypatch.setattr("cartmoe.train.probe_precision", lambda *args: next(probes))
    for _ in range(2):
        train(model_config, config, tmp_path / "run", progress=False)
        assert read_meta(tmp_path / "run")["precision"] == "bf16"


def test_another_kind_of_cpu_is_noted(tiny_run, tmp_path, monkeypatch):
    train(*tiny_run(steps=2), tmp_path / "run", progress=False)
    assert "resumed_on" not in read_run(tmp_path / "run")["found"]
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "ABACUS")
    with pytest.warns(UserWarning, match="goes on on one with ABACUS"):
        train(*tiny_run(steps=2), tmp_path / "run", progress=False)
    train(*tiny_run(steps=2), tmp_path / "run", progress=False)  # said once
    assert read_run(tmp_path / "run")["found"]["resumed_on"] == ["ABACUS"]


# What is refused -----------------------------------------------------------------------------


def test_another_configuration_is_refused(tiny_run, tmp_path):
    train(*tiny_run(steps=2), tmp_path / "run", progress=False)
    before = metrics(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of another configuration") as error:
        train(*tiny_run(steps=3, num_experts=8), tmp_path / "run", progress=False)
    assert "num_experts is 4 there, 8 asked for" in str(error.value)
    assert "steps is 2 there, 3 asked for" in str(error.value)
    assert str(error.value).count(" there, ") == 2
    assert metrics(tmp_path / "run").equals(before)


def test_another_text_is_refused_and_another_path_is_not(tiny_run, texts, tmp_path):
    train(*tiny_run(steps=2), tmp_path / "run", progress=False)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in texts.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    same = dict(corpus=str(moved), checkpoint_every=1, keep=1)
    train(*tiny_run(steps=2, **same), tmp_path / "run", progress=False)
    (moved / "0.txt").write_text("another text. " * 99)
    with pytest.raises(ValueError, match=r"corpus is .*moved.* corpus_sha256 is"):
        train(*tiny_run(steps=2, **same), tmp_path / "run", progress=False)


def test_what_cannot_be_trained_leaves_no_run(tiny_run, tmp_path):
    for changes in (dict(length=10**6), dict(tokenizer="bpe:300")):
        with pytest.raises(ValueError, match=r"length is|vocab_size is"):
            train(*tiny_run(**changes), tmp_path / "run", progress=False)
    train(*tiny_run(steps=1), tmp_path / "run", progress=False)


def test_a_directory_in_use_is_refused(tiny_run, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match=r"in use: process \d+ writes"):
        train(*tiny_run(), tmp_path / "run", progress=False)
    train(*tiny_run(steps=1), tmp_path / "run", progress=False)


@pytest.mark.parametrize("family", ["dense", "cartesian"])
def test_weights_that_explode(family, tiny_run, tmp_path):
    """Step 1 makes them huge, step 2 meets them."""
    with pytest.raises(FloatingPointError, match=r"^step 2: .*learning_rate"):
        train(*tiny_run(family, learning_rate=1e30, steps=20), tmp_path / "run", progress=False)
    assert metrics(tmp_path / "run").step.tolist() == [1]


def test_a_gradient_that_is_not_finite(tiny_run, tmp_path, monkeypatch):
    calls = iter([1.0, 1.0, 1.0, math.inf])
    with monkeypatch.context() as patch:
        patch.setattr("cartmoe.train.gradient_norm", lambda p: torch.tensor(next(calls)))
        with pytest.raises(FloatingPointError, match=r"^step 4: the gradient norm is inf; "):
            train(*tiny_run(checkpoint_every=2), tmp_path / "run", progress=False)
    assert read_meta(newest(tmp_path / "run"))["step"] == 2
    assert metrics(tmp_path / "run").step.tolist() == [1, 2, 3]
    train(*tiny_run(checkpoint_every=2), tmp_path / "run", progress=False)
    assert metrics(tmp_path / "run").step.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps is 0; it must be at least 1"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; it must be more than 0"),
        (dict(precision="fp16"), "precision is 'fp16'; choose one of 'auto', 'fp32', 'bf16'"),
        (dict(batch_size=3, accumulate=2), "batch_size is 3; it must be a multiple of accumulate"),
        (dict(warmup=-1), "warmup is -1; it must be at least 0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_recipes():
    assert [TrainConfig(steps=s).warmup for s in (5, 200, 10**6)] == [0, 20, 2000]
    for name in RECIPES:
        assert TrainConfig.preset(name).batch_size % TrainConfig.preset(name).accumulate == 0
    assert TrainConfig.preset("small", seed=3).tokenizer == "bpe:8192"
    assert TrainConfig.preset("nano").tokenizer == "bytes"
    with pytest.raises(ValueError, match="field of TrainConfig is 'lr'"):
        TrainConfig.preset("nano", lr=1.0)


# Interrupts ----------------------------------------------------------------------------------


def test_the_first_signal_is_noted_the_second_stops():
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Interrupt(patient=True) as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
