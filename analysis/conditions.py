"""One arm of an experiment: a perturbation, where it acts, at which point and with what effect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from analysis.context import RouterContext, Tokens, after_score
from analysis.effects import EFFECTS
from analysis.perturb import PERTURBATIONS, Compose, Perturbation, perturbation_from_dict
from analysis.perturb.base import set_number
from analysis.perturb.decisions import where_tokens
from analysis.tokens import KINDS
from cartmoe.config import check_choice
from cartmoe.hooks import RouterSite
from cartmoe.routing import Router, Routing

POINTS = ("logits", "scores")
DOWNSTREAM = ("reroute", "replay")


@dataclass(frozen=True)
class Where:
    """A set of sites: those of these layers and stages (None: any); and of their tokens those at
    positions first..stop - 1 (stop None: to the end) and of one of `tokens.KINDS`.

    Written "all", "layer 2", "stage 0", "layer 2 stage 1", "positions 0:16", "positions 16:",
    "tokens digit", or these joined by spaces, in this order. Raises `ValueError`.
    """

    layer: int | None = None
    stage: int | None = None
    positions: tuple[int, int | None] | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        first, stop = self.positions or (0, None)
        if stop is not None and first >= stop:
            raise ValueError(f"where is '{self}'; positions {first}:{stop} are none")
        if self.tokens is not None:
            check_choice(f"where is '{self}'; tokens", self.tokens, KINDS)

    @classmethod
    def parse(cls, text: str | Where | RouterSite) -> Where:
        """`ValueError` with examples for what cannot be read. A site stands for itself."""
        if isinstance(text, Where):
            return text
        if isinstance(text, RouterSite):
            return cls(text.layer, text.stage)
        parts = (r"layer (\d+)", r"stage (\d+)", r"positions (\d+):(\d*)", r"tokens (\w+)")
        pattern = "".join(rf"(?:{part}(?: |$))?" for part in parts)
        match = re.fullmatch(pattern, "" if text == "all" else str(text).strip())
        if match is None or (text != "all" and not str(text).strip()):
            raise ValueError(
                f"where is {text!r}; write 'all', 'layer 2', 'stage 0', 'layer 2 stage 1', "
                "'positions 0:16' or 'tokens digit'"
            )
        layer, stage, first, stop = (None if not g else int(g) for g in match.groups()[:4])
        return cls(layer, stage, None if first is None else (first, stop), match[5])

    def __str__(self) -> str:
        parts = [
            f"{n} {v}" for n, v in (("layer", self.layer), ("stage", self.stage)) if v is not None
        ]
        if self.positions:
            first, stop = self.positions
            parts.append(f"positions {first}:{'' if stop is None else stop}")
        if self.tokens:
            parts.append(f"tokens {self.tokens}")
        return " ".join(parts) or "all"

    def __call__(self, site: RouterSite) -> bool:
        """Whether the site belongs to the set."""
        return self.layer in (None, site.layer) and self.stage in (None, site.stage)

    def inside(self, tokens: Tokens) -> Tensor | None:
        """(T,) which tokens belong to the set; None if all do."""
        inside_T = None
        if self.positions:
            first, stop = self.positions
            inside_T = tokens.position_T >= first
            if stop is not None:
                inside_T &= tokens.position_T < stop
        if self.tokens:
            if tokens.kind_T is None:
                raise ValueError(f"where is '{self}'; kinds of tokens need a model with tokenizer")
            is_kind_T = tokens.kind_T == KINDS.index(self.tokens)
            inside_T = is_kind_T if inside_T is None else inside_T & is_kind_T
        return inside_T


@dataclass(frozen=True)
class Condition:
    """Its canonical JSON, `id`, is its identity. Raises `ValueError` for wrong fields.

    point       "logits", or "scores": masks act after the score function, scores' = scores *
                exp(perturb(l) - l) with l = log scores, not renormalised
    effect      which part of a changed decision is let through, a key of `EFFECTS`
    downstream  "reroute": every router works from the stream that reaches it; "replay": every
                router works from the clean run's logits, so there is no cascade of decisions
    """

    perturbation: Perturbation
    where: Where = Where()
    point: str = "logits"
    effect: str = "full"
    downstream: str = "reroute"
    eval_seed: int = 0

    def __post_init__(self) -> None:
        p = self.perturbation
        if isinstance(p, type) or not (isinstance(p, Perturbation) or callable(p)):
            raise ValueError(
                f"perturbation is {p!r}; give an object such as DropTop(1), of "
                f"{', '.join(PERTURBATIONS)}, or a function (logits_TE, ctx) -> logits_TE"
            )
        if isinstance(p, Perturbation) and not (is_dataclass(p) and p.__dataclass_params__.frozen):
            raise ValueError(f"perturbation is {p!r}; its class must be a @dataclass(frozen=True)")
        object.__setattr__(self, "where", Where.parse(self.where))
        check_choice("point", self.point, POINTS)
        check_choice("effect", self.effect, EFFECTS)
        check_choice("downstream", self.downstream, DOWNSTREAM)
        if self.point not in getattr(p, "points", POINTS):
            raise ValueError(
                f"point is {self.point!r}; {type(p).__name__} works at {' and '.join(p.points)}"
            )
        if self.downstream == "replay" and getattr(p, "needs_input", False):
            raise ValueError(
                f"downstream is 'replay'; {p.label} needs what enters the router, and then nothing "
                "does: later routers work from recorded logits"
            )
        set_number(self, "eval_seed", int)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` takes it back."""
        return {
            "perturbation": self.perturbation.to_dict(),
            "where": str(self.where),
            "point": self.point,
            "effect": self.effect,
            "downstream": self.downstream,
            "eval_seed": self.eval_seed,
        }

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Condition:
        """`ValueError` with the choices for what does not exist."""
        for name in d:
            check_choice("field of a condition", name, [f.name for f in fields(cls)])
        return cls(**(d | {"perturbation": perturbation_from_dict(d.get("perturbation", {}))}))

    @property
    def id(self) -> str:
        """Canonical JSON: equal exactly for equal conditions."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def columns(self) -> dict[str, Any]:
        """The columns that name it in every table."""
        return {
            "condition": self.id,
            "perturbation": self.perturbation.label,
            "strength": self.perturbation.strength,
            "expects": self.perturbation.expects,
            "where": str(self.where),
            "point": self.point,
            "effect": self.effect,
            "downstream": self.downstream,
            "eval_seed": self.eval_seed,
        }

    def apply(self, base: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The decision under this condition of a router whose own one is `base`."""
        changed = self._perturb(self.perturbation, base, router, ctx)
        if changed is base:
            return base
        changed = EFFECTS[self.effect](base, changed, router)
        inside_T = self.where.inside(ctx.tokens)
        return changed if inside_T is None else where_tokens(inside_T, changed, base)

    def _perturb(self, p, base: Routing, router: Router, ctx: RouterContext) -> Routing:
        if isinstance(p, Compose):
            for i, part in enumerate(p.parts):
                own = replace(ctx, clean=base, noise=ctx.noise.stream(i))
                base = self._perturb(part, base, router, own)
            return base
        if hasattr(p, "decide"):
            return p.decide(base, router, ctx)
        if self.point == "logits":
            logits_TE = _checked(p, base.logits_TE, ctx)
            return base if logits_TE is base.logits_TE else router.route(logits_TE)
        if ctx.stats:
            ctx = replace(ctx, stats=after_score(ctx.stats, router))
        scores_TE = perturb_scores(p, base.scores_TE, ctx)
        return base if scores_TE is base.scores_TE else router.decide(base.logits_TE, scores_TE)


LogitsFunction = Callable[[Tensor, RouterContext], Tensor]


def _checked(perturb: LogitsFunction, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
    moved_TE = perturb(logits_TE, ctx)
    good = isinstance(moved_TE, Tensor) and moved_TE.shape == logits_TE.shape
    if not good or moved_TE.dtype != logits_TE.dtype:
        got = moved_TE
        if isinstance(got, Tensor):
            got = f"{got.dtype} of shape {tuple(got.shape)}"
        raise ValueError(
            f"perturbation {perturb!r} returned {got}; it must return {logits_TE.dtype} of shape "
            f"{tuple(logits_TE.shape)}, as it was given"
        )
    return moved_TE


MAX_LOG_SCORE = 80.0  # fp32 ends at e^88; K of these still have a sum


def perturb_scores(perturb: LogitsFunction, scores_TE: Tensor, ctx: RouterContext) -> Tensor:
    """scores * exp(perturb(l) - l) = exp(perturb(l)), l = log scores. A score of 0 stays 0, and
    one whose l stays is the same to the last bit."""
    log_TE = scores_TE.log()
    moved_TE = _checked(perturb, log_TE, ctx)
    if moved_TE is log_TE:
        return scores_TE
    new_TE = moved_TE.clamp(max=MAX_LOG_SCORE).exp().masked_fill(scores_TE == 0, 0.0)
    return torch.where(moved_TE == log_TE, scores_TE, new_TE)
