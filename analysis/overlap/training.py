"""One training run over its checkpoints: when routing settles, and how robustness and overlap grow.

A run keeps its newest checkpoints alone, two unless it is told otherwise: with
`TrainConfig(steps=1000, checkpoint_every=100, keep=10)` it keeps all. Shapes: T tokens, E experts,
U units of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.adapters import (
    Adapter,
    DenseRouting,
    check_documents,
    clean_routing,
    load,
    routed_adapter,
)
from analysis.measure import Asked, sweep
from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics import MAX_UNITS, Metric, Sums, UnitSums, estimate, usage
from analysis.overlap.tables import Overlap
from analysis.perturb import sites_of
from analysis.stats import check_confidence
from cartmoe.checkpoint import run_checkpoints, step_of
from cartmoe.config import check_choice, check_whole
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
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
    check_whole("batch_size", batch_size, 1)
    check_confidence(confidence)
    last = routed_adapter(load(folders[-1]))
    chosen = sites_of(last, sites)
    check_documents(docs, last)
    unit_of = _units(docs)
    units = max(unit_of.values()) + 1
    sums = {folder: {site: UnitSums(units) for site in chosen} for folder in folders}
    with tqdm(total=len(docs) * len(folders), unit="sequence", disable=not progress) as bar:
        for first in range(0, len(folders), TOGETHER):
            models = {folder: load(folder) for folder in folders[first : first + TOGETHER]}
            for at in range(0, len(docs), batch_size):
                batch = docs[at : at + batch_size]
                unit_S = torch.tensor([unit_of[document] for document in batch.document_id])
                final = _used(last, batch, chosen)
                for folder, model in models.items():
                    now = _used(model, batch, chosen) if folder != folders[-1] else final
                    for site in chosen:
                        _add(sums[folder][site], unit_S, batch, now[site], final[site])
                    bar.update(len(batch))
    rows = []
    for folder in folders:
        for site, own in sums[folder].items():
            found = estimate(SATURATION, own.sums(), confidence)
            rows.append(
                {"model": last.name, "family": last.family, "train_seed": last.train_seed}
                | {"step": step_of(folder), "layer": site.layer, "stage": site.stage}
                | {name: float(value) for name, value in found._asdict().items()}
            )
    return pd.DataFrame(rows)


def _share(sums: Sums) -> Tensor:
    return sums["both"] / sums["tokens"]


def _chance(sums: Sums) -> Tensor:
    return (sums["now_E"] * sums["final_E"]).sum(-1) / sums["tokens"] ** 2


SATURATION = Metric("usage", "sites", _share, _chance, "experts of the newest checkpoint used now")


def _add(
    sums: UnitSums, unit_S: Tensor, batch: Sequences, now_TE: Tensor, final_TE: Tensor
) -> None:
    """Of the tokens that have a target and use experts finally, by unit."""
    counts_SL = batch.targets_SL != IGNORE
    unit_T = unit_S[:, None].expand(counts_SL.shape)[counts_SL]
    both_T = usage.saturation_of(now_TE, final_TE)
    share_TE = final_TE.double() / final_TE.sum(-1, keepdim=True)
    for unit in unit_T.unique().tolist():
        own_T = (unit_T == unit) & final_TE.any(-1)
        now_E, final_E = now_TE[own_T].sum(0), share_TE[own_T].sum(0)
        sums.add(unit, both=both_T[own_T].sum(), now_E=now_E, final_E=final_E, tokens=own_T.sum())


def _used(
    model: Adapter, batch: Sequences, sites: Sequence[RouterSite]
) -> dict[RouterSite, Tensor]:
    """By site (T, E) on the CPU: whether the token, one with a target, uses the expert."""
    decisions = clean_routing(model, batch.tokens_SL.to(model.device))
    counts_T = (batch.targets_SL != IGNORE).flatten()
    return {
        site: DenseRouting(routing).used_TE.cpu()[counts_T]
        for site, routing in decisions.items()
        if site in sites
    }


def _units(docs: Sequences) -> dict[str, int]:
    """For each document the unit that it is left out with."""
    return {d: number % MAX_UNITS for number, d in enumerate(dict.fromkeys(docs.document_id))}


def _checkpoints(run_folder: str | Path) -> list[Path]:
    """Of a run, oldest first."""
    if not isinstance(run_folder, str | Path):
        found = type(run_folder).__name__
        raise ValueError(f"run_folder is a {found}; give the folder of a training run")
    made = read_run(run_folder)["asked"]["train"]
    folders = run_checkpoints(Path(run_folder))
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

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints."""
        return sorted(self.damage.step.unique().tolist())

    def at(self, step: int) -> Overlap:
        """The overlap of one checkpoint, for what takes one, such as `Overlap.matrix`; `ValueError`
        with the steps that there are."""
        check_choice("step", step, self.steps)
        tables = (self.overlap.experts, self.overlap.sites, self.overlap.pairs)
        return Overlap(*(t[t.step == step].reset_index(drop=True) for t in tables))


def over_training(
    run_folder: str | Path,
    docs: Sequences,
    perturbations: Asked,
    metrics: str | Sequence[str] | None = None,
    *,
    where: str = "all",
    point: str = "logits",
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
    options = dict(batch_size=batch_size, seed=seed, progress=False)
    conditions = dict(where=where, point=point, controls=controls)
    for folder in tqdm(_checkpoints(run_folder), unit="checkpoint", disable=not progress):
        model, step = load(folder), step_of(folder)
        results = sweep(model, docs, perturbations, **conditions, **options)
        damages.append(_at(step, results.damage()))
        overlap = measure_overlap(model, docs, metrics, sites, probe, **options)
        tables = (overlap.experts, overlap.sites, overlap.pairs)
        overlaps.append(Overlap(*(_at(step, table) for table in tables)))
    return Training(pd.concat(damages, ignore_index=True), Overlap.join(overlaps))


def _at(step: int, table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column step behind those that name the model."""
    columns = ["model", "family", "train_seed", "step"]
    table = table.assign(step=step)
    return table[columns + [name for name in table if name not in columns]]
