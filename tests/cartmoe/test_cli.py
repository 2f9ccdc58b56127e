"""python -m cartmoe: what it does, and what it says when it cannot."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from cartmoe import FAMILIES, PRESETS, LanguageModel, ModelConfig, load
from cartmoe.__main__ import app
from cartmoe.checkpoint import checkpoint_sha256, read_meta, step_folder
from cartmoe.info import describe, parts_of
from cartmoe.train import train

from .test_resume import signal_after

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = ["d_model=32", "ffn_width=64", "num_layers=2", "num_heads=2", "num_experts=4"]


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args):
    """The one line on stderr of a command that fails as it should."""
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def train_args(texts, token_cache, tmp_path):
    """train_args(*more): of a tiny run in tmp_path/run."""
    args = ["train", "--corpus", texts, "--out", tmp_path / "run", "--precision", "fp32"]
    args += ["--batch-size", 4, "--length", 32, *(f"--set={setting}" for setting in TINY)]
    return lambda *more: [*args, *more]


# train ---------------------------------------------------------------------------------------


def test_train(train_args, tmp_path):
    more = ["--family", "smoe_share", "--steps", 3, "--seed", 5, "--lr", 0.01]
    more += ["--set", "top_k=[1]", "--set", "balance=0.5", "--set", "score=sigmoid"]
    result = invoke(*train_args(*more))
    assert result.exit_code == 0
    assert "3/3" in result.stderr
    model, meta = load(tmp_path / "run"), read_meta(tmp_path / "run")
    assert (model.config.family, model.config.top_k, model.config.score) == (
        "smoe_share",
        (1,),
        "sigmoid",
    )
    assert (meta["step"], meta["train_seed"], meta["length"]) == (3, 5, 32)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["asked"]["train"]
    assert (settings["balance"], settings["learning_rate"]) == (0.5, 0.01)
    result = invoke(*train_args(*more))
    assert result.exit_code == 0
    assert "is finished" in result.stdout


def test_train_without_a_bar(train_args, tmp_path):
    result = invoke(*train_args("--steps", 1, "--no-progress"))
    assert (result.exit_code, result.output) == (0, "")
    assert read_meta(tmp_path / "run")["step"] == 1


def test_ctrl_c_and_the_same_command_again(train_args, tmp_path):
    args = train_args("--steps", 8, "--checkpoint-every", 1)
    thread = signal_after(2, tmp_path / "run", signal.SIGINT)
    result = invoke(*args)
    thread.join()
    assert result.exit_code == 130
    assert "of 8, which is saved in" in result.stderr.splitlines()[-1]
    step = read_meta(tmp_path / "run")["step"]
    assert 2 <= step < 8
    assert invoke(*args).exit_code == 0
    assert read_meta(tmp_path / "run")["step"] == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--family", "sparse"], "family is 'sparse'; choose one of 'dense', "),
        (["--preset", "tiny"], "preset is 'tiny'; choose one of 'micro', 'nano', "),
        (["--corpus", "/nowhere"], "/nowhere"),
        (["--tokenizer", "/nowhere"], "tokenizer is '/nowhere'; give 'bytes'"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--set", "width=3"], "--set is 'width'; choose one of 'accumulate', "),
        (["--set", "family=dense"], "--set is 'family'; choose one of"),
        (["--set", "top_k"], "--set is 'top_k'; write field=value"),
        (["--set", "learning_rate=fast"], "learning_rate is 'fast'; it must be a finite number"),
        (["--set", "steps=1.5"], "steps is 1.5; it must be a whole number"),
        (["--set", "betas=3"], "betas is 3; it must be a list"),
        (["--steps", "2", "--set", "steps=3"], "steps is given as an option and with --set"),
    ],
)
def test_train_refuses(train_args, more, message):
    assert message in refused(*train_args(*more))


def test_an_out_that_is_a_file(train_args, tmp_path):
    (tmp_path / "file").write_text("x")
    assert refused(*train_args("--out", tmp_path / "file")).endswith(
        "file is a file; name a directory"
    )


@pytest.mark.filterwarnings("default")
def test_a_damaged_checkpoint_is_one_line_of_warning(train_args, tmp_path):
    args = train_args("--steps", 4, "--checkpoint-every", 2)
    assert invoke(*args).exit_code == 0
    (step_folder(tmp_path / "run", 4) / "model.safetensors").write_bytes(b"")
    result = invoke(*args)
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "model.safetensors has 0 bytes" in line
    assert line.endswith("step-00000002 is used instead")
    assert read_meta(tmp_path / "run")["step"] == 4


def test_another_configuration_in_the_same_directory(train_args):
    assert invoke(*train_args("--steps", 1)).exit_code == 0
    line = refused(*train_args("--steps", 2, "--lr", 0.5))
    assert "steps is 1 there, 2 asked for; learning_rate is 0.002 there, 0.5 asked for" in line


def test_weights_that_explode(train_args):
    result = invoke(*train_args("--steps", 20, "--lr", 1e30))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: step 2: ")


# info ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_info_of_presets(family):
    for preset in PRESETS:
        config = ModelConfig.preset(preset, family)
        with torch.device("meta"):
            model = LanguageModel(config)
        parts = parts_of(config, 256)
        assert sum(p.parameters for p in parts) == model.num_parameters()
        assert sum(p.active for p in parts) == model.num_parameters(active=True)
        text = invoke("info", preset, "--family", family).stdout
        assert f"{model.num_parameters():,} total" in text
        assert f"{model.num_parameters(active=True):,} active" in text


def test_flops_are_those_that_torch_counts():
    config, L = ModelConfig.preset("nano", "dense"), 16
    model = LanguageModel(config)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # it does not know the fused kernel of the CPU
        torch.no_grad(),
    ):
        model(torch.randint(256, (1, L)))
    # It counts attention to all positions, also those that the mask hides.
    hidden = config.num_layers * 2 * config.d_model * (L - 1) * L
    assert sum(p.flops for p in parts_of(config, L)) * L == counter.get_total_flops() - hidden


def test_flops_of_routed_layers_are_those_of_a_dense_layer_of_the_activated_width():
    """Plus router, mix and their like: under one percent."""

    def flops(family, **changes):
        return sum(p.flops for p in parts_of(ModelConfig.preset("base", family, **changes), 256))

    routed = flops("smoe_share", moe_interval=1)
    assert routed == pytest.approx(flops("dense", ffn_width=3 * 3072), rel=0.01)
    assert flops("cartesian") == pytest.approx(flops("smoe_share"), rel=0.01)


def test_info_with_settings():
    text = invoke("info", "nano", "--set", "num_experts=8", "--set", "composition=parallel").stdout
    assert "2 x (8 experts of 256, top-2), parallel" in text
    assert describe(ModelConfig.preset("nano", "top_p")).count("top-p 0.4") == 2


def test_info_of_a_run_and_a_checkpoint(tiny_run, tmp_path):
    out = train(*tiny_run(steps=2), tmp_path / "run", progress=False)
    for path in (out, step_folder(out, 2)):
        text = invoke("info", path).stdout
        assert checkpoint_sha256(out) in text
        assert "length 32" in text
        assert f"{load(out).num_parameters():,} total" in text
    (step_folder(out, 2) / "model.safetensors").write_bytes(b"")
    assert "model.safetensors has 0 bytes" in refused("info", step_folder(out, 2))


def test_info_refuses(tmp_path):
    assert "'mini' is no checkpoint, no run, and no preset (micro, nano, small," in refused(
        "info", "mini"
    )
    assert "is not a whole checkpoint: manifest.json is missing" in refused("info", tmp_path)
    assert "--set steps: info has no use for it" in refused("info", "nano", "--set", "steps=2")
    assert "--set is for presets" in refused("info", tmp_path, "--set", "top_k=1")


# import --------------------------------------------------------------------------------------


def test_import(tmp_path):
    with safe_open(GOLDENS / "hash.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        (tmp_path / "config.json").write_text(file.metadata()["config"])
    weights = {k[2:]: t for k, t in tensors.items() if k.startswith("w.")}
    save_file(weights, tmp_path / "model.safetensors")
    result = invoke("import", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "out: hash, " in result.stdout
    logits = load(tmp_path / "out")(tensors["input_ids"])
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    assert "out exists already" in refused("import", tmp_path, "--out", tmp_path / "out")
    file = tmp_path / "config.json"
    assert "is a file; name a directory" in refused("import", tmp_path, "--out", file)
    assert "has no config.json" in refused("import", tmp_path / "no", "--out", tmp_path / "b")


# The process ---------------------------------------------------------------------------------


def test_the_module_runs():
    command = [sys.executable, "-m", "cartmoe", "info", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: 'nope' is no checkpoint")
    assert done.stderr.count("\n") == 1
