"""Where routers meet experts in a model of anybody's: found by what modules are called with.

An experts module is what is called with hidden states, ids and weights of the chosen; its router is
what gave these ids and weights. Shapes: B batch, L length, T = B * L tokens, D model, E experts, K
slots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PROBE = (2, 11)  # B, L of the tokens that a model is watched on: no dimension of a model, by chance
TOKENS = PROBE[0] * PROBE[1]


class Event(NamedTuple):
    """A module was called with this and returned that."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict
    result: Any


def watch(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Event], Any]:
    """Every return of a module of the model while `run()` runs, in order, and what that gives."""
    events: list[Event] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def noted(module, args, kwargs, result, name=name):
                events.append(Event(name, module, args, kwargs, result))

            handle = module.register_forward_hook(noted, with_kwargs=True)
            stack.callback(handle.remove)
        result = run()
    return events, result


class Places(NamedTuple):
    """Under which positions or names an experts module gets what: keys of its arguments."""

    hidden: int | str
    ids: int | str
    weights: int | str

    def arguments(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[tuple, dict]:
        """To call it with these and nothing else."""
        given = dict(zip(self, (hidden, ids, weights), strict=True))
        numbers = sorted(key for key in given if isinstance(key, int))
        named = {key: value for key, value in given.items() if isinstance(key, str)}
        return tuple(given[key] for key in numbers), named


def places(args: tuple, kwargs: dict, tokens: int) -> Places | None:
    """Those of a call with hidden states, ids and weights of so many tokens; None for another."""
    given = [*enumerate(args), *kwargs.items()]
    tensors = [(key, value) for key, value in given if isinstance(value, Tensor)]
    ids = [
        (k, v) for k, v in tensors if v.dtype == torch.int64 and v.ndim == 2 and len(v) == tokens
    ]
    if len(ids) != 1:
        return None
    floats = [(k, v) for k, v in tensors if v.is_floating_point() and v.ndim >= 2]
    weights = [k for k, v in floats if v.shape == ids[0][1].shape]
    hidden = [k for k, v in floats if v.shape[:-1].numel() == tokens and k not in weights]
    if len(weights) != 1 or len(hidden) != 1:
        return None
    return Places(hidden[0], ids[0][0], weights[0])


def argument(args: tuple, kwargs: dict, key: int | str) -> Any:
    """What stands there."""
    return args[key] if isinstance(key, int) else kwargs[key]


def replaced(args: tuple, kwargs: dict, new: dict[int | str, Any]) -> tuple[tuple, dict]:
    """The arguments, with others at these keys."""
    changed = tuple(new.get(i, value) for i, value in enumerate(args))
    return changed, {key: new.get(key, value) for key, value in kwargs.items()}


def stream_of(result: Any) -> Tensor:
    """Of what a module returned, the hidden states."""
    return result[0] if isinstance(result, tuple) else result


class Rows(NamedTuple):
    """In the place of an argument that has a row a token: its trailing shape, and whether its rows
    stand as (B, L) or (T,)."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    batched: bool

    def of(self, tokens: int, x_TD: Tensor | None) -> Tensor:
        """As many rows as tokens: x, or zeros."""
        lead = (1, tokens) if self.batched else (tokens,)
        if x_TD is not None:
            return x_TD.view(*lead, *self.shape)
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(*lead, *self.shape)


@dataclass(frozen=True)
class Call:
    """How a module was called, to call it again on other rows."""

    args: tuple
    kwargs: dict

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> Call:
        """From a call on the probe."""
        return cls(tuple(map(_row, args)), {key: _row(value) for key, value in kwargs.items()})

    @property
    def of_hidden_alone(self) -> bool:
        """Whether one argument has a row a token, and no other is a tensor."""
        given = [*self.args, *self.kwargs.values()]
        return sum(isinstance(value, Tensor | tuple | list) for value in given) == 1

    def again(self, module: Callable, tokens: int, x_TD: Tensor | None = None) -> Any:
        """On as many rows; `ValueError` where x alone does not make them."""
        given = [*self.args, *self.kwargs.values()]
        if x_TD is not None and sum(isinstance(value, Rows) for value in given) != 1:
            raise ValueError("it is called with more of each token than its hidden state")

        def made(value):
            return value.of(tokens, x_TD) if isinstance(value, Rows) else value

        named = {key: made(value) for key, value in self.kwargs.items()}
        return module(*map(made, self.args), **named)


def _row(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    kind = value.dtype, value.device
    if value.ndim > 2 and value.shape[:2] == PROBE:
        return Rows(value.shape[2:], *kind, batched=True)
    if value.ndim > 1 and len(value) == PROBE[0] * PROBE[1]:
        return Rows(value.shape[1:], *kind, batched=False)
    return value
