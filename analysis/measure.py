"""One model x conditions x shard -> rows: the unit of work.

The shard stands outside, conditions inside: each batch gets one clean pass, which every condition
shares. A condition begins at the first segment in which it perturbs something, from the clean
stream kept there. Shapes: B batch, L length, T = B * L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters.base import Adapter, State
from analysis.conditions import Condition
from analysis.context import Calibration, Tokens
from analysis.doses import DenseRouting, certainty_of, change_of
from analysis.intervene import Intervention
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.losses import IGNORE

CHUNK_LOGITS = 2**22  # logits held at once when losses are taken: 16 MiB in fp32
LOSS_SUMS = ("nll_sum", "kl_sum", "num_agree")


class Cell(NamedTuple):
    """What one condition (None: the clean run) gave on one shard.

    losses   a row a sequence: document_id, sequence_id, domain, num_tokens, num_bytes, nll_sum and
             kl_sum in nats, num_agree
    routing  a row a sequence and perturbed site (clean: every site): document_id, sequence_id,
             layer, stage, num_tokens, and sums over the tokens of what `doses` defines
    """

    condition: Condition | None
    losses: pd.DataFrame
    routing: pd.DataFrame
    seconds: float


@dataclass
class _Clean:
    """The clean pass over one batch, and what conditions need of it."""

    states: list[State]  # before each segment, and after the last
    routings: dict[RouterSite, object]
    dense: dict[RouterSite, DenseRouting]
    tokens: Tokens
    targets_T: Tensor
    draws: dict


@torch.no_grad()
def measure(
    model: Adapter,
    conditions: Sequence[Condition],
    shard: Sequences,
    *,
    batch_size: int = 16,
    calibration: Calibration | None = None,
    progress: Callable[[int], None] = lambda conditions_done: None,
) -> list[Cell]:
    """The clean cell, then one a condition, in their order.

    Raises `ValueError` if a condition's `where` selects no router of the model.
    """
    segments = model.segments()
    sites = model.sites()
    for condition in conditions:
        if not any(map(condition.where, sites)):
            have = (
                ", ".join(f"layer {s.layer} stage {s.stage}" for s in sites) or "none: it is dense"
            )
            raise ValueError(
                f"where is '{condition.where}', which selects no router of {model.name} ({have})"
            )
    collectors = [_Collector(c) for c in (None, *conditions)]
    for first in range(0, len(shard), batch_size):
        batch = shard[first : first + batch_size].to(model.device)
        clean = _run_clean(model, segments, batch, collectors[0])
        for collector in collectors[1:]:
            _run_condition(model, segments, clean, batch, collector, calibration)
            progress(1)
    return [c.cell() for c in collectors]


def _run_clean(model, segments, batch: Sequences, collector: _Collector) -> _Clean:
    with collector.timed():
        states = [State(None, batch.tokens_SL)]
        with model.watch_branches() as branches:
            for segment in segments:
                states.append(segment.run(states[-1]))
        model.check()
        routings = dict(zip(model.sites(), states[-1].decisions, strict=True))
        dense = {site: DenseRouting(r) for site, r in routings.items()}
        targets_T = batch.targets_SL.flatten()
        tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S)
        clean = _Clean(states, routings, dense, tokens, targets_T, {})
        collector.add_losses(batch, compare(model, states[-1].hidden_BLD, None, targets_T))
        residual = {s: states[i].hidden_BLD for i, seg in enumerate(segments) for s in seg.sites}
        for site, routing in routings.items():
            share_T, routed_T = branches[site]
            collector.add_site(
                batch,
                site,
                change_of(dense[site], dense[site], dense[site])
                | certainty_of(routing, dense[site])
                | {
                    "routed_share": share_T,
                    "routed_ratio": routed_T / residual[site].flatten(0, 1).float().norm(dim=-1),
                },
            )
    return clean


def _run_condition(model, segments, clean: _Clean, batch, collector: _Collector, calibration):
    condition = collector.condition

    def observe(site, base, changed) -> None:
        base_dense = clean.dense[site] if base is clean.routings[site] else DenseRouting(base)
        changed_dense = base_dense if changed is base else DenseRouting(changed)
        collector.add_site(batch, site, change_of(base_dense, changed_dense, clean.dense[site]))

    with collector.timed():
        first = next(i for i, seg in enumerate(segments) if any(map(condition.where, seg.sites)))
        remaining = {site for segment in segments[first:] for site in segment.sites}
        earlier = {s: r for s, r in clean.routings.items() if s not in remaining}
        intervention = Intervention(condition, calibration, clean.routings, observe=observe)
        intervention.begin(clean.tokens, clean.draws, earlier)
        state = clean.states[first]
        with model.edit(intervention, remaining.__contains__):
            for segment in segments[first:]:
                state = segment.run(state)
        model.check()
        before_BLD = clean.states[-1].hidden_BLD
        collector.add_losses(batch, compare(model, state.hidden_BLD, before_BLD, clean.targets_T))


def compare(
    model: Adapter, hidden_BLD: Tensor, clean_BLD: Tensor | None, targets_T: Tensor
) -> dict[str, Tensor]:
    """(T,) fp32 each, 0 where the target is -100: nll; KL(clean || this) and top-1 agreement,
    which are 0 and 1 where there is nothing to compare with."""
    hidden_TD = hidden_BLD.flatten(0, 1)
    used_T = targets_T != IGNORE
    nll_T = torch.zeros(len(hidden_TD), device=hidden_TD.device)
    kl_T, agree_T = torch.zeros_like(nll_T), used_T.float()
    rows = used_T.nonzero()[:, 0]
    vocab_size = model.logits(hidden_TD[:1]).shape[-1]
    for chunk in rows.split(max(1, CHUNK_LOGITS // vocab_size)):
        log_p = model.logits(hidden_TD[chunk]).log_softmax(-1)
        nll_T[chunk] = F.nll_loss(log_p, targets_T[chunk], reduction="none")
        if clean_BLD is not None and clean_BLD is not hidden_BLD:
            clean_log_p = model.logits(clean_BLD.flatten(0, 1)[chunk]).log_softmax(-1)
            kl_T[chunk] = (clean_log_p.exp() * (clean_log_p - log_p)).sum(-1)
            agree_T[chunk] = (clean_log_p.argmax(-1) == log_p.argmax(-1)).float()
    return {"nll_sum": nll_T, "kl_sum": kl_T, "num_agree": agree_T}


class _Collector:
    """Sums of one condition over the batches of a shard, as frames at the end."""

    def __init__(self, condition: Condition | None):
        self.condition, self.seconds = condition, 0.0
        self.losses: list[pd.DataFrame] = []
        self.routing: list[pd.DataFrame] = []

    def timed(self) -> _Timed:
        return _Timed(self)

    def add_losses(self, batch: Sequences, per_token: dict[str, Tensor]) -> None:
        frame = _sums(batch, per_token)
        frame.insert(1, "domain", list(batch.domain))
        frame.insert(4, "num_bytes", batch.num_bytes_S.tolist())
        self.losses.append(frame)

    def add_site(self, batch: Sequences, site: RouterSite, per_token: dict[str, Tensor]) -> None:
        frame = _sums(batch, per_token)
        frame.insert(2, "layer", site.layer)
        frame.insert(3, "stage", site.stage)
        self.routing.append(frame)

    def cell(self) -> Cell:
        routing = pd.concat(self.routing, ignore_index=True) if self.routing else pd.DataFrame()
        losses = pd.concat(self.losses, ignore_index=True)
        return Cell(self.condition, losses, routing, self.seconds)


class _Timed:
    def __init__(self, collector: _Collector):
        self.collector = collector

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception) -> None:
        self.collector.seconds += time.perf_counter() - self.start


def _sums(batch: Sequences, per_token: dict[str, Tensor]) -> pd.DataFrame:
    """Per sequence: fp64 sums over the tokens that have a target."""
    used_SL = batch.targets_SL != IGNORE
    stacked = torch.stack([v.to(torch.float32) for v in per_token.values()])
    sums = (stacked.view(-1, *used_SL.shape).double() * used_SL).sum(-1).cpu().numpy()
    return pd.DataFrame(
        {
            "document_id": list(batch.document_id),
            "sequence_id": batch.sequence_id_S.tolist(),
            "num_tokens": used_SL.sum(-1).tolist(),
        }
        | dict(zip(per_token, np.asarray(sums), strict=True))
    )
