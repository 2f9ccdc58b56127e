"""A batch on its way through the segments: its clean pass, of which a segment's states are kept,
and beside it every condition. Shapes: T tokens, B batch, L length, D model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, State
from analysis.measure.arm import Arm, plain, routings_of
from analysis.measure.clean import CleanPass, Shares, check_finite
from analysis.measure.collector import Cell, Collector
from analysis.measure.losses import CleanLosses
from analysis.measure.reuse import Table
from analysis.perturb import CLEAN, Calibration, Condition, Tokens
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite


class Batch:
    """done: how many segments it went through."""

    def __init__(
        self,
        model: Adapter,
        batch: Sequences,
        conditions: Sequence[Condition],
        calibration: Calibration | None,
        kinds_V: Tensor | None,
        keep_tokens: bool,
    ):
        self.model, self.batch, self.conditions = model, batch, conditions
        self.calibration, self.keep_tokens = calibration, keep_tokens
        self.tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S, kinds_V)
        self.begin()

    def begin(self) -> None:
        """Before the first segment, whatever it went through."""
        batch, model = self.batch, self.model
        losses = CleanLosses.unknown(batch.targets_SL.flatten())
        start, length = [State(None, batch.tokens_SL)], batch.tokens_SL.shape[1]
        self.clean = CleanPass(model.segments(), start, {}, {}, {}, losses, self.tokens, length)
        self.collector = Collector(CLEAN, self.keep_tokens)
        collectors = [Collector(condition, self.keep_tokens) for condition in self.conditions]
        self.arms = [Arm(model, self.clean, batch, c, self.calibration) for c in collectors]
        self.keeps = any(arm.looks_back for arm in self.arms)
        self.streams: dict[int, Tensor] = {}  # of arms that have begun
        self.done = 0

    def reach(self, number: int, reuse: Collection[Condition]) -> None:
        """Through all segments up to this one."""
        while self.done <= number:
            self._step(self.done, reuse)
            self.done += 1

    def _step(self, number: int, reuse: Collection[Condition]) -> None:
        """The clean pass, then every condition, through one segment."""
        clean, segment = self.clean, self.clean.segments[number]
        with self.collector.timed():
            advance(self.model, clean, number, keep=self.keeps)
            self.collector.add_clean(self.model, clean, self.batch, number)
        table: dict[RouterSite, Table] = {}
        draws: dict[int, dict] = {}
        for i, arm in sorted(enumerate(self.arms), key=lambda pair: pair[1].condition.eval_seed):
            if number < arm.first:
                continue
            with arm.collector.timed():
                own = draws.setdefault(arm.condition.eval_seed, {})
                if number == arm.first:
                    self.streams[i] = clean.states[number].hidden_BLD
                    arm.begin(own)
                arm.intervention.draws = own
                uses = number == arm.first and arm.collector.condition in reuse
                if uses and not table:
                    (site,) = segment.sites
                    table[site] = Table(self.model, site, clean.routings[site])
                self.streams[i] = arm.step(
                    number, segment, self.streams[i], table if uses else None
                )
        clean.states[number] = State(None, self.batch.tokens_SL)  # nobody needs it any more

    def end(self) -> None:
        """Losses, from the streams behind the last segment."""
        hidden_BLD = self.clean.states[-1].hidden_BLD
        targets_T = self.batch.targets_SL.flatten()
        self.clean.losses = CleanLosses.of(self.model, hidden_BLD.flatten(0, 1), targets_T)
        self.collector.add_clean_losses(self.batch, self.clean.losses)
        for i, arm in enumerate(self.arms):
            arm.end(self.streams.pop(i))

    def cells(self) -> list[Cell]:
        """The clean one, then one a condition."""
        return [self.collector.cell(), *(arm.collector.cell() for arm in self.arms)]

    def state(self) -> dict[str, Any]:
        """What `restore` takes: numbers, texts and tensors."""
        begun = {i: arm.state() for i, arm in enumerate(self.arms) if i in self.streams}
        return {
            "done": self.done,
            "hidden": self.clean.states[-1].hidden_BLD,
            "routings": plain(self.clean.routings if self.keeps else {}),
            "clean": self.collector.state(),
            "streams": self.streams,
            "arms": begun,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """As it was when it gave this state, of one that is before the first segment."""
        self.done, tokens_BL = state["done"], self.batch.tokens_SL
        empty, clean = State(None, tokens_BL), self.clean
        clean.states = [empty] * self.done + [State(state["hidden"], tokens_BL)]
        clean.routings = routings_of(state["routings"], self.model.sites())
        self.collector.restore(self.batch, state["clean"])
        self.streams = dict(state["streams"])
        for i, of_arm in state["arms"].items():
            self.arms[i].restore(of_arm)


def advance(model: Adapter, clean: CleanPass, number: int, keep: bool) -> None:
    """The clean pass through one segment, whose decisions and states it then has, and, unless they
    are to be kept, no others."""
    segment, shares = clean.segments[number], Shares(model)
    before = clean.states[number]
    sites = set(segment.sites)
    hooked = model.hooked(experts=shares, where=sites.__contains__) if sites else nullcontext()
    with torch.no_grad(), hooked:
        after = segment.run(State(before.hidden_BLD, before.tokens_BL, ()))
    clean.states.append(after)
    taken = dict(zip(segment.sites, after.decisions, strict=True))
    for site, routing in taken.items():
        check_finite(site, routing)
    kept = clean.routings if keep else {}
    clean.routings = kept | taken
    clean.dense = {site: DenseRouting(routing) for site, routing in clean.routings.items()}
    clean.branches = shares
