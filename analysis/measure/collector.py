"""What one condition gave, batch after batch, as the frames of a cell."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import Adapter
from analysis.measure.clean import CleanPass
from analysis.measure.doses import certainty_of, change_of
from analysis.measure.losses import CleanLosses
from analysis.measure.rows import SequenceRows
from analysis.perturb import CLEAN, Condition
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite

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


class Collector:
    """Sums of one condition over the batches of a shard, as frames at the end."""

    def __init__(self, condition: Condition, keep_tokens: bool):
        self.condition, self.keep_tokens, self.seconds = condition, keep_tokens, 0.0
        self.losses, self.routing, self.tokens = SequenceRows(), SequenceRows(), SequenceRows()

    @contextmanager
    def timed(self) -> Iterator[None]:
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

    def add_clean(self, model: Adapter, clean: CleanPass, batch: Sequences, number: int) -> None:
        """Of the clean run, what the routers of a segment did."""
        for site in clean.segments[number].sites:
            share_T, routed_T = clean.branches[site]
            dense = clean.dense[site]
            doses = change_of(dense, dense, dense)
            doses |= certainty_of(clean.routings[site], dense, model.router(site))
            ratio_T = routed_T / clean.residual_norm(number)
            doses |= {"output_change": torch.zeros_like(ratio_T)}
            doses |= {"routed_share": share_T, "routed_ratio": ratio_T}
            self.add_site(batch, site, doses)

    def add_clean_losses(self, batch: Sequences, losses: CleanLosses) -> None:
        """Of the clean run."""
        used_T, nothing_T = losses.targets_T != IGNORE, torch.zeros_like(losses.nll_T)
        found = {"nll": losses.nll_T, "kl": nothing_T, "agree": used_T, "touched": used_T}
        self.add_losses(batch, found, losses.nll_T)

    def add_site(self, batch: Sequences, site: RouterSite, doses: dict[str, Tensor]) -> None:
        self.routing.add(batch, doses, layer=site.layer, stage=site.stage)

    def state(self) -> dict[str, Any]:
        """Before there are losses: what `restore` takes."""
        return {"seconds": self.seconds, "routing": self.routing.state()}

    def restore(self, batch: Sequences, state: Mapping[str, Any]) -> None:
        """As it was, of one batch alone."""
        self.seconds = state["seconds"]
        self.routing.restore(batch, state["routing"])

    def cell(self) -> Cell:
        tokens = self.tokens.frame() if self.keep_tokens else None
        losses, routing = self.losses.frame()[LOSSES], self.routing.frame()
        return Cell(self.condition, losses, routing, self.seconds, tokens)


def join(cells: Sequence[Cell]) -> Cell:
    """Of one condition on several batches."""
    losses = pd.concat([cell.losses for cell in cells], ignore_index=True)
    routing = pd.concat([cell.routing for cell in cells], ignore_index=True)
    tokens = None
    if cells[0].tokens is not None:
        tokens = pd.concat([cell.tokens for cell in cells], ignore_index=True)
    seconds = sum(cell.seconds for cell in cells)
    return Cell(cells[0].condition, losses, routing, seconds, tokens)


def _as_bytes(values_SL: Tensor, used_SL: Tensor) -> np.ndarray:
    """(S,) the used values of each sequence; as objects, since numpy's own strings of bytes lose
    the zeros at their end."""
    pairs = zip(values_SL.cpu().numpy(), used_SL.cpu().numpy(), strict=True)
    return np.array([values_L[used_L].tobytes() for values_L, used_L in pairs], dtype=object)
