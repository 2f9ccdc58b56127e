"""What a study would do, and about how long it would take: `run --dry-run`.

Cells are counted as `run` would count them. Times come from a probe: of every model, one small
batch under one condition of each kind (perturbation, first perturbed segment, effect, downstream,
table or none), and one small training step; a model that is not trained yet is probed with random
weights, since the time does not depend on them. Nothing is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from analysis.adapters import CartMoEAdapter
from analysis.measure import calibrate, measure
from analysis.perturb import CLEAN, Condition
from analysis.study.folder import STORE
from analysis.study.models import Checkpoint, check_sources, configs, find, run_folder
from analysis.study.plan import Plan
from analysis.study.provenance import default_device
from analysis.study.run import threads_of
from analysis.study.specs import ModelSpec
from analysis.study.store import Store
from analysis.study.study import Study
from analysis.study.worker import autocast, numerics
from cartmoe.checkpoint import load, read_meta, run_checkpoints
from cartmoe.distributed import Ranks
from cartmoe.folders import check_directory
from cartmoe.model import LanguageModel
from cartmoe.objective import Gradient
from cartmoe.precision import probe_precision

PROBE = 4  # sequences


@dataclass(frozen=True)
class Estimate:
    """Of one model: cells, and seconds in one process.

    steps   that are left to train, and seconds of all of them
    """

    model: str
    train_seed: int
    shards: int
    arms: int
    missing: int
    seconds: float
    steps: int
    training: float

    @property
    def cells(self) -> int:
        """All of the model."""
        return self.shards * self.arms


def dry_run(study: Study, out: str | Path, workers: int = 1, threads: int | None = None) -> str:
    """What `run` would do with so many workers, as text. Raises as `run` does for mistakes."""
    out = Path(out)
    check_directory(out)
    check_sources(study)
    plan = Plan.of(study, threads_of(study, None, threads))
    found = [find(study, spec, plan.corpus, out) for spec in study.models]
    plan.check(zip(study.models, configs(study, found), strict=True))
    finished: set[str] = set()
    if (out / STORE).is_file():
        with Store(out / STORE) as store:
            finished = store.keys()
    with torch.random.fork_rng(), numerics(plan.platform), autocast(study.measure.precision):
        rows = [
            _estimate(plan, spec, checkpoint, out, finished)
            for spec, checkpoint in zip(study.models, found, strict=True)
        ]
    return _describe(plan, rows, workers)


def _estimate(
    plan: Plan, spec: ModelSpec, checkpoint: Checkpoint | None, out: Path, finished: set[str]
) -> Estimate:
    config = checkpoint.config if checkpoint else spec.config
    arms = plan.arms(spec, config)[1]
    missing = [(shard, arm) for shard in range(len(plan.shards)) for arm in arms]
    if checkpoint:
        cells = plan.work(checkpoint).cells
        missing = [(c.shard, c.condition) for c in cells if c.key not in finished]
    seconds = 0.0
    if missing:
        model = load(checkpoint.path) if checkpoint else LanguageModel(config)
        model = CartMoEAdapter(model.to(default_device()).eval(), plan.corpus.tokenizer)
        once, each = _probe(plan, model, arms)
        seconds = once + sum(each[arm] * len(plan.shards[shard]) for shard, arm in missing)
    steps, training = (0, 0.0) if checkpoint else _training(spec, run_folder(out, spec))
    return Estimate(
        model=spec.name,
        train_seed=spec.train_seed,
        shards=len(plan.shards),
        arms=len(arms),
        missing=len(missing),
        seconds=seconds,
        steps=steps,
        training=training,
    )


def _probe(
    plan: Plan, model: CartMoEAdapter, arms: dict[Condition, bool]
) -> tuple[float, dict[Condition, float]]:
    """(seconds of calibration, seconds a sequence of every arm)."""
    batch = plan.shards[0][: min(PROBE, plan.study.measure.batch_size)]
    first = [i for i, segment in enumerate(model.segments()) for _ in segment.sites]
    sites = model.sites()

    def kind(arm: Condition) -> tuple:
        segment = next(i for i, site in zip(first, sites, strict=True) if arm.where(site))
        return (type(arm.perturbation), segment, arm.effect, arm.downstream, arms[arm])

    of_kind = {kind(arm): arm for arm in arms if arm != CLEAN}
    tabulate = frozenset(arm for arm in of_kind.values() if arms[arm])
    measure(model, [], batch, batch_size=len(batch))  # warms up
    calibration, start = None, time.perf_counter()
    if sites:
        slice_ = plan.calibration[: len(batch)]
        calibration = calibrate(model, slice_, batch_size=len(batch))
    once = (time.perf_counter() - start) * len(plan.calibration) / len(batch)
    cells = measure(
        model,
        list(of_kind.values()),
        batch,
        batch_size=len(batch),
        calibration=calibration,
        tabulate=tabulate,
        keep_tokens=plan.study.measure.tokens,
    )
    seconds = {cell.condition: cell.seconds / len(batch) for cell in cells}
    return once, {arm: seconds[arm if arm == CLEAN else of_kind[kind(arm)]] for arm in arms}


def _training(spec: ModelSpec, folder: Path) -> tuple[int, float]:
    """(steps that are left, their seconds)."""
    config, there = spec.train, run_checkpoints(folder)
    left = config.steps - (read_meta(there[-1])["step"] if there else 0)
    device = default_device()
    precision = config.precision
    if precision == "auto":
        tokens = config.batch_size // config.accumulate * config.length
        precision = probe_precision(spec.config, tokens, device)["precision"]
    rows = min(PROBE, config.batch_size)
    small = replace(config, precision=precision, batch_size=rows, accumulate=1, compile=False)
    gradient = Gradient(LanguageModel(spec.config).to(device), small, Ranks(0, 1, device))
    tokens_BL = torch.randint(spec.config.vocab_size, (rows, config.length + 1))
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, enabled=False):
            gradient(tokens_BL, 0)[0].sum().item()
        seconds = time.perf_counter() - start
    return left, seconds * left * config.batch_size / rows


def _describe(plan: Plan, rows: list[Estimate], workers: int) -> str:
    name = plan.study.name
    table = pd.DataFrame(
        {
            "model": [f"{row.model} (seed {row.train_seed})" for row in rows],
            "cells": [f"{row.shards} shards x {row.arms} = {row.cells}" for row in rows],
            "finished": [row.cells - row.missing for row in rows],
            "missing": [row.missing for row in rows],
            "measuring": [spoken(row.seconds) for row in rows],
            "steps": [row.steps for row in rows],
            "training": [spoken(row.training) for row in rows],
        }
    )
    cells, missing = sum(row.cells for row in rows), sum(row.missing for row in rows)
    measuring, training = sum(row.seconds for row in rows), sum(row.training for row in rows)
    probe = f"{min(PROBE, plan.study.measure.batch_size)} sequences"
    return "\n".join(
        [
            f"Study {name!r}: {len(rows)} models, {cells} cells, {cells - missing} finished, "
            f"{missing} missing",
            table.to_string(index=False),
            f"Training, one model after the other: about {spoken(training)}",
            f"Measuring with {workers} process{'es' * (workers > 1)} of {plan.threads} "
            f"thread{'s' * (plan.threads > 1)}: about {spoken(measuring / workers)}",
            f"Estimated from one batch of {probe} a model and kind of condition, and one training "
            "step of as many (models not trained yet: with random weights); nothing was written.",
        ]
    )


def spoken(seconds: float) -> str:
    """ "3 s", "12 min", "5.2 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
