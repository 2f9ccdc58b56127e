"""Recorded decisions of other runs in this model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from analysis.adapters import Router
from analysis.perturb.base import Perturbation
from analysis.perturb.context import RouterContext, Tokens
from analysis.perturb.decisions import where_tokens
from analysis.perturb.trace import Trace
from analysis.perturb.trace_files import trace_sha256
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
    uncaptured   tokens without a recorded decision: "refuse" them, or let them keep their "own"
             (for what an engine did not capture); then `touched` says how many were imposed

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
    uncaptured: Literal["refuse", "own"] = "refuse"

    def __post_init__(self) -> None:
        trace = self.trace
        if not isinstance(trace, str | Path | Trace) or trace == "":
            raise ValueError(f"trace is {trace!r}; give an analysis.Trace, or the directory of one")
        where = str(trace.path if isinstance(trace, Trace) else trace)
        self.pin(where, trace.sha256 if isinstance(trace, Trace) else trace_sha256(Path(where)))

    @property
    def label(self) -> str:
        """As of any, and what becomes of tokens without a decision where they are not refused."""
        kept = "" if self.uncaptured == "refuse" else ", uncaptured=own"
        return f"{super().label[:-1]}{kept})"

    def to_dict(self) -> dict[str, Any]:
        """As of any, and what becomes of tokens without a decision where they are not refused."""
        kept = {} if self.uncaptured == "refuse" else {"uncaptured": self.uncaptured}
        return super().to_dict() | kept

    def opened(self) -> Trace:
        """The trace; opened, and checked byte by byte, once a process."""
        return _opened(self.trace, self.known())

    def reach(self, ctx: RouterContext) -> Tensor:
        """(T,): those that have a recorded decision."""
        return self.known_tokens(ctx.tokens, [ctx.site])

    def known_tokens(self, tokens: Tokens, sites: Sequence[RouterSite]) -> Tensor:
        """(T,) bool: which of these tokens have a recorded decision, at all of these sites."""
        at = tokens.sequence_T, tokens.position_T, tokens.token_ids_T
        return self.opened().known(*at, sites)

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
        known_T = self.known_tokens(tokens, [ctx.site])
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


@functools.lru_cache(maxsize=8)
def _opened(path: str, sha256: str) -> Trace:
    trace = Trace.load(path)
    if trace.sha256 != sha256:
        raise ValueError(f"the trace at {path} is another one than it was")
    return trace
