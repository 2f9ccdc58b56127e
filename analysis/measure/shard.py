"""One model x conditions x shard -> rows: the unit of work.

The shard stands outside, conditions inside: each batch gets one clean pass, which every condition
shares. A condition begins at the first segment in which it perturbs something, from the clean
stream kept there. Shapes: S sequences, L length, T = S * L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from analysis.adapters import Adapter, batches, owned, owning
from analysis.measure.arm import Arm
from analysis.measure.by_segment import measure_by_segment
from analysis.measure.calibrate import Calibrating
from analysis.measure.clean import CleanPass
from analysis.measure.collector import Cell, Collector
from analysis.measure.reuse import Table, worth_reusing
from analysis.perturb import CLEAN, Calibration, Condition, models_of, sites_of, token_kinds
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite


@owning
@torch.no_grad()
def measure(
    model: Adapter,
    conditions: Sequence[Condition],
    shard: Sequences,
    *,
    batch_size: int = 16,
    calibration: Calibration | Calibrating | None = None,
    reuse: Collection[Condition] | None = None,
    keep_tokens: bool = False,
    streams: Path | None = None,
    progress: Callable[[int], object] = lambda conditions_done: None,
) -> list[Cell]:
    """The clean cell, then one a condition, in their order.

    reuse         conditions that take the expert outputs of their first site from a table; by
                  default those for which `worth_reusing` says that it pays
    keep_tokens   keep every token's loss, for quantiles and groups of tokens
    calibration   of a streamed model it may come along, a segment at a time
    streams       of a streamed model: a folder for hidden states between its layers, in place of
                  memory; the same call goes on there, however it was stopped, behind the last layer
                  that it was through with

    Raises `ValueError` if a condition's `where` selects no router of the model.
    """
    for condition in conditions:
        sites_of(model, condition.where, tokens=True)
    if reuse is None:
        reuse = worth_reusing(model, conditions, batch_size * shard.tokens_SL.shape[1])
    if getattr(model, "streamed", False):
        how: dict[str, Any] = dict(batch_size=batch_size, calibration=calibration, reuse=reuse)
        how |= dict(keep_tokens=keep_tokens, streams=streams, progress=progress)
        return measure_by_segment(model, conditions, shard, **how)
    if isinstance(calibration, Calibrating):
        calibration = calibration.finish()
    kinds_V = token_kinds(model, [c.where for c in conditions])
    collectors = [Collector(c, keep_tokens) for c in (CLEAN, *conditions)]
    with owned(*models_of(conditions)):
        for batch in batches(model, shard, batch_size):
            with collectors[0].timed():
                clean = CleanPass.of(model, batch, kinds_V)
                for number in range(len(clean.segments)):
                    collectors[0].add_clean(model, clean, batch, number)
                collectors[0].add_clean_losses(batch, clean.losses)
            tables: dict[RouterSite, Table] = {}
            seed = None
            # Seed by seed: draws are kept for the conditions that share them, and no longer.
            for collector in sorted(collectors[1:], key=lambda c: c.condition.eval_seed):
                if collector.condition.eval_seed != seed:
                    seed = collector.condition.eval_seed
                    clean.draws.clear()
                with collector.timed():
                    arm = Arm(model, clean, batch, collector, calibration)
                    reuses = collector.condition in reuse
                    _run(arm, tables if reuses else None)
                progress(1)
    return [c.cell() for c in collectors]


def _run(arm: Arm, tables: dict[RouterSite, Table] | None) -> None:
    """A condition from its first segment to its losses; what it takes from a table is made once."""
    clean, first = arm.clean, arm.first
    if tables is not None:
        (site,) = clean.segments[first].sites
        tables.setdefault(site, Table(arm.model, site, clean.routings[site]))
        tables = {site: tables[site]}
    hidden_BLD = clean.states[first].hidden_BLD
    arm.begin(clean.draws)
    for number, segment in enumerate(clean.segments[first:], first):
        hidden_BLD = arm.step(number, segment, hidden_BLD, tables)
    arm.end(hidden_BLD)
