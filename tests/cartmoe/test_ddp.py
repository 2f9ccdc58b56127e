"""Two processes under torchrun are one process that accumulates over the same micro-batches."""

import dataclasses
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from cartmoe import load
from cartmoe.checkpoint import read_optimizer
from cartmoe.distributed import Ranks, ranks
from cartmoe.objective import Gradient
from cartmoe.train import train

# A group that outlives its block has threads that may meet the interpreter's end, which aborts it.
LEAVES_NO_GROUP = """
import sys, weakref
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from cartmoe.distributed import ranks

with ranks("cpu"):
    group = weakref.ref(dist.group.WORLD)
    DistributedDataParallel(torch.nn.Linear(2, 1))(torch.ones(3, 2)).sum().backward()
    assert group() is not None
sys.exit("the group is still there" if group() is not None else 0)
"""


def torchrun(*arguments):
    """A Python program in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}  # those of torch's launcher
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_two_processes(tiny_run, tmp_path):
    # Everything that could differ: noise, biases, losses over the whole step.
    settings = dict(router_noise=0.5, score="sigmoid", balance=1.0, z_loss=0.01, steps=4)
    model_config, config = tiny_run(**settings, accumulate=2)
    alone = train(model_config, config, tmp_path / "alone", progress=False)
    together = tmp_path / "together"
    settings = model_config.to_dict() | dataclasses.asdict(config) | {"accumulate": 1}
    options = [f"--set={name}={json.dumps(v)}" for name, v in settings.items() if name != "family"]
    done = torchrun(
        "-m", "cartmoe", "train", f"--family={model_config.family}", f"--out={together}", *options
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((together / "run.json").read_text())["found"]["processes"] == 2
    a, b = load(alone).state_dict(), load(together).state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    a, b = read_optimizer(alone), read_optimizer(together)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6, msg=name)
    tables = [pd.read_csv(out / "metrics.csv") for out in (alone, together)]
    a, b = (table.drop(columns="tokens_per_second") for table in tables)
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    assert b.step.tolist() == [1, 2, 3, 4]


def test_the_group_ends_with_its_block(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LEAVES_NO_GROUP)
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr


def test_a_batch_that_cannot_be_shared(tiny_model, tiny_run):
    config = tiny_run(batch_size=4, accumulate=2)[1]
    with pytest.raises(ValueError, match="multiple of accumulate times the number of processes"):
        Gradient(tiny_model(), config, Ranks(0, 4, "cpu"))


def test_alone():
    with ranks("cpu") as group:
        assert group == Ranks(0, 1, "cpu")
        assert group.first
        assert group.any(True)
        assert not group.any(False)
        assert group.from_first("x") == "x"
        assert torch.equal(group.sum(torch.ones(2)), torch.ones(2))
