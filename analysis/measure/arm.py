"""A condition on one batch, a segment at a time, beside the clean pass. Shapes: T tokens, B batch,
L length, D model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, Segment, State
from analysis.measure.clean import CleanPass
from analysis.measure.collector import Collector
from analysis.measure.doses import change_of
from analysis.measure.intervene import Intervention
from analysis.measure.prepare import prepared
from analysis.measure.reuse import Table
from analysis.perturb import PERTURBATIONS, Calibration, Custom, Lag, Perturbation, parts_of
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


class Arm:
    """first: the number of the segment in which it begins, from the clean stream before it."""

    def __init__(
        self,
        model: Adapter,
        clean: CleanPass,
        batch: Sequences,
        collector: Collector,
        calibration: Calibration | None,
    ):
        self.model, self.clean, self.batch, self.collector = model, clean, batch, collector
        self.condition = prepared(model, clean, collector.condition)
        self.first = clean.first_segment(self.condition.where)
        self.intervention = Intervention(
            self.condition, calibration, observe=self._observe, check=True
        )
        self.doses: dict[RouterSite, dict[str, Tensor]] = {}
        self.looks_back = looks_back(collector.condition.perturbation)

    def begin(self, draws: dict) -> None:
        """Before its first segment; the clean decisions of earlier sites are known then."""
        clean = self.clean
        remaining = {site for segment in clean.segments[self.first :] for site in segment.sites}
        earlier = {site: r for site, r in clean.routings.items() if site not in remaining}
        self.intervention.begin(clean.tokens, draws, earlier)

    def step(
        self,
        number: int,
        segment: Segment,
        hidden_BLD: Tensor,
        table: dict[RouterSite, Table] | None = None,
    ) -> Tensor:
        """(B, L, D) behind the segment, of the stream before it; the clean pass is beyond it."""
        clean, where = self.clean, self.condition.where
        self.intervention.recorded, self.intervention.tables = clean.routings, table or {}
        before = clean.states[number]
        if hidden_BLD is not before.hidden_BLD:
            before = State(hidden_BLD, before.tokens_BL, ())
        sites = set(segment.sites)
        attached = self.intervention.attached(self.model, sites.__contains__)
        with attached if sites else nullcontext():
            after = segment.run(before)
        if any(map(where, segment.sites)):
            change_T = clean.output_change(number, before, after)
            for site in filter(where, segment.sites):
                doses = self.doses.pop(site) | {"output_change": change_T}
                self.collector.add_site(self.batch, site, doses)
        if not self.looks_back:  # decisions take much room where there are many segments
            for site in segment.sites:
                self.intervention.earlier.pop(site, None)
                self.intervention.own.pop(site, None)
        return after.hidden_BLD

    def end(self, hidden_BLD: Tensor) -> None:
        """Behind the last segment; the clean losses are known."""
        losses = self.clean.losses.compare(self.model, hidden_BLD.flatten(0, 1))
        losses["touched"] = torch.stack([*self.intervention.touched.values()]).any(0)
        self.collector.add_losses(self.batch, losses, self.clean.losses.nll_T)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        intervention = self.intervention
        return {
            "rows": self.collector.state(),
            "touched": {str(site.place): t for site, t in intervention.touched.items()},
            "earlier": plain(intervention.earlier if self.looks_back else {}),
            "own": plain(intervention.own if self.looks_back else {}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Behind the segments at whose end it gave this state."""
        sites = self.model.sites()
        self.begin({})
        self.collector.restore(self.batch, state["rows"])
        touched = state["touched"]
        self.intervention.touched = {
            site: touched[str(site.place)] for site in sites if str(site.place) in touched
        }
        self.intervention.earlier |= routings_of(state["earlier"], sites)
        self.intervention.own |= routings_of(state["own"], sites)

    def _observe(self, site: RouterSite, base: Routing, changed: Routing) -> None:
        clean = self.clean
        base_dense = clean.dense[site] if base is clean.routings[site] else DenseRouting(base)
        changed_dense = base_dense if changed is base else DenseRouting(changed)
        self.doses[site] = change_of(base_dense, changed_dense, clean.dense[site])


def plain(routings: Mapping[RouterSite, Routing]) -> dict[str, list[Tensor]]:
    """By place, the tensors of decisions."""
    return {str(site.place): list(routing) for site, routing in routings.items()}


def routings_of(
    values: Mapping[str, Sequence[Tensor]], sites: Sequence[RouterSite]
) -> dict[RouterSite, Routing]:
    """What `plain` was given, of these sites."""
    places = {str(site.place): site for site in sites}
    return {places[place]: Routing(*tensors) for place, tensors in values.items()}


def looks_back(perturbation: object) -> bool:
    """Whether it may ask for the decisions of earlier sites: `Lag`, and what is none of ours."""
    known = set(PERTURBATIONS.values()) - {Lag, Custom}
    if not isinstance(perturbation, Perturbation):
        return True
    return not all(type(part) in known for part in parts_of(perturbation))
