"""Routing of other models: their recorded decisions, or their gates, in this model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from analysis.adapters import Router, as_adapter, load, skeleton
from analysis.perturb.base import Perturbation
from analysis.perturb.context import RouterContext
from analysis.perturb.decisions import where_tokens
from analysis.perturb.trace import Trace
from analysis.perturb.trace_files import trace_sha256
from cartmoe.checkpoint import CheckpointError, checkpoint_sha256, read_config
from cartmoe.fields import declared
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


class OfAnotherRun(Perturbation):
    """Needs what another run has left.

    needed   what must be where `source` says; sha256 is that by which it is known
    """

    source: ClassVar[str]
    needed: ClassVar[str]
    sha256: str | None

    @property
    def label(self) -> str:
        """ "Replay(NAME)", the name of the directory, or of the model."""
        where = getattr(self, self.source)
        return (
            f"{type(self).__name__}({Path(where).name if isinstance(where, str) else where.name})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Where it is (of a model in memory its name), and its SHA-256."""
        where = getattr(self, self.source)
        named = where if isinstance(where, str) else where.name
        return {"name": type(self).__name__, self.source: named, "sha256": self.known()}

    def known(self) -> str:
        """The SHA-256; `ValueError` where there is nothing."""
        where = getattr(self, self.source)
        found = self.sha256 if isinstance(where, str) else where.identity
        if found is None:
            raise ValueError(
                f"{self.source} is {where!r}, and there is no {self.needed} (in analysis.compare "
                "also a model's name)"
            )
        return found

    def pin(self, where: object, found: str | None) -> None:
        """Keep where it is, and the hash of what is there now, so that it is never taken for what
        comes later; if one was given, what is there must have it."""
        if found is not None and self.sha256 not in (None, found):
            raise ValueError(
                f"the {self.source} at {where} is another one than it was: its SHA-256 is {found}, "
                f"and {self.sha256} was asked for"
            )
        object.__setattr__(self, self.source, where)
        object.__setattr__(self, "sha256", self.sha256 or found)


@declared
class Replay(OfAnotherRun):
    """Another run's recorded decisions are imposed: another checkpoint's, precision's or kernel's
    (rollout routing replay, arXiv 2510.11370).

    trace    an `analysis.Trace`, or the directory of one; in `analysis.compare` also a model's name
    sha256   of what is recorded there, by which it is known; found out where it is not given

    A trace without weights (a serving engine's) imposes the experts; their weights are then the
    router's own for them. Padding, and any other token that the trace has no decision for, keeps
    the router's own; that none with a target is among them is checked in studies, `sweep` and
    `compare`, but not in `perturbed`, where targets are not known.
    """

    anew: ClassVar[bool] = True
    source: ClassVar[str] = "trace"
    needed: ClassVar[str] = "trace; give an analysis.Trace, or the directory of one"
    trace: Any = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        trace = self.trace
        if not isinstance(trace, str | Path | Trace) or trace == "":
            raise ValueError(f"trace is {trace!r}; give an analysis.Trace, or the directory of one")
        where = str(trace.path if isinstance(trace, Trace) else trace)
        self.pin(where, trace.sha256 if isinstance(trace, Trace) else trace_sha256(Path(where)))

    def opened(self) -> Trace:
        """The trace; opened, and checked byte by byte, once a process."""
        return _opened(self.trace, self.known())

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for a router that was not recorded, or has other experts."""
        for site in sites:
            recorded = self.opened().place(site).num_experts
            if recorded not in (None, site.num_experts):
                raise ValueError(
                    f"trace {self.trace} has {recorded} experts at {site.name}; this model has "
                    f"{site.num_experts}"
                )

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The recorded experts; `ValueError` where a sequence or the site was not recorded."""
        trace, tokens = self.opened(), ctx.tokens
        known_T = trace.known(tokens.sequence_T, tokens.position_T, tokens.token_ids_T)
        ids_TK, weights_TK = trace.lookup(ctx.site, tokens.sequence_T, tokens.position_T)
        self.check([ctx.site])
        have = ctx.site.num_experts
        if ids_TK.max() >= have:  # a trace that does not say how many there were
            raise ValueError(
                f"trace {self.trace} has {int(ids_TK.max()) + 1} experts at {ctx.site.name}; this "
                f"model has {have}"
            )
        ids_TK = ids_TK.clamp(min=0)  # of padding, which keeps the router's own below
        if weights_TK is None:
            weights_TK = router.weigh(
                routing.scores_TE, ids_TK, torch.ones_like(ids_TK, dtype=torch.bool)
            )
        weights_TK = weights_TK.to(routing.weights_TK.dtype)
        imposed = routing._replace(ids_TK=ids_TK, weights_TK=weights_TK)
        return imposed if known_T.all() else where_tokens(known_T, imposed, routing)


@declared
class GateSwap(OfAnotherRun):
    """The gates of another checkpoint in place of this one's: did tuning change the routers, or
    the experts? Both must have the same routers.

    checkpoint   its path, or a model under study (for this process only); in `analysis.compare`
                 also a model's name
    sha256       the identity of the model at that path; found out where it is not given
    """

    points: ClassVar[tuple[str, ...]] = ("logits",)
    needs_input: ClassVar[bool] = True
    source: ClassVar[str] = "checkpoint"
    needed: ClassVar[str] = "whole one; give the path of one, or a model under study"
    checkpoint: Any = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        given = self.checkpoint
        if isinstance(given, str | Path) and given != "":
            self.pin(str(given), _checkpoint_sha256(str(given)))
        elif isinstance(given, nn.Module) or hasattr(given, "segments"):
            object.__setattr__(self, "checkpoint", as_adapter(given))
        else:
            raise ValueError(
                f"checkpoint is {given!r}; give the path of one, or a model under study"
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if not isinstance(self.checkpoint, str):
            raise ValueError(
                f"{self.label} holds a model in memory, which does not go to other processes; give "
                "the path of a checkpoint"
            )
        return super().__reduce_ex__(protocol)

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for a router that the other model does not have, or not with as many
        experts."""
        if isinstance(self.checkpoint, str):
            have = _sites_of(self.checkpoint, self.known())
        else:
            have = tuple(self.checkpoint.sites())
        experts = {site.place: site.num_experts for site in have}
        for site in sites:
            number = experts.get(site.place)
            if number is None:
                raise ValueError(f"the model of {self.label} has no router at {site.name}")
            if number != site.num_experts:
                raise ValueError(
                    f"the model of {self.label} has {number} experts at {site.name}; this one has "
                    f"{site.num_experts}"
                )

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """The other gate's logits of the same input."""
        assert ctx.x_TD is not None  # for `needs_input`
        self.check([ctx.site])
        device = ctx.x_TD.device
        if isinstance(self.checkpoint, str):
            gates = _loaded_gates(self.checkpoint, self.known(), device)
        else:
            gates = _gates(self.checkpoint)
        gate = gates[ctx.site.place]
        with torch.no_grad():
            other_TE = gate(ctx.x_TD, ctx.tokens.token_ids_T).to(logits_TE)
        return other_TE.where(logits_TE != -torch.inf, -torch.inf)  # after a mask, in a Compose


def _checkpoint_sha256(path: str) -> str | None:
    try:
        return checkpoint_sha256(path)
    except (FileNotFoundError, CheckpointError):
        return None


@functools.lru_cache(maxsize=8)
def _opened(path: str, sha256: str) -> Trace:
    trace = Trace.load(path)
    if trace.sha256 != sha256:
        raise ValueError(f"the trace at {path} is another one than it was")
    return trace


@functools.lru_cache(maxsize=16)
def _sites_of(path: str, sha256: str) -> tuple[RouterSite, ...]:
    """The routers of a checkpoint, told from its configuration alone."""
    return tuple(skeleton(read_config(path)).sites())


Gates = dict[tuple[int, int], Callable[[Tensor, Tensor], Tensor]]


@functools.lru_cache(maxsize=2)
def _loaded_gates(path: str, sha256: str, device: torch.device) -> Gates:
    """Of a checkpoint; nothing else of it stays in memory."""
    model = load(path)
    if model.identity != sha256:
        raise ValueError(f"the checkpoint at {path} is another one than it was")
    return {
        site: gate.to(device) if isinstance(gate, nn.Module) else gate
        for site, gate in _gates(model).items()
    }


def _gates(model: Any) -> Gates:
    return {site.place: model.router(site).gate for site in model.sites()}
