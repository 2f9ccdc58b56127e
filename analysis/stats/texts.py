"""Numbers and intervals as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import numpy as np
import pandas as pd

# Intervals over fewer documents are too short. Of simulated studies with the tails that packages of
# the standard library have, 95 % intervals held the truth in 89 % at 50 documents, 88 % at 20, 82 %
# at 10, 77 % at 5 and 47 % at 2 (tests/analysis/stats/test_coverage.py).
FEW_DOCUMENTS = 20
FEW = "?"  # behind such an interval
FEW_NOTE = (
    f"{FEW} from fewer than {FEW_DOCUMENTS} documents, too few for an interval: of simulated 95 % "
    "intervals 82 % held the truth at 10 documents, 77 % at 5, 47 % at 2"
)
SMALLEST = 6  # decimals; what is smaller is written with an exponent

# Columns of bounds, by the column that they are of, beside NAME_low and NAME_high, NAME low and
# NAME high.
BOUNDS = {
    **dict.fromkeys(("delta_nats", "nats", "value", "r"), ("low", "high")),
    "delta_bits_per_byte": ("bpb_low", "bpb_high"),
    "bits_per_byte": ("bpb_low", "bpb_high"),
    "perplexity_ratio": ("ratio_low", "ratio_high"),
}
UNSIGNED = ("nats", "bits_per_byte", "perplexity", "perplexity_ratio")  # no changes


def decimals(values: Iterable[float], digits: int = 3) -> int:
    """So many, or more, to show two significant digits of the largest of these numbers."""
    sizes = [abs(v) for v in values if np.isfinite(v) and v]
    if not sizes:
        return digits
    shown = min(2, digits)
    return min(SMALLEST, max(digits, shown - 1 - math.floor(math.log10(max(sizes)))))


def number_text(value: float, digits: int = 3, sign: bool = False) -> str:
    """With so many decimals, or an exponent where these would show nothing; never "-0.000"."""
    plus = "+" if sign else ""
    if value and np.isfinite(value) and abs(value) < 10.0**-digits:
        return f"{value:{plus}.1e}"
    text = f"{value:{plus}.{digits}f}"
    return text.replace("-", plus, 1) if not float(text) else text


def interval_texts(
    table: pd.DataFrame, value: str, *bounds: str, digits: int = 3, sign: bool = True
) -> list[str]:
    """Those columns, named as in `Intervals.columns`, as "+0.123 [0.100, 0.150]", row by row; "-"
    stands for NaN.

    digits   decimals, more where a row has none but zeros there
    sign     "+" before what is positive
    Behind what is of fewer than `FEW_DOCUMENTS`, going by a column num_documents, stands "?".
    """
    numbers = table[[value, *(bounds or (f"{value}_low", f"{value}_high"))]].astype(float)
    few = table.get("num_documents", pd.Series(np.inf, table.index)) < FEW_DOCUMENTS
    marks = [FEW if f else "" for f in few]
    return [_text(*each, digits, sign) for each in zip(numbers.to_numpy(), marks, strict=True)]


def bounds_of(table: pd.DataFrame, name: str) -> tuple[str, str] | None:
    """The columns with the bounds of that one, if it has any."""
    candidates = [(f"{name}_low", f"{name}_high"), (f"{name} low", f"{name} high")]
    candidates += [BOUNDS[name]] if name in BOUNDS else []
    return next((pair for pair in candidates if set(pair) <= set(table.columns)), None)


def column_texts(table: pd.DataFrame, name: str, digits: int = 3) -> list[str]:
    """A column as people read it, each cell with its bounds where the table has them."""
    if bounds := bounds_of(table, name):
        return interval_texts(table, name, *bounds, digits=digits, sign=name not in UNSIGNED)
    return [value_text(value, digits) for value in table[name]]


def value_text(value: object, digits: int = 3) -> str:
    """A number, whole or with so many decimals, or a text; "-" for what is missing."""
    if value is None or value is pd.NA or value is pd.NaT or value != value:
        return "-"
    whole = not isinstance(value, Real) or isinstance(value, Integral)
    return str(value) if whole else number_text(float(value), digits)  # type: ignore[arg-type]


def _text(row: Sequence[float], mark: str, digits: int, sign: bool) -> str:
    value, low, high = row
    if np.isnan(value):
        return "-"
    digits = decimals(row, digits)
    center = number_text(value, digits, sign=sign)
    if np.isnan(low):
        return f"{center} [-]"
    return f"{center} [{number_text(low, digits)}, {number_text(high, digits)}]{mark}"
