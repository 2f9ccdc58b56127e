"""Numbers and intervals as people read them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.stats import FEW_DOCUMENTS, interval_texts, number_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123"), (-0.5, "-0.500"), (0.0, "0.000"), (-0.0, "0.000"),
        (12345.6, "12345.600"),
        (0.0004, "4.0e-04"), (-1e-9, "-1.0e-09"), (np.inf, "inf"), (np.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number_text(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 6), st.booleans())
def test_never_a_zero_with_a_sign(value, digits, sign):
    text = number_text(value, digits, sign)
    assert float(text) or not text.startswith("-")
    assert float(text) or not value  # nor a zero for what is none


def table(*rows, **columns):
    return pd.DataFrame(rows, columns=["v", "low", "high"]).assign(**columns)


def text(*rows, **columns):
    return interval_texts(table(*rows, **columns), "v", "low", "high")


def test_small_intervals_have_digits():
    assert text((0.0003, -0.0001, 0.0007)) == ["+0.00030 [-0.00010, 0.00070]"]
    assert text((-0.0001, -0.4, 0.4)) == ["-1.0e-04 [-0.400, 0.400]"]
    assert text((0.0, 0.0, 0.0)) == ["+0.000 [0.000, 0.000]"]
    assert text((-4e-8, -1e-7, 0.0)) == ["-4.0e-08 [-1.0e-07, 0.000000]"]


def test_few_documents_are_marked():
    rows = [(0.15, 0.145, 0.155)] * 3
    found = text(*rows, num_documents=[FEW_DOCUMENTS, FEW_DOCUMENTS - 1, 2])
    assert found == ["+0.150 [0.145, 0.155]"] + 2 * ["+0.150 [0.145, 0.155]?"]
    assert text(rows[0], num_documents=1) == ["+0.150 [0.145, 0.155]?"]
    assert text((0.15, np.nan, np.nan), num_documents=1) == ["+0.150 [-]"]
