"""Routing of other models: their recorded decisions, or their gates, in this model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from analysis.adapters import Router, as_adapter, load
from analysis.perturb.base import Identity, Perturbation
from analysis.perturb.context import RouterContext
from analysis.perturb.decisions import where_tokens
from analysis.perturb.trace import Trace
from analysis.perturb.trace_files import trace_sha256
from cartmoe.checkpoint import CheckpointError, checkpoint_sha256, read_config
from cartmoe.fields import declared
from cartmoe.hooks import RouterSite, router_sites
from cartmoe.routing import Routing
from cartmoe.skeleton import skeleton


@declared
class Replay(Perturbation):
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
    trace: Any = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        trace = self.trace
        if not isinstance(trace, str | Path | Trace) or trace == "":
            raise ValueError(f"trace is {trace!r}; give an analysis.Trace, or the directory of one")
        object.__setattr__(self, "trace", str(trace.path if isinstance(trace, Trace) else trace))
        _pin(self, "trace", trace.sha256 if isinstance(trace, Trace) else _trace_sha256(self.trace))

    @property
    def label(self) -> str:
        """ "Replay(NAME)", the name of the trace's directory."""
        return f"Replay({Path(self.trace).name})"

    def identity(self) -> Perturbation:
        """The router's own decisions."""
        return Identity()

    def to_dict(self) -> dict[str, Any]:
        """The directory, and the SHA-256 of what is recorded there."""
        return {"name": "Replay", "trace": self.trace, "sha256": self._known()}

    def _known(self) -> str:
        if self.sha256 is None:
            raise ValueError(
                f"trace is {self.trace!r}, and there is no trace; give an analysis.Trace, or the "
                "directory of one (in analysis.compare also a model's name)"
            )
        return self.sha256

    def opened(self) -> Trace:
        """The trace; opened, and checked byte by byte, once a process."""
        return _opened(self.trace, self._known())

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
                routing.scores_TE, ids_TK, torch.ones_like(ids_TK, dtype=bool)
            )
        weights_TK = weights_TK.to(routing.weights_TK.dtype)
        imposed = routing._replace(ids_TK=ids_TK, weights_TK=weights_TK)
        return imposed if known_T.all() else where_tokens(known_T, imposed, routing)


@declared
class GateSwap(Perturbation):
    """The gates of another checkpoint in place of this one's: did tuning change the routers, or
    the experts? Both must have the same routers.

    checkpoint   its path, or a model under study (for this process only); in `analysis.compare`
                 also a model's name
    sha256       the identity of the model at that path; found out where it is not given
    """

    points: ClassVar[tuple[str, ...]] = ("logits",)
    needs_input: ClassVar[bool] = True
    checkpoint: Any = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        given = self.checkpoint
        if isinstance(given, str | Path) and given != "":
            object.__setattr__(self, "checkpoint", str(given))
            _pin(self, "checkpoint", _checkpoint_sha256(str(given)))
        elif isinstance(given, nn.Module) or hasattr(given, "segments"):
            object.__setattr__(self, "checkpoint", as_adapter(given))
        else:
            raise ValueError(
                f"checkpoint is {given!r}; give the path of one, or a model under study"
            )

    def __reduce_ex__(self, protocol: int):
        if not isinstance(self.checkpoint, str):
            raise ValueError(
                f"{self.label} holds a model in memory, which does not go to other processes; give "
                "the path of a checkpoint"
            )
        return super().__reduce_ex__(protocol)

    @property
    def label(self) -> str:
        """ "GateSwap(NAME)"."""
        name = self.checkpoint
        return f"GateSwap({Path(name).name if isinstance(name, str) else name.name})"

    def identity(self) -> Perturbation:
        """The model's own gates."""
        return Identity()

    def to_dict(self) -> dict[str, Any]:
        """The path (or name), and the identity of the model."""
        if not isinstance(self.checkpoint, str):
            where, sha256 = self.checkpoint.name, self.checkpoint.identity
        else:
            where, sha256 = self.checkpoint, self._known()
        return {"name": "GateSwap", "checkpoint": where, "sha256": sha256}

    def _known(self) -> str:
        if self.sha256 is None:
            raise ValueError(
                f"checkpoint is {self.checkpoint!r}, and there is no whole one; give the path of "
                "one, or a model under study (in analysis.compare also a model's name)"
            )
        return self.sha256

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for a router that the other model does not have, or not with as many
        experts."""
        if isinstance(self.checkpoint, str):
            have = _sites_of(self.checkpoint, self._known())
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
        self.check([ctx.site])
        device = ctx.x_TD.device
        if isinstance(self.checkpoint, str):
            gates = _loaded_gates(self.checkpoint, self._known(), device)
        else:
            gates = _gates(self.checkpoint)
        gate = gates[ctx.site.place]
        with torch.no_grad():
            other_TE = gate(ctx.x_TD, ctx.tokens.token_ids_T).to(logits_TE)
        return other_TE.where(logits_TE != -torch.inf, -torch.inf)  # after a mask, in a Compose


def _pin(perturbation: Perturbation, what: str, found: str | None) -> None:
    """Keep the hash of what is there now, so that it is never taken for what comes later; if one
    was given, what is there must have it."""
    path, expected = getattr(perturbation, what), perturbation.sha256
    if found is not None and expected not in (None, found):
        raise ValueError(
            f"the {what} at {path} is another one than it was: its SHA-256 is {found}, and "
            f"{expected} was asked for"
        )
    object.__setattr__(perturbation, "sha256", expected or found)


def _trace_sha256(path: str) -> str | None:
    return trace_sha256(Path(path))


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
    return tuple(router_sites(skeleton(read_config(path))))


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
