"""python -m benchmarks.sizes OUT [--seconds 240]: shapes and recipes at equal CPU time.

Each is trained for as many steps as one thread takes in that time, its whole schedule within them,
in fp32, and measured on documents that it was not trained on. What is in OUT already is not done
again.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import analysis as an
from cartmoe.config import ModelConfig
from cartmoe.train import TrainConfig, train

BASE: dict[str, Any] = dict(
    family="cartesian",
    d_model=64,
    ffn_width=256,
    num_layers=2,
    num_heads=4,
    num_experts=16,
    moe_interval=1,
    batch_size=16,
    learning_rate=4e-3,
)
RECIPE = ("batch_size", "learning_rate")
TRIALS: list[dict[str, Any]] = [
    {},
    {"learning_rate": 2e-3},
    {"learning_rate": 8e-3},
    {"batch_size": 8},
    {"batch_size": 32},
    {"num_experts": 8},
    {"ffn_width": 128},
    {"ffn_width": 64},
    {"ffn_width": 128, "d_model": 96},
    {"ffn_width": 128, "num_layers": 3},
    {"ffn_width": 128, "num_layers": 4, "moe_interval": 2},
]
PROBE = 12  # steps that tell the speed


def configs(trial: dict[str, Any], steps: int) -> tuple[ModelConfig, TrainConfig]:
    """Of the model and of its training."""
    settings = BASE | trial
    recipe = {name: settings.pop(name) for name in RECIPE}
    recipe |= dict(steps=steps, precision="fp32", checkpoint_every=10**6, keep=1)
    return ModelConfig(vocab_size=256, **settings), TrainConfig(**recipe)


def measured(trial: dict[str, Any], seconds: float, out: Path) -> dict[str, Any]:
    """Train, and measure bits per byte on what was held out; kept in `out`."""
    name = ",".join(f"{key}={value}" for key, value in trial.items()) or "base"
    kept = out / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        model, recipe = configs(trial, PROBE)
        run = train(model, recipe, Path(folder, "probe"), progress=False)
        speed = statistics.median(pd.read_csv(run / "metrics.csv").tokens_per_second[2:])
        tokens = recipe.batch_size * recipe.length
        model, recipe = configs(trial, int(seconds * speed / tokens))
        run = train(model, recipe, Path(folder, "run"), progress=False)
        metrics = pd.read_csv(run / "metrics.csv")
        trained = an.load(run)
    docs = an.documents(
        "stdlib", trained, length=256, limit=128, max_tokens_per_document=2048, split="validation"
    )
    clean = an.sweep(trained, docs, [], controls=False, progress=False).clean().iloc[0]
    row = dict(
        trial=name,
        parameters=sum(p.numel() for p in trained.model.parameters()),
        tokens_per_second=round(metrics.tokens_per_second.median()),
        tokens=recipe.steps * tokens,
        train_nats=round(metrics.loss[-50:].mean(), 4),
        bits_per_byte=round(clean.bits_per_byte, 4),
    )
    kept.write_text(json.dumps(row))
    return row


def main(
    out: Path,
    seconds: Annotated[float, typer.Option(help="Of training, each.")] = 240,
    workers: Annotated[int, typer.Option(help="Processes of one thread.")] = os.cpu_count() or 1,
) -> None:
    """Shapes and recipes at equal CPU time."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measured, t, seconds, out) for t in TRIALS]):
            rows.append(future.result())
            print(rows[-1], file=sys.stderr)
    print(pd.DataFrame(rows).sort_values("bits_per_byte").to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
