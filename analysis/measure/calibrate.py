"""Statistics of clean routing, which perturbations draw from.

Shapes: B batch, L length, T tokens, D model, E experts, R rows of a reservoir.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from analysis.adapters import (
    Adapter,
    Segment,
    State,
    as_adapter,
    batches,
    check_documents,
    owning,
)
from analysis.measure.clean import check_finite
from analysis.perturb import Calibration, SiteStats, Tokens, mix64
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing, expert_counts

CALIBRATION = 32  # sequences that a model is calibrated on unless others are given


@owning
@torch.no_grad()
def calibrate(
    model: Adapter, sequences, *, rows: int = 2048, batch_size: int = 16, seed: int = 0
) -> Calibration:
    """Statistics of clean routing over these sequences (a `cartmoe.data.Sequences`).

    rows   logits kept of each site: those of the tokens with the lowest hash, so the reservoir
           does not depend on the batch size. Padding takes no part.
    """
    calibrating = Calibrating(as_adapter(model), sequences, rows, batch_size, seed)
    return calibrating.finish()


class Calibrating:
    """`calibrate`, a segment at a time, for who runs the model by segments anyway.

    known   of the sites of segments that it went through
    done    how many segments it went through
    """

    def __init__(
        self,
        model: Adapter,
        sequences: Sequences,
        rows: int = 2048,
        batch_size: int = 16,
        seed: int = 0,
    ):
        self.model, self.sha256 = model, f"{sequences.sha256} {rows} {batch_size} {seed}"
        self.tokens: list[Tensor] = []  # (B, L) a batch
        self.used: list[Tensor] = []  # (T,) a batch: which have a target
        priorities = []
        for batch in batches(model, sequences, batch_size):
            used_T = (batch.targets_SL >= 0).flatten()
            tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S)
            priorities.append(mix64(mix64(tokens.sequence_T + seed) + tokens.position_T)[used_T])
            self.used.append(used_T)
            self.tokens.append(batch.tokens_SL)
        if not priorities:
            raise ValueError("calibration needs at least one sequence")
        self.order_R = torch.cat(priorities).argsort()[:rows]
        self.sites: dict[RouterSite, SiteStats] = {}
        self.known = Calibration(self.sites)
        self.begin()

    @property
    def complete(self) -> bool:
        """Whether every site is known."""
        return len(self.sites) == len(self.model.sites())

    def begin(self) -> None:
        """Before the first segment, whatever it went through; it knows what it knew."""
        self.states, self.done = [State(None, tokens_BL) for tokens_BL in self.tokens], 0

    def reach(self, number: int) -> None:
        """Through all segments up to this one."""
        segments = self.model.segments()
        while self.done <= number:
            self._step(segments[self.done])
            self.done += 1

    def _step(self, segment: Segment) -> None:
        decided: list[tuple[Routing, ...]] = []
        behind: list[State] = []
        for state in self.states:
            after = segment.run(state)
            behind.append(after._replace(decisions=()))
            decided.append(after.decisions)
        for site, routings in zip(segment.sites, zip(*decided, strict=True), strict=True):
            for routing in routings:
                check_finite(site, routing)
            pairs = zip(routings, self.used, strict=True)
            used = [Routing(*(t[used_T] for t in routing)) for routing, used_T in pairs]
            reservoir_RE = torch.cat([routing.logits_TE for routing in used])[self.order_R]
            counts_E = torch.stack([expert_counts(routing) for routing in used]).sum(0)
            std = reservoir_RE.double().std().item()
            self.sites[site] = SiteStats(reservoir_RE, std, counts_E / counts_E.sum())
        self.states = behind

    def finish(self) -> Calibration:
        """Of every site."""
        with torch.no_grad():
            self.reach(len(self.model.segments()) - 1)
        return self.known

    def state(self) -> dict[str, Any]:
        """What `restore` takes: numbers, texts and tensors."""
        return {
            "done": self.done,
            "hidden": [state.hidden_BLD for state in self.states],
            "sites": {str(site.place): list(stats) for site, stats in self.sites.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """As it was when it gave this state."""
        self.done = state["done"]
        pairs = zip(state["hidden"], self.tokens, strict=True)
        self.states = [State(hidden_BLD, tokens_BL) for hidden_BLD, tokens_BL in pairs]
        places = {str(site.place): site for site in self.model.sites()}
        self.sites |= {places[at]: SiteStats(*stats) for at, stats in state["sites"].items()}


def calibration_documents(given: Sequences | None, docs: Sequences, *models: Adapter) -> Sequences:
    """Those given, by default the first of the documents. Raises as `check_documents`."""
    if given is None:
        return docs[:CALIBRATION]
    check_documents(given, *models, name="calibration")
    return given
