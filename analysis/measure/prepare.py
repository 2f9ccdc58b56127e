"""What a perturbation becomes on one batch, whose clean pass is over."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from analysis.adapters import Adapter
from analysis.measure.clean import CleanPass
from analysis.measure.search import search
from analysis.perturb import (
    Condition,
    Identity,
    Perturbation,
    Replay,
    Worst,
    check_lengths,
    map_inner,
)
from cartmoe.data import IGNORE


def prepared(model: Adapter, clean: CleanPass, condition: Condition) -> Condition:
    """The condition with what its perturbation becomes."""
    p = prepare(condition.perturbation, model, clean, condition)
    return condition if p is condition.perturbation else replace(condition, perturbation=p)


@singledispatch
def prepare(p: object, model: Adapter, clean: CleanPass, condition: Condition):
    """What takes its place; a plain function stays. `condition` is that of which it is a part.

    Raises `ValueError` if it cannot act on the model's routers there.
    """
    return p


@prepare.register
def _(p: Perturbation, model: Adapter, clean: CleanPass, condition: Condition) -> Perturbation:
    """Every part prepared on its own; a class of yours may have a `prepare` of these arguments."""
    p.check([site for site in model.sites() if condition.where(site)])
    if hasattr(p, "prepare"):
        return p.prepare(model, clean, condition)
    return map_inner(p, lambda part: prepare(part, model, clean, condition))


@prepare.register
def _(p: Worst, model: Adapter, clean: CleanPass, condition: Condition) -> Perturbation:
    """The flips found for this batch."""
    return search(p, model, clean, condition) if p.flips else Identity()


@prepare.register
def _(p: Replay, model: Adapter, clean: CleanPass, condition: Condition) -> Replay:
    """Itself. Raises `ValueError` if a token with a target has no recorded decision, unless such
    tokens are to keep their own."""
    sites = [site for site in model.sites() if condition.where(site)]
    p.check(sites)
    tokens, wanted_T = clean.tokens, clean.losses.targets_T != IGNORE
    check_lengths(p.opened(), tokens, wanted_T)
    if p.uncaptured == "own":
        return p
    known_T = p.known_tokens(tokens, sites)
    missing = int((wanted_T & ~known_T).sum())
    if missing:
        raise ValueError(
            f"trace {p.trace} has no decision for {missing} of {int(wanted_T.sum())} tokens: they "
            "were not captured, or it was recorded on shorter, or other, texts. Record it on these "
            'documents, or let them keep what the router decides: uncaptured="own"'
        )
    return p
