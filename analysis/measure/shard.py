"""One model x conditions x shard -> rows: the unit of work.

The shard stands outside, conditions inside: each batch gets one clean pass, which every condition
shares. A condition begins at the first segment in which it perturbs something, from the clean
stream kept there. Shapes: S sequences, L length, T = S * L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, batches, owned, owning, steps
from analysis.measure.clean import CleanPass
from analysis.measure.doses import certainty_of, change_of
from analysis.measure.intervene import Intervention
from analysis.measure.prepare import prepared
from analysis.measure.reuse import Table, worth_reusing
from analysis.measure.rows import SequenceRows
from analysis.perturb import CLEAN, Calibration, Condition, models_of, sites_of, token_kinds
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.losses import IGNORE

LOSSES = ["document_id", "domain", "sequence_id", "num_tokens", "num_bytes"]
LOSSES += ["nll_sum", "kl_sum", "num_agree", "num_touched", "delta_max"]


class Cell(NamedTuple):
    """What one condition (`CLEAN`: the clean run) gave on one shard.

    losses   a row a sequence: document_id, domain, sequence_id, num_tokens, num_bytes, nll_sum and
             kl_sum in nats, num_agree, num_touched (tokens whose decision the condition could
             change at any site; of the clean run all), delta_max (the largest rise of a token's
             nll)
    routing  a row a sequence and perturbed site (clean: every site): document_id, sequence_id,
             layer, stage, num_tokens, and sums over the tokens of what `doses` defines
    tokens   where they are kept, a row a sequence: document_id, sequence_id, nll (fp32 nats of the
             tokens with a target, as bytes) and, of the clean run, targets (int32, as bytes)
    """

    condition: Condition
    losses: pd.DataFrame
    routing: pd.DataFrame
    seconds: float
    tokens: pd.DataFrame | None = None


@owning
@torch.no_grad()
def measure(
    model: Adapter,
    conditions: Sequence[Condition],
    shard: Sequences,
    *,
    batch_size: int = 16,
    calibration: Calibration | None = None,
    reuse: Collection[Condition] | None = None,
    keep_tokens: bool = False,
    progress: Callable[[int], None] = lambda conditions_done: None,
) -> list[Cell]:
    """The clean cell, then one a condition, in their order.

    reuse         conditions that take the expert outputs of their first site from a table; by
                  default those for which `worth_reusing` says that it pays
    keep_tokens   keep every token's loss, for quantiles and groups of tokens

    Raises `ValueError` if a condition's `where` selects no router of the model.
    """
    for condition in conditions:
        sites_of(model, condition.where, tokens=True)
    if reuse is None:
        reuse = worth_reusing(model, conditions, batch_size * shard.tokens_SL.shape[1])
    kinds_V = token_kinds(model, [c.where for c in conditions])
    collectors = [_Collector(c, keep_tokens) for c in (CLEAN, *conditions)]
    with owned(*models_of(conditions)):
        for batch in batches(model, shard, batch_size):
            with collectors[0].timed():
                clean = CleanPass.of(model, batch, kinds_V)
                _collect_clean(model, clean, batch, collectors[0])
            tables: dict[RouterSite, Table] = {}
            seed = None
            # Seed by seed: draws are kept for the conditions that share them, and no longer.
            for collector in sorted(collectors[1:], key=lambda c: c.condition.eval_seed):
                if collector.condition.eval_seed != seed:
                    seed = collector.condition.eval_seed
                    clean.draws.clear()
                with collector.timed():
                    reuses = collector.condition in reuse
                    _run_condition(
                        model, clean, batch, collector, calibration, tables if reuses else None
                    )
                progress(1)
    return [c.cell() for c in collectors]


def _collect_clean(
    model: Adapter, clean: CleanPass, batch: Sequences, collector: _Collector
) -> None:
    nll_T, used_T = clean.losses.nll_T, batch.targets_SL.flatten() != IGNORE
    nothing_T = torch.zeros_like(nll_T)
    losses = {"nll": nll_T, "kl": nothing_T, "agree": used_T, "touched": used_T}
    collector.add_losses(batch, losses, nll_T)
    for number, segment in enumerate(clean.segments):
        for site in segment.sites:
            share_T, routed_T = clean.branches[site]
            dense = clean.dense[site]
            doses = change_of(dense, dense, dense)
            doses |= certainty_of(clean.routings[site], dense, model.router(site))
            ratio_T = routed_T / clean.residual_norm(number)
            doses |= {"output_change": nothing_T, "routed_share": share_T, "routed_ratio": ratio_T}
            collector.add_site(batch, site, doses)


def _run_condition(
    model: Adapter,
    clean: CleanPass,
    batch: Sequences,
    collector: _Collector,
    calibration: Calibration | None,
    tables: dict[RouterSite, Table] | None,
) -> None:
    doses: dict[RouterSite, dict[str, Tensor]] = {}

    def observe(site, base, changed) -> None:
        base_dense = clean.dense[site] if base is clean.routings[site] else DenseRouting(base)
        changed_dense = base_dense if changed is base else DenseRouting(changed)
        doses[site] = change_of(base_dense, changed_dense, clean.dense[site])

    condition = prepared(model, clean, collector.condition)
    first = clean.first_segment(condition.where)
    if tables is not None:
        (site,) = clean.segments[first].sites
        tables.setdefault(site, Table(model, site, clean.routings[site]))
        tables = {site: tables[site]}
    intervention = Intervention(
        condition, calibration, clean.routings, observe=observe, tables=tables, check=True
    )
    with intervention.rerunning(model, clean) as (segments, start):
        for number, (segment, before, state) in enumerate(steps(segments, start), first):
            if any(map(condition.where, segment.sites)):
                change_T = clean.output_change(number, before, state)
                for site in filter(condition.where, segment.sites):
                    collector.add_site(batch, site, doses[site] | {"output_change": change_T})
    losses = clean.losses.compare(model, state.hidden_BLD.flatten(0, 1))
    losses["touched"] = torch.stack([*intervention.touched.values()]).any(0)
    collector.add_losses(batch, losses, clean.losses.nll_T)


class _Collector:
    """Sums of one condition over the batches of a shard, as frames at the end."""

    def __init__(self, condition: Condition, keep_tokens: bool):
        self.condition, self.keep_tokens, self.seconds = condition, keep_tokens, 0.0
        self.losses, self.routing, self.tokens = SequenceRows(), SequenceRows(), SequenceRows()

    @contextmanager
    def timed(self):
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def add_losses(self, batch: Sequences, losses: dict[str, Tensor], clean_T: Tensor) -> None:
        used_SL = batch.targets_SL != IGNORE
        nll_SL = losses["nll"].view_as(used_SL)
        rise_SL = (nll_SL - clean_T.view_as(used_SL)).masked_fill(~used_SL, -torch.inf)
        sums = {"nll_sum": losses["nll"], "kl_sum": losses["kl"]}
        sums |= {"num_agree": losses["agree"], "num_touched": losses["touched"]}
        self.losses.add(
            batch,
            sums,
            domain=batch.domain,
            num_bytes=batch.num_bytes_S.cpu().numpy(),
            delta_max=rise_SL.amax(-1).double().cpu().numpy(),
        )
        if self.keep_tokens:
            kept = {"nll": nll_SL}
            if self.condition == CLEAN:
                kept["targets"] = batch.targets_SL.to(torch.int32)
            self.tokens.append(batch, **{n: _as_bytes(v, used_SL) for n, v in kept.items()})

    def add_site(self, batch: Sequences, site: RouterSite, doses: dict[str, Tensor]) -> None:
        self.routing.add(batch, doses, layer=site.layer, stage=site.stage)

    def cell(self) -> Cell:
        tokens = self.tokens.frame() if self.keep_tokens else None
        losses, routing = self.losses.frame()[LOSSES], self.routing.frame()
        return Cell(self.condition, losses, routing, self.seconds, tokens)


def _as_bytes(values_SL: Tensor, used_SL: Tensor) -> np.ndarray:
    """(S,) the used values of each sequence; as objects, since numpy's own strings of bytes lose
    the zeros at their end."""
    pairs = zip(values_SL.cpu().numpy(), used_SL.cpu().numpy(), strict=True)
    return np.array([values_L[used_L].tobytes() for values_L, used_L in pairs], dtype=object)
