"""Observing and changing routing from outside, through plain PyTorch hooks on Router modules.

The model does not know that it is observed: nothing under routing, experts, ffn or model imports
this file.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from cartmoe.ffn import RoutedStage
from cartmoe.interrupt import restoring
from cartmoe.routing import Router, Routing


@dataclass(frozen=True)
class RouterSite:
    """Where a router stands. stage is 0 in a one-stage layer, 0, 1, ... in a Cartesian layer.

    top_k is the number of experts a token uses; with a top-p router, where it varies, the number
    of slots.
    """

    name: str
    layer: int
    stage: int
    num_experts: int
    top_k: int

    @property
    def place(self) -> tuple[int, int]:
        """(layer, stage): what sites of two models are matched by, and noise is keyed by."""
        return self.layer, self.stage

    def __str__(self) -> str:
        return f"layer {self.layer} stage {self.stage}"


RouterFunction = Callable[[Routing, Router, RouterSite], Routing | None]


class Caller(NamedTuple):
    """Who runs: a thread, and within it an asyncio task, if there is one."""

    thread: threading.Thread
    task: asyncio.Task | None

    @classmethod
    def current(cls) -> Caller:
        """The one that asks."""
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no event loop runs here
            task = None
        return cls(threading.current_thread(), task)

    def __str__(self) -> str:
        task = f", task {self.task.get_name()}" if self.task else ""
        return f"thread {self.thread.name}{task}"


class Hook:
    """What a block of this file, or of an adapter, puts on a module.

    It works for the thread and task that entered the block, and raises `ValueError` for others: the
    block is none of theirs (with refuse=False it does nothing for them). It stays with the module:
    a copy of it, also by pickle, has a function that does nothing in its place.
    """

    def __init__(self, fn: Callable, refuse: bool = True):
        self.fn, self.refuse, self.owner = fn, refuse, Caller.current()

    def __call__(self, *args: Any) -> Any:
        if not self.refuse and Caller.current() != self.owner:
            return None
        self.check()
        return self.fn(*args)

    def check(self) -> None:
        """Raise `ValueError` unless the one that entered the block calls."""
        now = Caller.current()
        if now != self.owner:
            raise ValueError(
                f"{now} runs a model that {self.owner} perturbs or measures meanwhile; let it wait "
                "until that is done, or give it a model of its own (copy.deepcopy)"
            )

    def __reduce__(self):
        return _nothing_hook, ()


def _nothing_hook() -> Callable:
    return nothing


def nothing(*args: Any) -> None:
    """The hook that a copy has in the place of a `Hook`."""


def router_sites(model: nn.Module) -> dict[RouterSite, Router]:
    """Every router of the model in order of depth."""
    return {site: stage.router for site, stage in _stages(model).items()}


def _stages(model: nn.Module) -> dict[RouterSite, RoutedStage]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedStage):
            where = re.search(r"(?:blocks\.(\d+)\.ffn\.)?stages\.(\d+)$", name)
            layer, stage = (int(n or 0) for n in (where.groups() if where else (0, 0)))
            router = module.router
            slots = router.num_experts if router.top_p else router.top_k
            site = RouterSite(f"{name}.router", layer, stage, router.num_experts, slots)
            found[site] = module
    return found


def refuse_compiled(model: nn.Module) -> None:
    """Raise `ValueError` if it, or a part of it, is compiled."""
    compiled = [
        name or "model"
        for name, module in model.named_modules()
        # module.compile() sets the one, the wrapper of torch.compile(module) holds the other.
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules
    ]
    if compiled:
        raise ValueError(
            f"model is compiled ({compiled[0]}); torch.compile ignores hooks that are registered "
            "afterwards. Pass the model as it was before torch.compile"
        )


def select_sites(
    model: nn.Module, where: Callable[[RouterSite], bool] | None
) -> dict[RouterSite, RoutedStage]:
    """The routed stages whose site satisfies `where` (None: all); `ValueError` if none does."""
    refuse_compiled(model)
    stages = _stages(model)
    if not stages:
        raise ValueError("model has no router to hook: it is dense")
    chosen = {site: stage for site, stage in stages.items() if where is None or where(site)}
    if not chosen:
        have = ", ".join(map(str, stages))
        raise ValueError(f"where selects no router; the model has {have}")
    return chosen


@restoring
def hook_routers(
    model: nn.Module,
    fn: RouterFunction,
    where: Callable[[RouterSite], bool] | None = None,
) -> Iterator[dict[RouterSite, int]]:
    """Within the block, fn(routing, router, site) sees each decision of the chosen routers.

    What fn returns takes the decision's place, None leaves it. Yields how often each site fired.
    Only these hooks are removed at the end, whatever happens (see `restoring`); several blocks
    nest and interleave, the hook entered last acting last. See `Hook` for copies and threads.

    Raises `ValueError` for a compiled model, and where `where` selects nothing; `RuntimeError`,
    after a block without an exception, naming the sites that stayed silent although another
    fired, or all if the model was never run.
    """
    stages = select_sites(model, where)
    fired = dict.fromkeys(stages, 0)

    def hook_for(site: RouterSite):
        def hook(router, args, routing):
            fired[site] += 1
            return fn(routing, router, site)

        return hook

    with ExitStack() as handles:
        for site, stage in stages.items():
            handle = stage.router.register_forward_hook(Hook(hook_for(site)))
            handles.callback(handle.remove)
        yield fired
    silent = [site.name for site, count in fired.items() if count == 0]
    if silent:
        raise RuntimeError(f"routers that did not run inside the block: {', '.join(silent)}")


@restoring
def capture_routing(
    model: nn.Module, where: Callable[[RouterSite], bool] | None = None
) -> Iterator[dict[RouterSite, list[Routing]]]:
    """Within the block, record the decisions that the experts are given, one a forward and site.

    It looks at what enters the experts, so it sees every change of every hook on the router,
    whatever the order of entry. Recorded tensors are detached. Raises `ValueError` as
    `hook_routers` does.
    """
    stages = select_sites(model, where)
    captured: dict[RouterSite, list[Routing]] = {site: [] for site in stages}

    def hook_for(site: RouterSite):
        def hook(experts, args):
            captured[site].append(Routing(*(t.detach() for t in args[1])))

        return hook

    with ExitStack() as handles:
        for site, stage in stages.items():
            handle = stage.experts.register_forward_pre_hook(Hook(hook_for(site)))
            handles.callback(handle.remove)
        yield captured
