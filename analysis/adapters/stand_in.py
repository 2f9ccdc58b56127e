"""Functions in the place of routed experts, whose `forward` they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from analysis.adapters.base import Experts, ExpertsFunction
from analysis.adapters.forward import Forward, answer
from cartmoe.experts import RoutedExperts
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


class _StandIn(Forward):
    """Stands there for all blocks that replace the experts; what they say, if anything, counts."""

    def __init__(self, experts: RoutedExperts):
        self.functions: dict[object, tuple[ExpertsFunction, RouterSite]] = {}  # in order of entry
        super().__init__(self._compute, experts)

    def _compute(self, own: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
        compute = own
        for fn, site in self.functions.values():
            compute = partial(answer, fn, site, compute)
        return compute(x_TD, routing)


@contextmanager
def standing_in(experts: RoutedExperts, fn: ExpertsFunction, site: RouterSite) -> Iterator[None]:
    """Blocks nest and interleave; of those that are open the one entered last is asked first."""
    before = vars(experts).get("forward")
    stand_in = before if isinstance(before, _StandIn) else _StandIn(experts)
    stand_in.enter()
    key = object()
    stand_in.functions[key] = fn, site
    try:
        yield
    finally:
        del stand_in.functions[key]
        if not stand_in.functions and vars(experts).get("forward") is stand_in:
            stand_in.leave()
