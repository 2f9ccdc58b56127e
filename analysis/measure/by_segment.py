"""The same cells with the loops turned inside out: a segment outside, batches and conditions
inside, for a model of which a segment's weights are in memory at a time. Shapes: T tokens, B batch,
L length, D model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, State, batches, owned
from analysis.measure.arm import Arm
from analysis.measure.clean import CleanPass, Shares
from analysis.measure.collector import Cell, Collector, join
from analysis.measure.losses import CleanLosses
from analysis.measure.reuse import Table
from analysis.perturb import (
    CLEAN,
    Calibration,
    Condition,
    Tokens,
    Worst,
    models_of,
    parts_of,
    token_kinds,
)
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite


def measure_by_segment(
    model: Adapter,
    conditions: Sequence[Condition],
    shard: Sequences,
    *,
    batch_size: int,
    calibration: Calibration | None,
    reuse: Collection[Condition],
    keep_tokens: bool,
    progress: Callable[[int], object],
) -> list[Cell]:
    """See `measure`, which gives the same to the last bit. The streams of all batches and
    conditions are kept between segments.

    Raises `ValueError` for conditions that are searched for with gradients through the whole model.
    """
    for condition in conditions:
        if Worst in map(type, parts_of(condition.perturbation)):
            raise ValueError(
                f"{condition.perturbation.label} is searched for with gradients through the whole "
                f"model, of which {model.name} has a segment at a time in memory; load it whole"
            )
    kinds_V = token_kinds(model, [c.where for c in conditions])
    runs = [
        Run(model, batch, conditions, calibration, kinds_V, keep_tokens)
        for batch in batches(model, shard, batch_size)
    ]
    segments = model.segments()
    with owned(*models_of(conditions)):
        for number in range(len(segments)):
            for run in runs:
                run.step(number, reuse)
    for run in runs:
        run.end()
        for _ in conditions:
            progress(1)
    return [join(cells) for cells in zip(*(run.cells() for run in runs), strict=True)]


class Run:
    """A batch: its clean pass, of which a segment's states are kept, and its conditions."""

    def __init__(
        self,
        model: Adapter,
        batch: Sequences,
        conditions: Sequence[Condition],
        calibration: Calibration | None,
        kinds_V: Tensor | None,
        keep_tokens: bool,
    ):
        self.model, self.batch = model, batch
        tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S, kinds_V)
        losses = CleanLosses.unknown(batch.targets_SL.flatten())
        start = [State(None, batch.tokens_SL)]
        length = batch.tokens_SL.shape[1]
        self.clean = CleanPass(model.segments(), start, {}, {}, {}, losses, tokens, length)
        self.collector = Collector(CLEAN, keep_tokens)
        collectors = [Collector(condition, keep_tokens) for condition in conditions]
        self.arms = [Arm(model, self.clean, batch, c, calibration) for c in collectors]
        self.streams: dict[int, Tensor] = {}  # of arms that have begun
        self.keeps = any(arm.looks_back for arm in self.arms)

    def step(self, number: int, reuse: Collection[Condition]) -> None:
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
        if not routing.logits_TE.isfinite().all():
            raise FloatingPointError(f"router logits are not finite ({site})")
    kept = clean.routings if keep else {}
    clean.routings = kept | taken
    clean.dense = {site: DenseRouting(routing) for site, routing in clean.routings.items()}
    clean.branches = shares
