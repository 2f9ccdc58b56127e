"""Controls for perturbations, from what their classes declare: no list of them stands here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from analysis.perturb import PERTURBATIONS, Perturbation, about, map_inner
from cartmoe.hooks import RouterSite

# Stops of sliders, of which a control has those that its parameter allows.
WHOLE = (*range(9), 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHARES = tuple(n / 10 for n in range(11))
REAL = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
MOST = 8  # of whole numbers that do not count experts
OFF, ON = 0.0, 1.0  # of a perturbation without a number


class Control(NamedTuple):
    """What a slider moves in a perturbation.

    name        in `PERTURBATIONS`;  about  what its docstring begins with
    parameter   the field that it sets; None: it is off or on
    strengths   the slider's stops, from low to high;  start  where it stands at first
    neutral     the strength that changes nothing, None where there is none
    """

    name: str
    about: str
    parameter: str | None
    strengths: tuple[float, ...]
    start: float
    neutral: float | None


def controls(sites: Sequence[RouterSite]) -> list[Control]:
    """One for each perturbation that a number alone can make, in the catalogue's order."""
    num_experts = min(site.num_experts for site in sites)
    found = []
    for name, cls in PERTURBATIONS.items():
        try:
            default = cls()
        except ValueError:  # needs another run, other perturbations or a function
            continue
        if default != default.identity():
            found.append(_control(name, default, num_experts))
    return found


def perturbation_of(name: str, strength: float) -> Perturbation:
    """The perturbation of that name, its other parameters at their defaults. Raises `ValueError`
    for a strength that its field does not take."""
    return _set(PERTURBATIONS[name](), strength)


def _set(p: Perturbation, strength: float) -> Perturbation:
    if p.inner():
        return map_inner(p, lambda part: _set(part, strength))
    if (field := _field(p)) is None:
        return p if strength else p.identity()
    schema = _schema(p, field)
    if "items" in schema:
        return replace(p, **{field: (_number(schema["items"], strength),)})
    return replace(p, **{field: _number(schema, strength)})


def about_of(p: Perturbation) -> str:
    """What its class says of itself, up to the first stop."""
    return re.split(r"[.:;](?:\s|$)", about(type(p)))[0].replace("`", "")


def neutral_of(p: Perturbation) -> float | None:
    """The strength at which it changes nothing."""
    strength = p.identity().strength
    return None if math.isnan(p.strength) or math.isnan(strength) else strength


def _control(name: str, p: Perturbation, num_experts: int) -> Control:
    part = p.inner()[0] if p.inner() else p
    field = _field(part)
    if field is None:
        return Control(name, about_of(p), None, (OFF, ON), ON, OFF)
    schema = _schema(part, field)
    most = num_experts if field in part.within_experts else MOST
    strengths = _stops(schema.get("items", schema), most)
    start = getattr(part, field)
    if not isinstance(start, int | float):  # a format, or a list
        start = strengths[0]
    start = min(strengths, key=lambda strength: abs(strength - start))
    return Control(name, about_of(p), field, strengths, start, neutral_of(p))


def _field(p: Perturbation) -> str | None:
    """What the slider sets: its strength, or else the last parameter; None if it has none."""
    return p.strength_field or next((f.name for f in reversed(fields(p))), None)


def _schema(p: Perturbation, field: str) -> dict[str, Any]:
    """The JSON schema of a field; where it takes several types, that of its number."""
    cls: Any = type(p)
    schema = _schemas(cls)[field]
    numbers = (s for s in schema.get("anyOf", ()) if s["type"] in ("integer", "number"))
    return next(numbers, schema)


@cache
def _schemas(cls: type) -> dict[str, dict[str, Any]]:
    return TypeAdapter(cls).json_schema()["properties"]


def _number(schema: dict[str, Any], strength: float) -> float | int:
    """As the field wants it: 2.0 from a slider is the whole number 2."""
    whole = schema["type"] == "integer" and float(strength).is_integer()
    return int(strength) if whole else strength


def _stops(schema: dict[str, Any], most: int) -> tuple[float, ...]:
    low, high = schema["minimum"], schema.get("maximum", float("inf"))
    if schema["type"] == "integer":
        return tuple(n for n in WHOLE if low <= n <= min(high, most))
    return tuple(x for x in (SHARES if high == 1 else REAL) if low <= x <= high)
