"""Whoever measures a model owns it meanwhile: nobody else runs, changes or disturbs it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from analysis.adapters.base import Adapter, as_adapter
from analysis.adapters.shelf import Fetch
from cartmoe.hooks import Caller, Hook, nothing
from cartmoe.interrupt import restoring

P = ParamSpec("P")
T = TypeVar("T")


class _Use(NamedTuple):
    """One open block, by whom, and whether it measures or only perturbs."""

    caller: Caller
    measures: bool


_USES: WeakKeyDictionary[nn.Module, list[_Use]] = WeakKeyDictionary()
_LOCK = threading.Lock()
OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**22
# What a module, and torch for all of them, keeps hooks in. Gradients decide in `Worst`.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def owning(fn: Callable[P, T]) -> Callable[P, T]:
    """Within a call of the function its argument `model` is `owned`."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def owner(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            model = signature.bind(*args, **kwargs).arguments["model"]
        except TypeError:
            return fn(*args, **kwargs)  # raises the same with the function's name in it
        with owned(as_adapter(model)):
            return fn(*args, **kwargs)

    return owner


@restoring
def owned(*models: Adapter) -> Iterator[None]:
    """Within the block these models are the caller's to measure. Blocks of one caller nest.

    Raises `ValueError` naming the model and what is in the way: another thread or asyncio task that
    measures or perturbs it, an open `perturbed` block, hooks of others on routed stages or on what
    holds them, training mode, weights made in inference mode; `RuntimeError` at the end if its
    weights were changed meanwhile.
    """
    with ExitStack() as stack:
        new = [model for model in models if stack.enter_context(_used(model, measures=True))]
        if torch.is_inference_mode_enabled():  # in which nothing has a gradient
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        states = [_state(model) for model in new]
        yield
        for model, before in zip(new, states, strict=True):
            if _state(model) != before:
                raise RuntimeError(
                    f"the weights of {model.name} were changed while it was measured; what was "
                    "measured belongs to no one model"
                )


def using(model: Adapter):
    """Within the block the caller perturbs the model: others may neither do that nor measure it.

    Raises `ValueError` where another thread or asyncio task does so now.
    """
    return _used(model, measures=False)


@restoring
def _used(model: Adapter, measures: bool) -> Iterator[bool]:
    """Yields whether nobody measured it before."""
    use = _Use(Caller.current(), measures)
    with _LOCK:
        open_uses = _USES.setdefault(model.module, [])
        for other in open_uses:
            if other.caller != use.caller:
                raise ValueError(
                    f"model {model.name} is in use: {other.caller} "
                    f"{'measures' if other.measures else 'perturbs'} it. Wait until that is done, "
                    "or give each its own (copy.deepcopy, or analysis.load again)"
                )
        first = not any(other.measures for other in open_uses)
        if measures and first:
            _check_undisturbed(model)
        open_uses.append(use)
    try:
        yield first
    finally:
        with _LOCK:
            open_uses.remove(use)


def _check_undisturbed(model: Adapter) -> None:
    training = [name for name, part in model.module.named_modules() if part.training]
    if training:
        where = f" ({training[0]})" if training[0] else ""
        raise ValueError(
            f"model {model.name} is in training mode{where}, in which it may draw random numbers; "
            "call its eval() first"
        )
    if any(tensor.is_inference() for tensor in _tensors(model)):
        raise ValueError(
            f"model {model.name} was made in torch.inference_mode, so that its weights have no "
            "gradient and changes of them are not noticed; make it outside"
        )
    everywhere = [fn for kind in HOOKS for fn in getattr(torch_module, f"_global{kind}").values()]
    found = [f"{_named(fn)} on every module" for fn in everywhere]
    for name, part in _routed_parts(model).items():
        hooks: list[Any] = [fn for kind in HOOKS for fn in getattr(part, kind).values()]
        replaced = vars(part).get("forward")
        if replaced != type(part).forward.__get__(part):
            hooks.append(replaced)
        found += [f"{_named(fn)} on {name or 'the model'}" for fn in hooks if _disturbs(fn)]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"model {model.name} has {found[0]}{more}: what is measured would not be the model. "
            "Leave the block, or remove the hook, and measure then"
        )


def _routed_parts(model: Adapter) -> Mapping[str, nn.Module]:
    """What is edited and captured: the modules around the routers, all in them, all that hold
    them."""
    around = {site.name.rpartition(".")[0] for site in model.sites()}

    def concerned(name: str) -> bool:
        return any(
            name in ("", a) or not a or name.startswith(f"{a}.") or a.startswith(f"{name}.")
            for a in around
        )

    return {name: part for name, part in model.module.named_modules() if concerned(name)}


def _disturbs(hook: Any) -> bool:
    """Not what is left of ours in a copy, what torch computes weights with (pruning), and what
    fetches tensors: from another device (accelerate), or from the disk."""
    moves = getattr(getattr(hook, "func", hook), "__module__", "").startswith("accelerate.")
    of_torch = type(hook).__module__.startswith("torch.")
    return not (hook is None or hook is nothing or of_torch or moves or isinstance(hook, Fetch))


def _named(hook: Any) -> str:
    if isinstance(hook, Hook):
        return "an open block of analysis.perturbed, hook_routers or capture_routing"
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    return f"a hook of others ({getattr(hook, '__module__', '?')}.{name})"


def _tensors(model: Adapter) -> list[torch.Tensor]:
    if getattr(model, "streamed", False):  # they come and go
        return []
    return [*model.module.parameters(), *model.module.buffers()]


def _state(model: Adapter) -> list[tuple[int, int]]:
    """Of each tensor how often it was changed in place, and a sum of its bits: torch does not count
    changes through `.data`."""
    return [(tensor._version, _bits(tensor)) for tensor in _tensors(model)]


def _bits(tensor: torch.Tensor) -> int:
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = numbers.detach().contiguous().view(OF_SIZE[numbers.itemsize]).flatten()
    return sum(int(part.sum()) for part in bits.split(CHUNK))  # a sum makes wide copies
