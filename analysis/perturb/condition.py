"""One arm of an experiment: a perturbation, where it acts, at which point and with what effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import SkipValidation
from torch import Tensor

from analysis.adapters import Router
from analysis.perturb.base import POINTS, Identity, Perturbation, about, canonical, parts_of
from analysis.perturb.catalogue import PERTURBATIONS, perturbation_from_dict
from analysis.perturb.compound import Compose
from analysis.perturb.context import RouterContext, after_score
from analysis.perturb.decisions import where_tokens
from analysis.perturb.effects import EFFECTS
from analysis.perturb.where import Where
from analysis.stats import PLAIN, label_of
from cartmoe.cards import card
from cartmoe.config import check_choice
from cartmoe.fields import Count, OneOf, declared
from cartmoe.routing import Routing

DOWNSTREAM: tuple[Literal["reroute", "replay"], ...] = ("reroute", "replay")


@declared
class Condition:
    """Its canonical JSON, `id`, is its identity. Raises `ValueError` for wrong fields.

    point       "logits", or "scores": masks act after the score function, scores' = scores *
                exp(perturb(l) - l) with l = log scores, not renormalised
    effect      which part of a changed decision is let through, a key of `EFFECTS`
    downstream  "reroute": every router works from the stream that reaches it; "replay": every
                router works from the clean run's logits, so there is no cascade of decisions
    """

    perturbation: SkipValidation[Perturbation]
    where: SkipValidation[Where] = Where()
    point: Literal["logits", "scores"] = "logits"
    effect: Annotated[str, OneOf(EFFECTS)] = "full"
    downstream: Literal["reroute", "replay"] = "reroute"
    eval_seed: Count = 0

    def _repr_html_(self) -> str:
        """What its perturbation does, and where."""
        p: Any = self.perturbation
        told = {"what it does": about(type(p))} if isinstance(p, Perturbation) else {}
        return card(str(p), told | {name: str(getattr(self, name)) for name in PLAIN})

    def __post_init__(self) -> None:
        p: Any = self.perturbation
        if isinstance(p, type) or not (isinstance(p, Perturbation) or callable(p)):
            raise ValueError(
                f"perturbation is {p!r}; give an object such as DropTop(1), of "
                f"{', '.join(PERTURBATIONS)}, or a function (logits_TE, ctx) -> logits_TE"
            )
        made = getattr(p, "__dataclass_params__", None)
        if isinstance(p, Perturbation) and not (made and made.frozen):
            raise ValueError(f"perturbation is {p!r}; its class must be a @dataclass(frozen=True)")
        if "__pydantic_fields__" not in vars(type(p)) and hasattr(p, "__pydantic_fields__"):
            raise ValueError(
                f"perturbation is {p!r}; its class derives from one whose fields declare what they "
                "take, so decorate it with cartmoe.fields.declared too"
            )
        object.__setattr__(self, "where", Where.parse(self.where))
        if self.point not in getattr(p, "points", POINTS):
            raise ValueError(
                f"point is {self.point!r}; {type(p).__name__} works at {' and '.join(p.points)}"
            )
        if self.downstream == "replay" and getattr(p, "needs_input", False):
            raise ValueError(
                f"downstream is 'replay'; {p.label} needs what enters the router, and then nothing "
                "does: later routers work from recorded logits"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` takes it back."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"perturbation": self.perturbation.to_dict(), "where": str(self.where)}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Condition:
        """`ValueError` with the choices for what does not exist."""
        for name in d:
            check_choice("field of a condition", name, [f.name for f in fields(cls)])
        return cls(**(d | {"perturbation": perturbation_from_dict(d.get("perturbation", {}))}))

    @property
    def id(self) -> str:
        """Canonical JSON, equal exactly for equal conditions; "clean" of the clean run."""
        if isinstance(self.perturbation, Clean):
            return self.perturbation.label
        return canonical(self.to_dict())

    def columns(self) -> dict[str, Any]:
        """The columns that name it in every table: `perturbation` is a label, to be read by people;
        programs read its name and parameters (as JSON)."""
        p, own = self.perturbation, self.to_dict()
        parameters = own.pop("perturbation")
        return {
            "condition": self.id,
            "perturbation": p.label,
            "strength": p.strength,
            "expects": p.expects,
            "name": parameters.pop("name"),
            "parameters": canonical(parameters),
        } | own

    def apply(self, base: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The decision under this condition of a router whose own one is `base`."""
        changed = self._perturb(self.perturbation, base, router, ctx)
        if changed is base:
            return base
        changed = EFFECTS[self.effect](base, changed, router)
        inside_T = self.where.inside(ctx.tokens)
        return changed if inside_T is None else where_tokens(inside_T, changed, base)

    def apply_purely(self, base: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The same. Raises `ValueError` unless a perturbation of yours does the same when it is
        asked twice, and leaves what it is given as it is: else results could not be repeated."""
        if all(type(part).__module__.startswith("analysis.") for part in _parts(self.perturbation)):
            return self.apply(base, router, ctx)
        before = [t.clone() for t in base]
        first, second = (self.apply(base, router, ctx) for _ in range(2))
        label = getattr(self.perturbation, "label", repr(self.perturbation))
        if not all(map(torch.equal, base, before)):
            raise ValueError(
                f"{label} changes in place what it is given; it must return another tensor"
            )
        if not all(map(torch.equal, first, second)):
            raise ValueError(
                f"{label} gave two answers to one question; its random numbers must be those of "
                "ctx.noise (normal, uniform, gumbel), which are the same for the same token"
            )
        return first

    def touched(self, ctx: RouterContext) -> Tensor:
        """(T,) bool: the tokens whose decision it could change at this router, by where it acts and
        by what its perturbation can reach."""
        of = getattr(self.perturbation, "reach", lambda ctx: None)
        masks = [self.where.inside(ctx.tokens), of(ctx)]
        every_T = torch.ones_like(ctx.tokens.position_T, dtype=torch.bool)
        return torch.stack([every_T, *(m for m in masks if m is not None)]).all(0)

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


def _parts(p: object) -> Iterable[object]:
    """It and what it is made of; of a `Custom` the function too."""
    parts = parts_of(p) if isinstance(p, Perturbation) else [p]
    return [own for part in parts for own in (part, getattr(part, "function", part))]


LogitsFunction = Callable[[Tensor, RouterContext], Tensor]


def _checked(perturb: LogitsFunction, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
    moved_TE = perturb(logits_TE, ctx)
    good = isinstance(moved_TE, Tensor) and moved_TE.shape == logits_TE.shape
    if not good or moved_TE.dtype != logits_TE.dtype:
        got: Any = moved_TE
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


@declared
class Clean(Identity):
    """No perturbation, and no hook."""

    @property
    def label(self) -> str:
        """ "clean"."""
        return "clean"


CLEAN = Condition(Clean())  # the run that all others are compared with


def of_one_name(conditions: Iterable[Condition]) -> dict[str, list[Condition]]:
    """By label, different ones that tables could not tell apart."""
    found: dict[tuple[str, int], dict[Condition, None]] = {}
    for condition in conditions:
        p = condition.perturbation
        options = {name: str(getattr(condition, name)) for name in PLAIN}
        name = label_of(p.label, p.strength, **options)
        found.setdefault((name, condition.eval_seed), {})[condition] = None
    return {name: list(same) for (name, _), same in found.items() if len(same) > 1}


def models_of(conditions: Iterable[Condition]) -> list[Any]:
    """The models in memory that these ask, other than those that they act in, each once."""
    found = (m for c in conditions for m in getattr(c.perturbation, "models", ()))
    return list({id(model.module): model for model in found}.values())
