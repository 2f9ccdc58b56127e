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

from analysis.adapters import Adapter, DenseRouting, batches, steps
from analysis.measure.clean import CleanPass
from analysis.measure.doses import certainty_of, change_of
from analysis.measure.intervene import Intervention
from analysis.measure.prepare import prepared
from analysis.measure.reuse import Table, worth_tabulating
from analysis.perturb import CLEAN, Calibration, Condition, sites_of, token_kinds
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.losses import IGNORE


class Cell(NamedTuple):
    """What one condition (`CLEAN`: the clean run) gave on one shard.

    losses   a row a sequence: document_id, domain, sequence_id, num_tokens, num_bytes, nll_sum and
             kl_sum in nats, num_agree, delta_max (the largest rise of a token's nll)
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


@torch.no_grad()
def measure(
    model: Adapter,
    conditions: Sequence[Condition],
    shard: Sequences,
    *,
    batch_size: int = 16,
    calibration: Calibration | None = None,
    tabulate: Collection[Condition] | None = None,
    keep_tokens: bool = False,
    progress: Callable[[int], None] = lambda conditions_done: None,
) -> list[Cell]:
    """The clean cell, then one a condition, in their order.

    tabulate      conditions that take the expert outputs of their first site from a table; by
                  default those for which `worth_tabulating` says that it pays
    keep_tokens   keep every token's loss, for quantiles and groups of tokens

    Raises `ValueError` if a condition's `where` selects no router of the model.
    """
    for condition in conditions:
        sites_of(model, condition.where, tokens=True)
    if tabulate is None:
        tabulate = worth_tabulating(model, conditions, batch_size * shard.tokens_SL.shape[1])
    needs_kinds = model.tokenizer and any(c.where.tokens for c in conditions)
    kinds_V = token_kinds(model.tokenizer) if needs_kinds else None
    collectors = [_Collector(c, keep_tokens) for c in (CLEAN, *conditions)]
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
                tabulated = collector.condition in tabulate
                _run_condition(
                    model, clean, batch, collector, calibration, tables if tabulated else None
                )
            progress(1)
    return [c.cell() for c in collectors]


def _collect_clean(
    model: Adapter, clean: CleanPass, batch: Sequences, collector: _Collector
) -> None:
    nll_T, used_T = clean.losses.nll_T, batch.targets_SL.flatten() != IGNORE
    nothing_T = torch.zeros_like(nll_T)
    collector.add_losses(batch, {"nll": nll_T, "kl": nothing_T, "agree": used_T.float()}, nll_T)
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
        condition, calibration, clean.routings, observe=observe, tables=tables
    )
    state = intervention.begin_at(clean, first)
    with intervention.attached(model, clean.sites_from(first).__contains__):
        ran = steps(clean.segments[first:], state)
        for number, (segment, before, state) in enumerate(ran, first):
            if any(map(condition.where, segment.sites)):
                change_T = clean.output_change(number, before, state)
                for site in filter(condition.where, segment.sites):
                    collector.add_site(batch, site, doses[site] | {"output_change": change_T})
    losses = clean.losses.compare(model, state.hidden_BLD.flatten(0, 1))
    collector.add_losses(batch, losses, clean.losses.nll_T)


class _Collector:
    """Sums of one condition over the batches of a shard, as frames at the end."""

    def __init__(self, condition: Condition, keep_tokens: bool):
        self.condition, self.keep_tokens, self.seconds = condition, keep_tokens, 0.0
        self.losses: list[tuple[dict, np.ndarray]] = []
        self.routing: list[tuple[dict, np.ndarray]] = []
        self.tokens: list[dict] = []

    @contextmanager
    def timed(self):
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def add_losses(self, batch: Sequences, losses: dict[str, Tensor], clean_T: Tensor) -> None:
        keys = {
            "document_id": batch.document_id,
            "domain": batch.domain,
            "sequence_id": batch.sequence_id_S.tolist(),
            "num_tokens": (batch.targets_SL != IGNORE).sum(-1).tolist(),
            "num_bytes": batch.num_bytes_S.tolist(),
        }
        nll_T = losses["nll"]
        used_SL = batch.targets_SL != IGNORE
        rise_SL = (nll_T - clean_T).view_as(used_SL).masked_fill(~used_SL, -torch.inf)
        sums = {"nll_sum": nll_T, "kl_sum": losses["kl"], "num_agree": losses["agree"]}
        columns = _sums(batch, sums) | {"delta_max": rise_SL.amax(-1).double().cpu().numpy()}
        self.losses.append(keys | columns)
        if self.keep_tokens:
            nll_SL, used_SL = nll_T.view_as(used_SL).cpu().numpy(), used_SL.cpu().numpy()
            targets_SL = batch.targets_SL.cpu().numpy().astype(np.int32)
            pairs = list(zip(nll_SL, targets_SL, used_SL, strict=True))
            rows = {
                "document_id": batch.document_id,
                "sequence_id": batch.sequence_id_S.tolist(),
                # As objects: numpy's own strings of bytes lose the zeros at their end.
                "nll": np.array([n_L[u_L].tobytes() for n_L, _, u_L in pairs], dtype=object),
            }
            if self.condition == CLEAN:
                targets = [t_L[used_L].tobytes() for _, t_L, used_L in pairs]
                rows["targets"] = np.array(targets, dtype=object)
            self.tokens.append(rows)

    def add_site(self, batch: Sequences, site: RouterSite, doses: dict[str, Tensor]) -> None:
        keys = {
            "document_id": batch.document_id,
            "sequence_id": batch.sequence_id_S.tolist(),
            "layer": [site.layer] * len(batch),
            "stage": [site.stage] * len(batch),
            "num_tokens": (batch.targets_SL != IGNORE).sum(-1).tolist(),
        }
        self.routing.append(keys | _sums(batch, doses))

    def cell(self) -> Cell:
        routing = _frame(self.routing) if self.routing else pd.DataFrame()
        tokens = _frame(self.tokens) if self.tokens else None
        return Cell(self.condition, _frame(self.losses), routing, self.seconds, tokens)


def _frame(parts: list[dict]) -> pd.DataFrame:
    """Batches one below the other."""
    return pd.DataFrame({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def _sums(batch: Sequences, per_token: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Per sequence: fp64 sums over the tokens that have a target."""
    used_SL = batch.targets_SL != IGNORE
    stacked = torch.stack([v.to(torch.float32) for v in per_token.values()])
    sums = (stacked.view(-1, *used_SL.shape).double() * used_SL).sum(-1).cpu().numpy()
    return dict(zip(per_token, sums, strict=True))
