"""What sits where a router meets its experts while somebody watches or disturbs them.

The decision is captured, and replaced, where experts are called: it is what they really receive.
Shapes: T tokens, D model, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analysis.adapters.base import Experts, ExpertsFunction, RouterFunction
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import Call, Places, argument, replaced
from analysis.adapters.tap import Tap
from cartmoe.hooks import Hook, RouterSite
from cartmoe.routing import Routing


class Functions(NamedTuple):
    """What a block brings (see `Adapter.hooked`); the decision at last is added to `taken`."""

    router: RouterFunction | None = None
    experts: ExpertsFunction | None = None
    taken: list[Routing] | None = None


class _Forward(Hook):
    """Stands where an instance's `forward` does, which it calls.

    own      that forward
    before   the same where the instance had it of its own, None for its class's: what it has again
             at the end, and what a copy of the module has
    """

    def __init__(self, stand_in: Callable, module: nn.Module):
        super().__init__(partial(stand_in, module.forward))
        self.module, self.own = module, module.forward
        self.before = vars(module).get("forward")

    def leave(self) -> None:
        """The module is as it was."""
        del self.module.forward
        if self.before is not None:
            self.module.forward = self.before

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        return self.fn(*args, **kwargs)

    def __reduce__(self):
        return _own_forward, (self.module, self.before)


def _own_forward(module: nn.Module, before: Callable | None) -> Callable:
    return before or type(module).forward.__get__(module)


@dataclass
class Seat:
    """One router and its experts.

    block    holds both;  block_call: how it is called on hidden states
    places   of what the experts are called with;  batched: hidden states as (B, L, D)
    fewest   slots that they can be called with
    calls    of the experts while somebody watches them; in one forward there is one
    deciding whether functions decide in the router's place just now
    """

    site: RouterSite
    router: TappedRouter
    experts: nn.Module
    block: nn.Module
    block_call: Call
    places: Places
    batched: bool
    fewest: int = 1
    calls: int = 0
    deciding: bool = False
    functions: dict[object, Functions] = field(default_factory=dict)
    standing: list[_Forward] = field(default_factory=list)
    tap: Tap | None = None
    num_nonfinite: Tensor | None = None  # tokens, of the last forward; see raise_nonfinite

    @property
    def stage(self) -> nn.Module:
        """What adds to the stream: the block, or, where that is called with more than hidden states
        (it may be the whole layer), the experts alone."""
        return self.block if self.block_call.of_hidden_alone else self.experts

    @contextmanager
    def taken(self, functions: Functions) -> Iterator[None]:
        """Within the block these functions act, behind those that are there already."""
        key = object()
        if not self.functions:
            parts = (self.router.module, self._route), (self.experts, self._compute)
            self.standing = [_Forward(stand_in, module) for module, stand_in in parts]
            for forward in self.standing:
                forward.module.forward = forward  # type: ignore[method-assign]
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

    def _route(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.deciding:  # who decides asks the router itself
            return forward(*args, **kwargs)
        with Tap(self.router.roles) as self.tap:
            result = forward(*args, **kwargs)
        self.tap.check(self.site.name)
        return result

    def _compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Tensor:
        tap, self.tap = self.tap, None
        self.calls += 1
        if tap is None:
            raise RuntimeError(
                f"experts of {self.site.name} were called without it: something was put in its "
                "place since the model was attached"
            )
        x, ids_TK, weights_TK = (argument(args, kwargs, key) for key in self.places)
        given = self.router.routing(tap, ids_TK, weights_TK)
        self.num_nonfinite = (~given.logits_TE.isfinite()).any(-1).sum()

        def own(x_TD: Tensor, routing: Routing) -> Tensor:
            if routing is given:
                return forward(*args, **kwargs).reshape(x_TD.shape)
            weights = routing.weights_TK.to(weights_TK.dtype)
            new = dict(zip(self.places, (x_TD.view(x.shape), routing.ids_TK, weights), strict=True))
            changed, named = replaced(args, kwargs, new)
            return forward(*changed, **named).reshape(x_TD.shape)

        x_TD, compute = x.reshape(-1, x.shape[-1]), own
        routing = self._decided(given, x_TD)
        for functions in self.functions.values():
            if functions.experts is not None:
                compute = partial(_answer, functions.experts, self.site, compute)
        for functions in self.functions.values():
            if functions.taken is not None:
                functions.taken.append(routing)
        return compute(x_TD, routing).view(x.shape)

    def _decided(self, routing: Routing, x_TD: Tensor) -> Routing:
        self.deciding = True
        try:
            for functions in self.functions.values():
                if functions.router is not None:
                    routing = functions.router(routing, self.router, self.site, x_TD) or routing
        finally:
            self.deciding = False
        return routing

    def outputs(self, x_TD: Tensor, ids: Iterable[int]) -> Tensor:
        """(len(ids), T, D): what the experts make of all tokens, one of them at a time; zeros for
        what is chosen like an expert and is none."""
        real = max(len(p) for p in self.experts.parameters(recurse=False) if p.ndim == 3)
        # A slot more, without weight: longcat_flash cannot do with one.
        one_T2 = torch.tensor([1, 0], dtype=x_TD.dtype, device=x_TD.device).expand(len(x_TD), 2)
        one_TK = one_T2[:, : self.fewest]
        own = self.standing[1].own if self.functions else self.experts.forward
        x, found = x_TD[None] if self.batched else x_TD, []
        for e in ids:
            ids_TK = torch.full_like(one_TK, min(e, real - 1), dtype=torch.int64)
            args, kwargs = self.places.arguments(x, ids_TK, one_TK)
            output_TD = own(*args, **kwargs).view(x_TD.shape)
            found.append(output_TD if e < real else torch.zeros_like(x_TD))
        return torch.stack(found)

    def combine(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): what the stage makes of it when its experts give this."""
        if self.stage is self.experts:
            return routed_TD
        with self.alone(Functions(experts=lambda *_: routed_TD)):
            result = self.block_call.again(self.block, len(x_TD), x_TD)
        return stream_of(result).view(x_TD.shape)


def stream_of(result: Any) -> Tensor:
    """Of what a module returned, the hidden states."""
    return result[0] if isinstance(result, tuple) else result


def _answer(
    fn: ExpertsFunction, site: RouterSite, own: Experts, x_TD: Tensor, routing: Routing
) -> Tensor:
    output_TD = fn(x_TD, routing, site, own)
    return own(x_TD, routing) if output_TD is None else output_TD
