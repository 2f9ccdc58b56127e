"""What a study would do, and about how long it would take: `run --dry-run`.

Cells are counted as `run` would count them. Times come from a probe: of every model, one small
batch under one condition of each kind (perturbation, first perturbed segment, effect, downstream,
table or none), and one small training step; a model that is not trained yet is probed with random
weights, since the time does not depend on them; of one that is larger than memory, or not there
yet, its configuration tells (`analysis.study.larger`). Nothing is written.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.adapters import Adapter, adapt
from analysis.measure import calibrate, measure
from analysis.perturb import CLEAN, Condition
from analysis.study.folder import STORE
from analysis.study.models import Checkpoint, run_folder
from analysis.study.plan import Plan
from analysis.study.provenance import default_device
from analysis.study.run import check_executor, threads_of, trainers_of
from analysis.study.specs import ModelSpec
from analysis.study.store import Store
from analysis.study.study import Study
from analysis.study.texts import Texts
from analysis.study.told import by_configuration, spoken, told
from analysis.study.unlike import why_others
from analysis.study.worker import autocast, numerics, opened
from cartmoe.checkpoint import read_meta, run_checkpoints
from cartmoe.distributed import Ranks
from cartmoe.files import path_of
from cartmoe.folders import check_directory
from cartmoe.model import LanguageModel
from cartmoe.objective import Gradient
from cartmoe.precision import probe_precision

PROBE = 4  # sequences


def dry_run(
    study: Study,
    out: str | Path,
    threads: int | None = None,
    executor: Callable[[], Executor] | None = None,
) -> str:
    """What `run` would do, as text. Raises as `run` does for mistakes."""
    out = path_of("out", out)
    check_directory(out)
    check_executor(executor)
    chosen = threads_of(study, executor, threads)
    kept: dict[str, dict[str, Any]] = {}
    if (out / STORE).is_file():
        with Store(out / STORE, readonly=True) as store:
            finished = store.keys()
            kept = {key: of for key, of in store.identities().items() if key in finished}
    larger = [spec for spec in study.models if by_configuration(spec)]
    others = tuple(spec for spec in study.models if spec not in larger)
    said: list[str] = []
    if others:
        said += _probed(Plan.of(replace(study, models=others), chosen), out, kept, executor)
    said += [told(study, spec, out, kept, chosen) for spec in larger]
    return "\n".join(said)


def _probed(
    plan: Plan,
    out: Path,
    kept: Mapping[str, dict[str, Any]],
    executor: Callable[[], Executor] | None,
) -> list[str]:
    """What is said of models that are there, or are to be trained."""
    study = plan.study
    with (
        torch.random.fork_rng(),
        numerics(plan.platform(study.models[0])),
        autocast(study.measure.precision),
    ):
        found = plan.find(out)
        rows = [
            _estimate(plan, spec, checkpoint, out, kept.keys())
            for spec, checkpoint in zip(study.models, found, strict=True)
        ]
        planned = [cell for there in found if there for cell in plan.work(there).cells]
    return [_describe(plan, pd.DataFrame(rows), executor), *why_others(planned, kept)]


def _estimate(
    plan: Plan,
    spec: ModelSpec,
    checkpoint: Checkpoint | None,
    out: Path,
    finished: Collection[str],
) -> dict[str, Any]:
    """Of one model: cells, and seconds in one process; steps that are left to train, and seconds of
    all of them."""
    arms, text = plan.subject(spec, checkpoint).arms, plan.text(spec)
    seconds, steps, training = 0.0, 0, 0.0
    if checkpoint:
        planned = plan.work(checkpoint).cells
        missing = [(cell.shard, cell.condition) for cell in planned if cell.key not in finished]
    else:
        missing = list(itertools.product(range(len(text.shards)), arms))
        steps, training = _training(spec, run_folder(out, spec))
    if missing:
        if checkpoint:
            model = opened(checkpoint.path.resolve(), checkpoint.identity, spec.name)
        else:
            model = adapt(LanguageModel(spec.config).to(default_device()).eval())
        model.tokenizer = text.corpus.tokenizer
        once, each = _probe(plan, text, model, arms)
        seconds = once + sum(each[arm] * len(text.shards[shard]) for shard, arm in missing)
    cells, name = len(text.shards) * len(arms), f"{spec.name} (seed {spec.train_seed})"
    left = {"finished": cells - len(missing), "missing": len(missing), "measuring": seconds}
    of = {"model": name, "shards": len(text.shards), "cells": cells}
    return {**of, **left, "steps": steps, "training": training}


def _probe(
    plan: Plan, text: Texts, model: Adapter, arms: dict[Condition, bool]
) -> tuple[float, dict[Condition, float]]:
    """(seconds of calibration, seconds a sequence of every arm)."""
    batch = text.shards[0][: min(PROBE, plan.study.measure.batch_size)]
    depth = {site: i for i, segment in enumerate(model.segments()) for site in segment.sites}

    def kind(arm: Condition) -> tuple:
        segment = min(depth[site] for site in depth if arm.where(site))
        return (type(arm.perturbation), segment, arm.effect, arm.downstream, arms[arm])

    kinds = {arm: kind(arm) for arm in arms if arm != CLEAN}
    of_kind = {kind: arm for arm, kind in kinds.items()}
    measure(model, [], batch, batch_size=len(batch))  # warms up
    calibration, start = None, time.perf_counter()
    if depth:
        calibration = calibrate(model, text.calibration[: len(batch)], batch_size=len(batch))
    once = (time.perf_counter() - start) * len(text.calibration) / len(batch)
    cells = measure(
        model,
        list(of_kind.values()),
        batch,
        batch_size=len(batch),
        calibration=calibration,
        reuse=frozenset(arm for arm in of_kind.values() if arms[arm]),
        keep_tokens=plan.study.measure.tokens,
    )
    seconds = {cell.condition: cell.seconds / len(batch) for cell in cells}
    return once, {arm: seconds[of_kind[kinds[arm]] if arm in kinds else CLEAN] for arm in arms}


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
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, enabled=False):
            gradient(tokens_BL, 0)[0].sum().item()
    seconds = time.perf_counter() - start
    return left, seconds * left * config.batch_size / rows


def _describe(plan: Plan, rows: pd.DataFrame, executor: Callable[[], Executor] | None) -> str:
    trainers = max(1, min(trainers_of(plan.study, executor, plan.threads), (rows.steps > 0).sum()))
    workers = getattr(executor, "workers", None) or 1
    table = rows.assign(
        cells=[
            f"{shards} shards x {cells // shards} = {cells}"
            for shards, cells in zip(rows.shards, rows.cells, strict=True)
        ],
        measuring=rows.measuring.map(spoken),
        training=rows.training.map(spoken),
    ).drop(columns="shards")
    return f"""\
Study {plan.study.name!r}: {len(rows)} models, {rows.cells.sum()} cells, \
{rows.finished.sum()} finished, {rows.missing.sum()} missing
{table.to_string(index=False)}
Training, {"side by side" if trainers > 1 else "one model after the other"}: about \
{spoken(side_by_side(rows.training, trainers))}
Measuring with {workers} process{"es" * (workers > 1)} of {plan.threads} \
thread{"s" * (plan.threads > 1)}: about {spoken(rows.measuring.sum() / workers)}
Estimated from one batch of {min(PROBE, plan.study.measure.batch_size)} sequences a model and \
kind of condition, and one training step of as many (models not trained yet: with random \
weights); nothing was written."""


def side_by_side(seconds: Iterable[float], workers: int) -> float:
    """Until the last is done, if who is free takes the next."""
    ends = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)
