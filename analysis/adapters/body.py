"""A pretrained model up to its head, run by segments, and the head on any rows.

Shapes: B batch, L length, T = B * L tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from analysis.adapters.base import Segment, State
from analysis.adapters.checks import ROWS, check_alone, check_causal
from analysis.adapters.form import call, hidden_of, logits_of, with_hidden
from analysis.adapters.seams import Event
from analysis.adapters.seat import Functions, Seat
from analysis.adapters.stream import Layers, in_place_of, layers_of
from cartmoe.routing import Routing, raise_nonfinite


class Body:
    """What makes hidden states of tokens, layer by layer where layers can be called again.

    width   of the hidden states

    Raises `ValueError` if neither way gives the logits of the model's own forward to the last bit,
    and as `check_alone` and `check_causal` do.
    """

    def __init__(
        self,
        model: Any,
        seats: Sequence[Seat],
        events: Sequence[Event],
        tokens_BL: Tensor,
        logits_BLV: Tensor,
        other_BL: Tensor | None = None,
    ):
        """events: all modules' calls in the forward of these tokens, which gave these logits.

        other_BL   tokens with another end, if causality is checked here
        """
        self.model, self.seats, self.other_BL = model, seats, other_BL
        self.other_BLV: Tensor | None = None
        self.layers = layers_of(model, events, [seat.experts for seat in seats])
        self.module = self.layers.owner if self.layers else getattr(model, "base_model", model)
        self._output = next(e.result for e in reversed(events) if e.module is self.module)
        taken = None
        if self.layers:
            with suppress(Exception):  # whatever a layer says that cannot be called by itself
                taken = self._decisions(tokens_BL, logits_BLV)
        if taken is None:
            self.layers = None
            taken = self._decisions(tokens_BL, logits_BLV)
        if taken is None:
            raise ValueError(
                f"{type(model).__name__} gives other logits from its body and head alone: it does "
                "something before or behind them that is not seen here"
            )
        self.decisions = taken
        if self.other_BLV is not None:
            check_causal(model, logits_BLV, self.other_BLV)
        check_alone(model, self.added)

    def _decisions(self, tokens_BL: Tensor, logits_BLV: Tensor) -> Sequence[Routing] | None:
        """Those of a forward by segments, if it gives these logits to the last bit."""
        row_BL = tokens_BL[:1]
        among_BL = row_BL.expand(ROWS, -1)
        states = [State(None, tokens_BL), State(None, row_BL)]
        if self.layers and self.other_BL is not None:
            states.append(State(None, self.other_BL))
        self.added: list[tuple[Tensor, Tensor]] = []  # see `check_alone`
        for segment in self.segments():  # all through one before the next
            before = states[1].hidden_BLD
            states = [segment.run(state) for state in states]
            if segment.sites:
                many = segment.run(State(before.expand(ROWS, *before.shape[1:]), among_BL))
                alone_BLD, one_BLD = states[1].hidden_BLD, many.hidden_BLD[-1:]
                known_BLD = before if self.layers else 0.0
                self.added.append((alone_BLD - known_BLD, one_BLD - known_BLD))
        state, _, *others = states
        for other in others:
            shape = other.hidden_BLD.shape[:2]
            self.other_BLV = self.logits(other.hidden_BLD.flatten(0, 1)).unflatten(0, shape)
        logits_TV = self.logits(state.hidden_BLD.flatten(0, 1))
        same = torch.equal(logits_TV, logits_BLV.flatten(0, 1).float())
        self.width = state.hidden_BLD.shape[-1]
        return state.decisions if same else None

    def segments(self) -> list[Segment]:
        """embed, layer_0, ..., norm; or, where layers cannot be called again, the body at once,
        before which the stream is not known."""
        layers = self.layers
        if layers is None:
            return [
                _segment("start", [], lambda _, tokens_BL: tokens_BL[..., None] * torch.nan),
                _segment("body", self.seats, self._at_once),
            ]
        steps = [_segment("embed", [], lambda _, tokens_BL: layers.first(tokens_BL))]
        for number, layer in enumerate(layers.layers):
            inside = set(layer.modules())
            seats = [seat for seat in self.seats if seat.experts in inside]
            steps.append(_segment(f"layer_{number}", seats, partial(layers.run, number)))
        return [*steps, _segment("norm", [], partial(self._norm, layers))]

    def _at_once(self, _: Tensor, tokens_BL: Tensor) -> Tensor:
        hidden_BLD = hidden_of(call(self.module, tokens_BL))
        self._check_finite()
        return hidden_BLD

    def _norm(self, layers: Layers, hidden_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        self._check_finite()
        return layers.last(hidden_BLD, tokens_BL)

    def _check_finite(self) -> None:
        raise_nonfinite([(seat.site.name, seat) for seat in self.seats])

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32: what the model makes of them where its body returns them; of one that has no
        body apart from its head they are the logits."""
        if self.module is self.model:
            return hidden_TD.float()
        made = with_hidden(self._output, hidden_TD[None])
        tokens = torch.zeros(1, len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
        with in_place_of({self.module: lambda *args, **kwargs: made}):
            return logits_of(call(self.model, tokens))[0].float()


def _segment(name: str, seats: Sequence[Seat], forward: Callable[[Any, Tensor], Tensor]) -> Segment:
    def run(state: State) -> State:
        taken: list[Routing] = []
        with ExitStack() as stack:
            for seat in seats:
                stack.enter_context(seat.taken(Functions(taken=taken)))
            hidden_BLD = forward(state.hidden_BLD, state.tokens_BL)
        if len(taken) != len(seats):
            raise RuntimeError(f"{len(taken)} of {len(seats)} routers of {name} ran")
        return State(hidden_BLD, state.tokens_BL, (*state.decisions, *taken))

    return Segment(name, run, tuple(seat.site for seat in seats))
