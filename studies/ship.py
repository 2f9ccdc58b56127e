"""python -m studies.ship RUNS: the finished models of studies/models.toml as the project keeps
them, in cartmoe/models, and what is to be said of each.

A model is put there once; of those that are there already only the table is made again.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import analysis as an
from analysis.measure import measure
from analysis.measure.results import join
from analysis.perturb import Condition
from analysis.report import models_text
from analysis.study.models import run_folder
from benchmarks.ngram import baselines
from cartmoe.checkpoint import load, newest, read_meta, run_checkpoints, save
from cartmoe.corpora import Document
from cartmoe.data import sequences_from
from cartmoe.run import read_run
from cartmoe.shipped import (
    BASELINES,
    CHECK,
    CHECKED,
    MODELS,
    TABLE,
    checked_nats,
    shipped_names,
)
from cartmoe.tokenizers import ByteTokenizer

STUDY = Path(__file__).parent / "models.toml"
SEEDS = (0, 1)  # that fit 40 MB
BIN = 50  # steps that a row of a learning curve is the mean of
LAST = 200  # steps that the balance of load is the mean of


def ship(spec: Any, run: Path) -> None:
    """One model, rounded to bf16, with its curve and the command that made it."""
    checkpoint, asked = newest(run), read_run(run)
    meta = read_meta(checkpoint)
    if meta["step"] < meta["steps"] or (MODELS / run.name).exists():
        return
    if others := asked["found"].get("resumed_on"):
        raise ValueError(f"{run} went on on another kind of CPU ({', '.join(others)})")
    dense = meta["family"] == "dense"
    metrics = pd.read_csv(run / "metrics.csv")
    columns = ["step", "loss", "balance", "learning_rate", "gradient_norm", "max_violation"]
    curve = metrics[columns].groupby((metrics.step - 1) // BIN).mean()
    meta |= {
        "command": "make models",
        "model": spec.name,
        "found": asked["found"],
        "train": asked["asked"]["train"],
        "max_violation": None if dense else metrics.max_violation[-LAST:].mean(),
        "train_nats": metrics.loss[-LAST:].mean(),
    }
    text = io.StringIO()
    curve.to_csv(text, index=False, float_format="%.5g")
    save(
        load(checkpoint).to(torch.bfloat16),
        MODELS / run.name,
        meta,
        files={"curve.csv": text.getvalue()},
    )


def checked(name: str) -> float:
    """Nats per byte on the text that is kept for this."""
    text = (MODELS / CHECK).read_text(encoding="utf-8")
    docs = sequences_from([Document("check", "check", "check", text)], ByteTokenizer(), 256)
    model = an.load(name)
    return join([(model, measure(model, [], docs))]).clean().nats.item()


def described(name: str) -> dict[str, Any]:
    """A row of the table."""
    model = an.load(name)
    meta = read_meta(MODELS / name)
    docs = an.documents("stdlib", model, length=256, limit=300, max_tokens_per_document=1024)
    asked = [] if meta["family"] == "dense" else [an.RandomRouting(), an.DropTop(1)]
    stats = an.calibrate(model, docs[:32]) if asked else None
    conditions = [Condition(perturbation) for perturbation in asked]
    results = join([(model, measure(model, conditions, docs, calibration=stats))])
    clean = results.clean().iloc[0]
    row = dict(
        name=name,
        family=meta["family"],
        train_seed=meta["train_seed"],
        parameters=model.model.num_parameters(),
        tokens=meta["tokens"],
        num_documents=clean.num_documents,
        bits_per_byte=clean.bits_per_byte,
        bpb_low=clean.bpb_low,
        bpb_high=clean.bpb_high,
        max_violation=meta["max_violation"],
    )
    damage = results.damage(full=True).set_index("label") if asked else pd.DataFrame()
    for label, column in {"RandomRouting(1)": "random_routing", "DropTop(1)": "drop_top"}.items():
        found = damage.loc[label, ["delta_nats", "low", "high"]] if asked else [None] * 3
        row |= dict(zip([column, f"{column}_low", f"{column}_high"], found, strict=True))
    return row


def main(runs: Path) -> None:
    """All that are finished."""
    for spec in an.Study.read(STUDY).models:
        run = run_folder(runs, spec)
        if spec.train_seed in SEEDS and run_checkpoints(run):
            ship(spec, run)
    names = shipped_names()
    known = checked_nats()  # of those that were there: a change of code is not to be taken over
    nats = {name: known.get(name) or round(checked(name), 6) for name in names}
    (MODELS / CHECKED).write_text(json.dumps(nats, indent=1))
    table = pd.DataFrame([described(name) for name in names])
    table.to_csv(MODELS / TABLE, index=False, float_format="%.6g")
    baselines().to_csv(MODELS / BASELINES, index=False, float_format="%.4f")
    print(models_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
