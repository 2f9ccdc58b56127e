"""What sits where a router meets its experts while somebody watches or disturbs them.

The decision is captured, and replaced, where experts are called: it is what they really receive.
Shapes: T tokens, D model, E experts, K slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from analysis.adapters.base import Experts, ExpertsFunction, RouterFunction
from analysis.adapters.forward import Forward, answer
from analysis.adapters.layouts import Weights
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import Call
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


class Functions(NamedTuple):
    """What a block brings (see `Adapter.hooked`); the decision at last is added to `taken`."""

    router: RouterFunction | None = None
    experts: ExpertsFunction | None = None
    taken: list[Routing] | None = None


@dataclass
class Seat(ABC):
    """One router and its experts.

    block    holds both;  block_call: how it is called on hidden states
    calls    of the experts while somebody watches them; in one forward there is one
    deciding whether functions decide in the router's place just now
    """

    site: RouterSite
    router: TappedRouter
    experts: nn.Module
    block: nn.Module
    block_call: Call
    calls: int = 0
    deciding: bool = False
    functions: dict[object, Functions] = field(default_factory=dict)
    standing: list[Forward] = field(default_factory=list)
    num_nonfinite: Tensor | None = None  # tokens, of the last forward; see raise_nonfinite

    @property
    def stage(self) -> nn.Module:
        """What adds to the stream: the block, or, where that is called with more than hidden states
        (it may be the whole layer), the experts alone."""
        return self.block if self.block_call.of_hidden_alone else self.experts

    @abstractmethod
    def parts(self) -> Iterable[tuple[nn.Module, Callable]]:
        """What stands in the place of whose forward, which it gets before the arguments."""

    @abstractmethod
    def outputs(self, x_TD: Tensor, ids: Iterable[int]) -> Tensor:
        """(len(ids), T, D): what the experts make of all tokens, one of them at a time."""

    @abstractmethod
    def combine(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): what the stage makes of it when its experts give this."""

    @abstractmethod
    def weights(self) -> Weights:
        """gate (E, F, D), up (E, F, D), down (E, D, F) of the experts."""

    @contextmanager
    def taken(self, functions: Functions) -> Iterator[None]:
        """Within the block these functions act, behind those that are there already."""
        key = object()
        if not self.functions:
            # Within what somebody compiles (`generate` may) they are called all the same.
            apart = torch.compiler.disable
            self.standing = [Forward(apart(fn), module) for module, fn in self.parts()]
            for forward in self.standing:
                forward.enter()
        self.functions[key] = functions
        try:
            yield
        finally:
            del self.functions[key]
            if not self.functions:
                for forward in self.standing:
                    forward.leave()

    @contextmanager
    def alone(self, functions: Functions) -> Iterator[None]:
        """Within the block these act, and nobody else's."""
        if not self.functions:
            with self.taken(functions):
                yield
            return
        others, calls, self.functions = self.functions, self.calls, {object(): functions}
        try:
            yield
        finally:
            self.functions, self.calls = others, calls

    def decided(self, routing: Routing, x_TD: Tensor, compute: Experts) -> tuple[Routing, Experts]:
        """What becomes of the router's own decision, and who computes what the experts give."""
        self.deciding = True
        try:
            for functions in self.functions.values():
                if functions.router is not None:
                    routing = functions.router(routing, self.router, self.site, x_TD) or routing
        finally:
            self.deciding = False
        for functions in self.functions.values():
            if functions.experts is not None:
                compute = partial(answer, functions.experts, self.site, compute)
            if functions.taken is not None:
                functions.taken.append(routing)
        return routing, compute
