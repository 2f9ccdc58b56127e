"""Routing of other models: their recorded decisions, or their gates, in this model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from analysis.context import RouterContext
from analysis.perturb.base import Identity, Perturbation
from cartmoe.routing import Router, Routing


@dataclass(frozen=True)
class Replay(Perturbation):
    """Another run's recorded decisions are imposed: another checkpoint's, precision's or kernel's
    (rollout routing replay, arXiv 2510.11370).

    trace   an `analysis.Trace` or its directory; in `analysis.compare` also a model's name

    A trace without weights (a serving engine's) imposes the experts; their weights are then the
    router's own for them.
    """

    trace: Any = None

    def __post_init__(self) -> None:
        if not self.trace:
            raise ValueError("trace is missing; give an analysis.Trace, or the directory of one")
        if isinstance(self.trace, Path):
            object.__setattr__(self, "trace", str(self.trace))

    @property
    def label(self) -> str:
        """ "Replay(NAME)"."""
        return f"Replay({self.source})"

    @property
    def source(self) -> str:
        """What it is called: the name of the trace's directory."""
        return Path(self.trace).name if isinstance(self.trace, str) else self.trace.name

    def identity(self) -> Perturbation:
        """The router's own decisions."""
        return Identity()

    def to_dict(self) -> dict[str, Any]:
        """The directory and the SHA-256 of what is recorded there; by the latter it is known."""
        trace = open_trace(self.trace)
        return {"name": "Replay", "trace": str(trace.path), "sha256": trace.sha256}

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The recorded experts; `ValueError` where a token was not recorded."""
        trace = open_trace(self.trace)
        found = trace.lookup(ctx.site, ctx.tokens.sequence_T, ctx.tokens.position_T)
        ids_TK, weights_TK = found
        if ids_TK.max() >= ctx.site.num_experts:
            raise ValueError(
                f"trace {self.source} has expert {int(ids_TK.max())}; {ctx.site.name} has only "
                f"{ctx.site.num_experts} experts"
            )
        if weights_TK is None:
            weights_TK = router.weigh(routing.scores_TE, ids_TK, k=ids_TK.shape[-1])
        return routing._replace(ids_TK=ids_TK, weights_TK=weights_TK.to(routing.weights_TK.dtype))


def open_trace(trace: Any) -> Any:
    """The `Trace` that was given, or the one in that directory, opened once a process."""
    return _opened(trace) if isinstance(trace, str) else trace


@functools.lru_cache(maxsize=8)
def _opened(path: str) -> Any:
    from analysis.trace import Trace

    return Trace.load(path)


@dataclass(frozen=True)
class GateSwap(Perturbation):
    """The gates of another checkpoint in place of this one's: did tuning change the routers, or
    the experts? Both must have the same routers.

    checkpoint   its path, or a model under study; in `analysis.compare` also a model's name
    """

    points: ClassVar[tuple[str, ...]] = ("logits",)
    checkpoint: Any = None

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is missing; give the path of one, or a model under study")
        if isinstance(self.checkpoint, Path):
            object.__setattr__(self, "checkpoint", str(self.checkpoint))

    @property
    def label(self) -> str:
        """ "GateSwap(NAME)"."""
        return f"GateSwap({self.source})"

    @property
    def source(self) -> str:
        """What it is called."""
        if isinstance(self.checkpoint, str):
            return Path(self.checkpoint).name
        return self.checkpoint.name

    def identity(self) -> Perturbation:
        """The model's own gates."""
        return Identity()

    def to_dict(self) -> dict[str, Any]:
        """The path (or name) and the identity of the other model."""
        where = self.checkpoint if isinstance(self.checkpoint, str) else self.checkpoint.name
        return {"name": "GateSwap", "checkpoint": where, "sha256": _model(self.checkpoint).identity}

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """The other gate's logits of the same input."""
        gate = _gates(_model(self.checkpoint)).get((ctx.site.layer, ctx.site.stage))
        if ctx.x_TD is None:
            raise ValueError(
                "GateSwap needs what enters the router; under downstream 'replay' nothing does"
            )
        if gate is None:
            raise ValueError(f"{self.source} has no router at {ctx.site.name}")
        other_TE = gate(ctx.x_TD, ctx.tokens.token_ids_T).to(logits_TE)
        if other_TE.shape != logits_TE.shape:
            raise ValueError(
                f"{self.source} has {other_TE.shape[-1]} experts at {ctx.site.name}; this model "
                f"has {logits_TE.shape[-1]}"
            )
        return other_TE.where(logits_TE != -torch.inf, -torch.inf)  # after a mask, in a Compose


def _model(checkpoint: Any) -> Any:
    return _loaded(checkpoint) if isinstance(checkpoint, str) else checkpoint


@functools.lru_cache(maxsize=2)
def _loaded(path: str) -> Any:
    from analysis.models import load

    return load(path)


@functools.lru_cache(maxsize=4)
def _gates(model: Any) -> dict[tuple[int, int], Callable[[Tensor, Tensor], Tensor]]:
    return {(site.layer, site.stage): model.gate(site) for site in model.sites()}
