"""One training run over its checkpoints: when routing settles, and how robustness and overlap grow.

A run keeps its newest checkpoints alone, two unless it is told otherwise: with
`TrainConfig(steps=1000, checkpoint_every=100, keep=10)` it keeps all. Shapes: T tokens, E experts,
U units of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from analysis.adapters import DenseRouting, batches, load
from analysis.measure import Asked, sweep
from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics import MAX_UNITS, Metric, UnitSums, estimate, usage
from analysis.overlap.request import check_run
from analysis.overlap.routed import decisions, of_tokens
from analysis.overlap.tables import Overlap, site_columns
from analysis.stats import CHECKPOINT, check_confidence
from cartmoe.checkpoint import run_checkpoints, step_of
from cartmoe.config import check_choice
from cartmoe.data import Sequences
from cartmoe.files import path_of
from cartmoe.routing import Routing
from cartmoe.run import read_run

TOGETHER = 4  # checkpoints in memory at once beside the last one, which runs anew for each lot


def saturation(
    run_folder: str | Path,
    docs: Sequences,
    *,
    sites: Any = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    progress: bool = True,
) -> pd.DataFrame:
    """How much of the routing of a run's newest checkpoint each of its checkpoints has already.

    sites   as in `measure_overlap`

    A row a checkpoint and site: model, family, train_seed, step, layer, stage,
    value       mean over tokens of |S_t and S| / |S|, S_t and S being the experts that this and the
                newest checkpoint use (OLMoE, arXiv 2409.02060, eq. 5); tokens of which the newest
                uses none are left out
    low, high   jackknife over documents (more than 32 are left out several at once)
    null        the same if which tokens experts are used for had nothing to do with each other, at
                the loads of both: sum_e P(e in S_t) E[1(e in S) / |S|]

    Decisions are compared batch by batch, so memory does not grow with the documents. Raises
    `FileNotFoundError` for a folder that is no run, `ValueError` for a run with fewer than two
    checkpoints or without routers, unknown sites, and no documents.
    """
    folders = _checkpoints(run_folder)
    check_confidence(confidence)
    last, chosen = check_run(load(folders[-1]), docs, sites, batch_size)
    unit_of = {d: number % MAX_UNITS for number, d in enumerate(dict.fromkeys(docs.document_id))}
    units = max(unit_of.values()) + 1
    sums = {(folder, site): UnitSums(units) for folder in folders for site in chosen}
    with tqdm(total=len(docs) * len(folders), unit="sequence", disable=not progress) as bar:
        for first in range(0, len(folders), TOGETHER):
            models = {folder: load(folder) for folder in folders[first : first + TOGETHER]}
            for batch in batches(last, docs, batch_size):
                unit_T = of_tokens(batch, unit_of)
                final = decisions(last, batch, chosen)
                for folder, model in models.items():
                    now = decisions(model, batch, chosen) if folder != folders[-1] else final
                    for site in chosen:
                        _add(sums[folder, site], unit_T, now[site], final[site])
                    bar.update(len(batch))
    rows = []
    for (_, site), own in sums.items():
        found = estimate(SATURATION, own, confidence)._asdict()
        rows.append(site_columns(last, site) | {n: float(value) for n, value in found.items()})
    return _at(pd.DataFrame(rows), [step_of(folder) for folder, _ in sums])


SATURATION = Metric(
    "usage",
    "sites",
    lambda sums: sums["both"] / sums["tokens"],
    "experts of the newest checkpoint used now",
    lambda sums: (sums["now"] * sums["final"]).sum(-1) / sums["tokens"] ** 2,
)


def _add(sums: UnitSums, unit_T: Tensor, now: Routing, final: Routing) -> None:
    """Of the tokens that use experts finally, by unit."""
    now_TE, final_TE = (DenseRouting(routing).used_TE.cpu() for routing in (now, final))
    kept_T = final_TE.any(-1)
    unit_T, now_TE, final_TE = unit_T[kept_T], now_TE[kept_T], final_TE[kept_T]
    both_T, share_TE = usage.saturation_of(now_TE, final_TE), usage.share(final_TE.double())
    tokens_T = torch.ones_like(both_T)
    sums.add_tokens(unit_T, both=both_T, now=now_TE, final=share_TE, tokens=tokens_T)


def _checkpoints(run_folder: str | Path) -> list[Path]:
    """Of a run, oldest first."""
    run = path_of("run_folder", run_folder)
    made = read_run(run)["asked"]["train"]
    folders = run_checkpoints(run)
    if len(folders) < 2:
        raise ValueError(
            f"run {run_folder} has {len(folders)} checkpoint; over training needs two or more. It "
            f"was made with checkpoint_every = {made['checkpoint_every']} and keep = "
            f"{made['keep']}: train with TrainConfig(steps=1000, checkpoint_every=100, keep=10), "
            "say, which keeps all ten"
        )
    return folders


@dataclass(frozen=True)
class Training:
    """What `over_training` measured, tables with a column step.

    damage    as of `Results.damage`
    overlap   as of `measure_overlap`
    """

    damage: pd.DataFrame
    overlap: Overlap

    def __repr__(self) -> str:
        """What was measured, of which model and steps; the tables are attributes."""
        models = ", ".join(self.damage.model.unique())
        return f"Training of {models}, steps {', '.join(map(str, self.steps))}; {self.overlap!r}"

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints."""
        return sorted(self.damage.step.unique().tolist())

    def at(self, step: int) -> Overlap:
        """The overlap of one checkpoint, for what takes one, such as `Overlap.matrix`; `ValueError`
        with the steps that there are."""
        check_choice("step", step, self.steps)
        return self.overlap.map(lambda table: table[table.step == step].reset_index(drop=True))


def over_training(
    run_folder: str | Path,
    docs: Sequences,
    perturbations: Asked,
    metrics: str | Sequence[str] | None = None,
    *,
    where: str = "all",
    point: Literal["logits", "scores"] = "logits",
    seed: int = 0,
    controls: bool = False,
    sites: Any = None,
    probe: str = "all",
    batch_size: int = 8,
    progress: bool = True,
) -> Training:
    """`sweep` and `measure_overlap` at every checkpoint of a run, which are in use one at a time.

    The parameters are theirs. Raises as they and `saturation` do.
    """
    damages, overlaps = [], []
    options: Any = dict(batch_size=batch_size, seed=seed, progress=False)
    conditions: Any = dict(where=where, point=point, controls=controls)
    for folder in tqdm(_checkpoints(run_folder), unit="checkpoint", disable=not progress):
        model, step = load(folder), step_of(folder)
        results = sweep(model, docs, perturbations, **conditions, **options)
        damages.append(_at(results.damage(full=True), step))
        overlap = measure_overlap(model, docs, metrics, sites, probe, **options)
        overlaps.append(overlap.map(partial(_at, step=step)))
    return Training(pd.concat(damages, ignore_index=True), Overlap.join(overlaps))


def _at(table: pd.DataFrame, step: int | list[int]) -> pd.DataFrame:
    """The table with a column step behind those that name the model."""
    table = table.copy()
    table.insert(len(CHECKPOINT), "step", step)
    return table
