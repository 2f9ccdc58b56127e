"""Fields that declare what they take: each wrong value is named, with what it must be.

    @declared
    class Noise:
        sigma: NonNegative = 1.0
        scale: Literal["token", "site"] = "token"

`Noise(-1, "x")` raises one `ValueError` with a line a mistake: "sigma is -1; it must be at least
0", "scale is 'x'; choose one of 'token', 'site'". Equal values have the same JSON: numbers of NumPy
become plain ones, 1 as a `Share` is 1.0, and True is no number.

A `__post_init__` sees good values, and raises for what no field can tell alone. A validator of
one's own raises `ValueError("must be ...")`; the name and the value are put before it.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, ErrorDetails
from pydantic_core.core_schema import literal_schema


def _plain(value: Any) -> Any:
    """Python's own number for one of NumPy or torch."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _finite(value: Any) -> Any:
    """A whole number beyond all floats is infinite; pydantic would raise an OverflowError."""
    value = _plain(value)
    return math.inf if type(value) is int and abs(value) > sys.float_info.max else value


LARGEST = 2**63 - 1  # of whole numbers: what TOML, NumPy and torch hold
PLAIN = BeforeValidator(_plain)
FINITE = BeforeValidator(_finite)

Whole = Annotated[int, Field(strict=True, ge=-LARGEST, le=LARGEST), PLAIN]
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST), PLAIN]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST), PLAIN]
Several = Annotated[int, Field(strict=True, ge=2, le=LARGEST), PLAIN]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), FINITE]
AboveZero = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), FINITE]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), FINITE]
Flag = Annotated[bool, Field(strict=True), PLAIN]
Text = Annotated[str, Field(strict=True, min_length=1)]

# Of a field that is None until `__post_init__` fills it in, so that a type checker sees no None.
FILLED = WrapValidator(lambda value, check: None if value is None else check(value))


def listed(kind: Any) -> BeforeValidator:
    """For a tuple's field: one item stands for a list of it."""
    return BeforeValidator(
        lambda value: value if isinstance(value, list | tuple) else (value,),
        json_schema_input_type=kind | list[kind],
    )


class OneOf:
    """For a text's field: one of a dict's keys, as `Literal` is of those written out."""

    def __init__(self, choices: Iterable[str]):
        self.choices = list(choices)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return literal_schema(self.choices)


# Words for pydantic's kinds of mistakes.
_MUST = {
    "int_type": "must be a whole number",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "bool_type": "must be True or False",
    "string_type": "must be a text",
    "string_too_short": "must be a text",
    "tuple_type": "must be a list",
    "too_short": "must be a list that is not empty",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "value_error": "{error}",
    "multiple_argument_values": "must be given once",
    "callable_type": "must be a function",
    "is_instance_of": "must be a {class}",
}


@dataclass_transform(frozen_default=True)
def declared(cls):
    """Make the class a frozen dataclass whose fields take only what they declare."""
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    made = dataclass(frozen=True, config=config)(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise ValueError("\n".join(_mistakes(made, error))) from None

    made.__init__ = checked
    return made


def _mistakes(cls: type, error: ValidationError) -> list[str]:
    found: dict[str, dict[str, None]] = {}  # where a field takes several types, each says its own
    for details in error.errors():
        if details["type"] == "too_short" and details["input"]:
            continue  # its items are wrong, which others say
        subject, complaint = _mistake(cls, details)
        found.setdefault(subject, {})[complaint] = None
    return [subject + " or ".join(complaints) for subject, complaints in found.items()]


def _mistake(cls: type, error: ErrorDetails) -> tuple[str, str]:
    """What is wrong, and what it must be."""
    names = [f.name for f in fields(cls)]
    kind, value, said = error["type"], error["input"], error.get("ctx", {})
    if not error["loc"]:  # of a __post_init__
        return str(said["error"]), ""
    place, *within = error["loc"]
    name = names[place] if isinstance(place, int) and place < len(names) else place
    if kind == "unexpected_keyword_argument":
        return (
            f"field of {cls.__name__} is {name!r}; ",
            f"choose one of {', '.join(map(repr, names))}",
        )
    if kind == "missing" and not within:
        return f"{cls.__name__} lacks {name}", ""
    if kind == "missing":
        return f"{name} is {value!r}; ", "it has too few values"
    if kind == "unexpected_positional_argument":
        return f"{cls.__name__} takes {len(names)} values; {value!r} is one more", ""
    if kind == "literal_error":
        choices = said["expected"].replace(" or ", ", ")
        return f"{name} is {value!r}; ", f"choose one of {choices}"
    said = {key: f"{v:g}" if isinstance(v, float) else v for key, v in said.items()}
    must = _MUST[kind].format(**said) if kind in _MUST else f"is wrong: {error['msg']}"
    if any(isinstance(place, int) for place in within):
        return f"{name} has {value!r}; ", f"each {must}"
    return f"{name} is {value!r}; ", f"it {must}"
