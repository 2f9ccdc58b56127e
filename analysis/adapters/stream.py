"""A decoder run layer by layer: each is called again with the arguments that the model itself gave
it, and only the stream is another. Shapes: B batch, L length, D model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from analysis.adapters.form import call, hidden_of
from analysis.adapters.seams import Event, replaced, stream_of

PLAIN = (Tensor, bool, int, float, str, type(None))
HIDDEN = "hidden_states"


class Layers:
    """The layers of a model that hold all of its seats.

    owner   what calls them, one after the other
    """

    def __init__(self, owner: nn.Module, layers: Sequence[nn.Module], tuples: bool):
        self.owner, self.layers, self.tuples = owner, layers, tuples
        self._known: tuple[Tensor, list[tuple[tuple, dict]], Tensor] | None = None

    def first(self, tokens_BL: Tensor) -> Tensor:
        """(B, L, D): the stream before the first layer; here a forward begins, and nothing of
        another one is kept."""
        self._known = None
        return self._calls(tokens_BL)[2]

    def run(self, number: int, hidden_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        """(B, L, D): the stream behind a layer."""
        calls = self._calls(tokens_BL)[1]
        if len(calls) != len(self.layers):
            raise RuntimeError(
                f"the model calls {len(calls)} of its {len(self.layers)} layers: something was put "
                "in their place since it was attached"
            )
        args, kwargs = calls[number]
        key = HIDDEN if HIDDEN in kwargs else 0
        args, kwargs = replaced(args, kwargs, {key: hidden_BLD})
        return stream_of(self.layers[number](*args, **kwargs))

    def last(self, hidden_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        """(B, L, D): what the model makes of the stream behind the last layer."""
        return self._passed(tokens_BL, hidden_BLD)[1]

    def _calls(self, tokens_BL: Tensor) -> tuple[Tensor, list[tuple[tuple, dict]], Tensor]:
        if self._known is None or self._known[0] is not tokens_BL:
            calls, _ = self._passed(tokens_BL)
            args, kwargs = calls[0]
            self._known = tokens_BL, calls, kwargs[HIDDEN] if HIDDEN in kwargs else args[0]
        return self._known

    def _passed(self, tokens_BL: Tensor, last_BLD: Tensor | None = None) -> tuple[list, Tensor]:
        """How the layers are called, none of them computing, and what becomes of the stream that
        the last one is said to give."""
        calls: list[tuple[tuple, dict]] = []

        def passed(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            hidden_BLD = kwargs[HIDDEN] if HIDDEN in kwargs else args[0]
            if last_BLD is not None and len(calls) == len(self.layers):
                hidden_BLD = last_BLD
            return (hidden_BLD, None) if self.tuples else hidden_BLD

        with in_place_of(dict.fromkeys(self.layers, passed)):
            result = call(self.owner, tokens_BL)
        return calls, hidden_of(result)


@contextmanager
def in_place_of(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within the block these modules have those forwards."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def layers_of(
    model: nn.Module, events: Sequence[Event], experts: Sequence[nn.Module]
) -> Layers | None:
    """The list of layers that holds all of these experts, each called once and in order, with
    nothing that a layer could leave something in; None where there is none."""
    by_module = {event.module: event for event in events}
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        inside = {part for layer in layers for part in layer.modules()}
        if not inside.issuperset(experts) or not all(layer in by_module for layer in layers):
            continue
        called = [by_module[layer] for layer in layers]
        order = [event.module for event in events if event.module in set(layers)]
        given = [v for e in called for v in (*e.args, *e.kwargs.values())]
        if order != [*layers] or not all(map(_plain, given)):
            return None
        owner = model.get_submodule(name.rpartition(".")[0])
        if owner not in by_module:
            return None
        return Layers(owner, [*layers], isinstance(called[0].result, tuple))
    return None


def _plain(value: Any) -> bool:
    return all(map(_plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
