"""Running a study: train what is to be trained, measure what is missing, keep every cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from analysis.adapters.base import Adapter
from analysis.adapters.cartmoe import CartMoEAdapter
from analysis.conditions import Condition, Where
from analysis.identity import default_device, manifest, platform_identity
from analysis.intervene import calibrate
from analysis.measure import measure
from analysis.results import FACTS, Results, facts_of, key_columns
from analysis.stats.pairs import CHECKPOINT
from analysis.store import Store, cell_key
from analysis.study import ModelSpec, Study, study_dict
from cartmoe.checkpoint import checkpoint_sha256, load, newest, read_config, read_tokenizer
from cartmoe.corpora import CORPORA
from cartmoe.data import Corpus, Sequences, prepare, sequences
from cartmoe.files import write_atomically
from cartmoe.train import train


@dataclass(frozen=True)
class _Checkpoint:
    """A model of the study that is there to be measured."""

    spec: ModelSpec
    path: Path
    identity: str

    def load(self) -> CartMoEAdapter:
        model = load(self.path).to(default_device())
        return CartMoEAdapter(
            model.eval(),
            name=self.spec.name,
            train_seed=self.spec.train_seed,
            identity=self.identity,
        )


def run(study: Study, out: str | Path, progress: bool = True) -> Results:
    """Do what of the study is not done yet in `out`, and return its results.

    A run that was stopped, however, goes on where it was: training from its last checkpoint, the
    measurement with the first cell that is not in `out`/results.sqlite.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    say = (lambda text: tqdm.write(text)) if progress else (lambda text: None)
    # What can fail at once comes before training, which may take hours.
    corpus = prepare(study.data.corpus, study.data.tokenizer)
    _check_given(study, corpus)
    limits = dict(length=study.data.length, max_tokens_per_document=study.data.max_tokens)
    docs = sequences(corpus, split=study.data.split, limit=study.data.documents, **limits)
    if study.data.corpus in CORPORA:
        docs = docs.by_group(corpus)
    slice_ = sequences(corpus, split="train", limit=study.measure.calibration, **limits)
    size = study.data.shard
    shards = [docs[i : i + size] for i in range(0, len(docs), size)]
    plan = _Plan(study, shards, slice_)
    with Store(out / "results.sqlite") as store:
        checkpoints = [
            _ready(spec, out, i, len(study.models), say, progress)
            for i, spec in enumerate(study.models, 1)
        ]
        work = [plan.of(checkpoint) for checkpoint in checkpoints]
        finished = store.keys()
        _write_plan(out, study, work)
        missing = sum(len(w.missing(finished)) for w in work)
        if missing:
            say(f"measuring {missing} of {sum(len(w.cells) for w in work)} cells")
        with tqdm(total=missing, unit="cell", disable=not (progress and missing)) as bar:
            for w in work:
                bar.set_description(w.checkpoint.spec.name)
                # Asked for anew: two models may be one, and another process may measure too.
                w.measure(study, shards, slice_, store, store.keys(), bar.update)
    return read(out)


def _check_given(study: Study, corpus: Corpus) -> None:
    """Raise for a checkpoint of the study that is damaged or cannot read the study's tokens."""
    for spec in study.models:
        if not spec.path:
            continue
        path = newest(spec.path)
        tokenizer, size = read_tokenizer(path), read_config(path).vocab_size
        if tokenizer and tokenizer.identity != corpus.tokenizer.identity:
            raise ValueError(
                f"model {spec.name!r} reads tokens of {tokenizer.name!r}; those of the study are "
                f"of {study.data.tokenizer!r} (data.tokenizer)"
            )
        if size < corpus.vocab_size:
            raise ValueError(
                f"model {spec.name!r} has a vocabulary of {size}; data.tokenizer "
                f"{study.data.tokenizer!r} needs {corpus.vocab_size}"
            )


def _ready(spec: ModelSpec, out: Path, number: int, of: int, say, progress: bool) -> _Checkpoint:
    """Train the model if it is one to be trained and is not yet."""
    if spec.path:
        path = newest(spec.path)
    else:
        folder = out / "models" / f"{spec.name}-s{spec.train_seed}"
        say(f"[{number}/{of}] {spec.name}, seed {spec.train_seed}: {folder}")
        path = newest(train(spec.config, spec.train, folder, progress=progress))
    return _Checkpoint(spec, path, checkpoint_sha256(path))


class _Plan:
    """Which cells a study has, each with its whole identity."""

    def __init__(self, study: Study, shards: Sequence[Sequences], calibration: Sequences):
        self.study, self.calibration = study, calibration
        self.shard_hashes = [shard.sha256 for shard in shards]
        self.common = platform_identity(default_device()) | {
            "batch_size": study.measure.batch_size,
            "precision": study.measure.precision,
        }

    def of(self, checkpoint: _Checkpoint) -> _Work:
        """The cells of one model: the clean run and every condition that it has a router for."""
        model = checkpoint.load()
        conditions = [None, *conditions_for(model, self.study.conditions)]
        cells = {}
        for shard, shard_sha256 in enumerate(self.shard_hashes):
            for condition in conditions:
                identity = self.common | {
                    "model": checkpoint.identity,
                    "data": shard_sha256,
                    "condition": condition.to_dict() if condition else None,
                    "calibration": self.calibration.sha256 if condition else None,
                }
                cells[cell_key(identity)] = (shard, condition, identity)
        return _Work(checkpoint, model.family, facts_of(model), cells)


def conditions_for(model: Adapter, conditions: Sequence[Condition]) -> list[Condition]:
    """Those that perturb a router of the model, leaving out a part that is the whole: in a model
    of one stage a layer, "stage 0" is "all"."""
    sites = model.sites()

    def chosen(where: Where) -> int:
        return sum(map(where, sites))

    return [
        c for c in conditions
        if chosen(c.where)
        and (c.where.stage is None or c.where.layer is not None or chosen(c.where) < len(sites))
    ]  # fmt: skip


@dataclass(frozen=True)
class _Work:
    """The cells of one model by key: (shard, condition, identity)."""

    checkpoint: _Checkpoint
    family: str
    facts: list[dict[str, Any]]
    cells: dict[str, tuple[int, Condition | None, dict[str, Any]]]

    def missing(self, finished: set[str]) -> list[str]:
        return [key for key in self.cells if key not in finished]

    def measure(self, study, shards, slice_, store, finished, advance: Callable[[int], None]):
        missing = set(self.missing(finished))
        if not missing:
            return
        model = self.checkpoint.load()
        bf16 = study.measure.precision == "bf16"
        with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
            calibration = calibrate(model, slice_) if model.sites() else None
            for number, shard in enumerate(shards):
                todo = [
                    (c, i) for k, (s, c, i) in self.cells.items() if s == number and k in missing
                ]
                if not todo:
                    continue
                conditions = [c for c, _ in todo if c]
                identities = {c: identity for c, identity in todo}
                for cell in measure(
                    model,
                    conditions,
                    shard,
                    batch_size=study.measure.batch_size,
                    calibration=calibration,
                ):
                    if cell.condition in identities:  # the clean run may be stored already
                        store.add(identities[cell.condition], cell)
                        advance(1)


def _write_plan(out: Path, study: Study, work: Sequence[_Work]) -> None:
    """plan.json names every cell, so that results can be read without the models or the data."""
    plan = {
        "study": study_dict(study),
        "manifest": manifest(),
        "facts": [row for w in work for row in w.facts],
        # A list: one checkpoint under two names has the same cells twice.
        "cells": [
            {"key": key, "shard": shard}
            | key_columns(w.checkpoint.spec.name, w.family, w.checkpoint.spec.train_seed, condition)
            for w in work
            for key, (shard, condition, _) in w.cells.items()
        ],
    }
    write_atomically(out / "plan.json", json.dumps(plan, indent=1))


def plan_path(out: Path) -> Path:
    """Where the plan of a study's directory is; `FileNotFoundError` if there is none."""
    path = out / "plan.json"
    if not path.is_file():
        raise FileNotFoundError(f"{out} holds no study (no plan.json); run one with --out {out}")
    return path


def read(out: str | Path) -> Results:
    """The results in a study's directory, finished or not; of an unfinished one those that can be
    paired.

    Raises `FileNotFoundError` if there is no study, `ValueError` if nothing is measured yet.
    """
    out = Path(out)
    path = plan_path(out)
    try:
        plan = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run the study again") from error
    cells = pd.DataFrame(plan["cells"])
    with Store(out / "results.sqlite") as store:
        finished = cells[cells.key.isin(store.keys())]
        parts = [_paired(part) for _, part in finished.groupby(CHECKPOINT, sort=False)]
        if not sum(map(len, parts)):
            raise ValueError(
                f"{out}: {len(finished)} of {len(cells)} cells are measured, and no clean run; "
                "there is nothing to read"
            )
        columns = pd.concat(parts).drop(columns="shard")
        tables = {
            name: columns.merge(store.read(name, columns.key), on="key").drop(columns="key")
            for name in ("losses", "routing")
        }
    return Results(
        **tables,
        facts=pd.DataFrame(plan["facts"], columns=FACTS),
        finished=len(finished),
        planned=len(cells),
    )


def _paired(cells: pd.DataFrame) -> pd.DataFrame:
    """Of one model's finished cells a largest product of shards and conditions, the clean run
    among them: a condition is compared with the clean run on the same documents."""
    shards = cells.groupby("condition").shard.agg(frozenset)
    clean = shards.get("clean", frozenset())

    def measured_on(wanted: frozenset[int]) -> list[str]:
        return [condition for condition, have in shards.items() if wanted <= have]

    candidates = [have for have in shards if have <= clean]
    best = max(candidates, key=lambda s: (len(s) * len(measured_on(s)), len(s)), default=clean)
    return cells[cells.shard.isin(best) & cells.condition.isin(measured_on(best))]
