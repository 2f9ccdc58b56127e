"""Functions in the place of routed experts, whose `forward` they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from analysis.adapters.base import Experts, ExpertsFunction
from cartmoe.experts import RoutedExperts
from cartmoe.hooks import Hook, RouterSite
from cartmoe.routing import Routing


class _StandIn(Hook):
    """Stands where an instance's `forward` does, for all blocks that replace it.

    own      what computes where none of their functions answers
    before   what the instance had there of its own, None for its class's
    """

    def __init__(self, experts: RoutedExperts, before: Experts | None):
        super().__init__(experts.forward)
        self.experts, self.own, self.before = experts, experts.forward, before
        self.functions: dict[object, tuple[ExpertsFunction, RouterSite]] = {}  # in order of entry

    def __reduce__(self):
        return _own_forward, (self.experts, self.before)

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        self.check()
        compute = self.own
        for fn, site in self.functions.values():
            compute = partial(_answer, fn, site, compute)
        return compute(x_TD, routing)


def _own_forward(experts: RoutedExperts, before: Experts | None) -> Experts:
    """What a copy of the experts has in the stand-in's place."""
    return before or type(experts).forward.__get__(experts)


def _answer(
    fn: ExpertsFunction, site: RouterSite, own: Experts, x_TD: Tensor, routing: Routing
) -> Tensor:
    output_TD = fn(x_TD, routing, site, own)
    return own(x_TD, routing) if output_TD is None else output_TD


@contextmanager
def standing_in(experts: RoutedExperts, fn: ExpertsFunction, site: RouterSite) -> Iterator[None]:
    """Blocks nest and interleave; of those that are open the one entered last is asked first."""
    before = vars(experts).get("forward")
    stand_in = before if isinstance(before, _StandIn) else _StandIn(experts, before)
    experts.forward = stand_in  # type: ignore[method-assign]
    key = object()
    stand_in.functions[key] = fn, site
    try:
        yield
    finally:
        del stand_in.functions[key]
        if not stand_in.functions and vars(experts).get("forward") is stand_in:
            del experts.forward
            if stand_in.before is not None:
                experts.forward = stand_in.before  # type: ignore[method-assign]
