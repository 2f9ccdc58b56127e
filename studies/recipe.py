"""How the models that come with the project were to be trained: learning rates, and how long.

    python -m studies.recipe --out runs/recipe

trains all nine for a tenth of their steps at three learning rates, and `cartesian` for half of them
with its whole schedule; an hour of one core. The same command goes on where it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analysis.study import Study
from analysis.study.specs import ModelSpec
from cartmoe.train import train

MODELS = Path(__file__).parent / "models.toml"
RATES = (2e-3, 4e-3, 8e-3)
OWN_WARMUP: dict[str, Any] = {"warmup": None}  # a tenth of the steps that a trial has
LAST = 100  # steps that the loss of training is the mean of


def trials() -> dict[str, ModelSpec]:
    """By name of the run, "cartesian-0.002" and so on, and "cartesian-half"."""
    found = {}
    for spec in (s for s in Study.read(MODELS).models if s.train_seed == 0):
        # A checkpoint at the end alone: what is asked is the loss.
        short = replace(spec.train, steps=spec.train.steps // 10, milestones=(), **OWN_WARMUP)
        for rate in RATES:
            found[f"{spec.name}-{rate}"] = replace(spec, train=replace(short, learning_rate=rate))
        if spec.name == "cartesian":
            half = replace(short, steps=spec.train.steps // 2, **OWN_WARMUP)
            found["cartesian-half"] = replace(spec, train=half)
    return found


def learning_rates(out: Path) -> pd.DataFrame:
    """A row a model and rate: nats per byte of the last steps, on training text."""
    rows = []
    for name, spec in trials().items():
        if not name.endswith("-half"):
            loss = pd.read_csv(out / name / "metrics.csv").loss[-LAST:].mean()
            rows.append(dict(model=spec.name, rate=spec.train.learning_rate, train_nats=loss))
    return pd.DataFrame(rows)


def main(out: Annotated[Path, typer.Option(help="Directory of the runs.")]) -> None:
    """Train, and print the losses."""
    for name, spec in trials().items():
        train(spec.config, spec.train, out / name, threads=1)
    table = learning_rates(out).pivot(index="model", columns="rate", values="train_nats")
    typer.echo(table.round(3).to_string())


if __name__ == "__main__":
    typer.run(main)
