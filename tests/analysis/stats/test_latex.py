"""Tables for a paper: a column and its bounds in one cell, what LaTeX reads otherwise escaped."""

import numpy as np
import pandas as pd
import pytest

import analysis as an
from analysis.stats.texts import FEW_NOTE

TABLE = pd.DataFrame(
    {
        "model": ["a_b & 50 %", "c^2 <d> \\ {e} ~ $f#"],
        "num_documents": [30, 5],
        "delta_nats": [0.1234, -0.00012],
        "low": [-0.1, -0.0002],
        "high": [0.2, 4e-8],
        "share": [np.nan, 0.5],
        "share_low": [np.nan, 0.25],
        "share_high": [np.nan, 0.75],
        "flips": [0.0, -0.0],
    }
)


def test_every_column_and_its_bounds():
    first = r"a\_b \& 50 \% & 30 & +0.123 [$-$0.100, 0.200] & - & 0.000 \\"
    name = r"c\textasciicircum{}2 \textless{}d\textgreater{} \textbackslash{} \{e\} "
    name += r"\textasciitilde{} \$f\#"
    change = r"$-$0.00012 [$-$0.00020, 4.0$\cdot10^{-8}$]?"
    assert an.latex(TABLE).splitlines() == [
        f"% {FEW_NOTE}",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"model & num documents & delta nats & share & flips \\",
        r"\midrule",
        first,
        rf"{name} & 5 & {change} & +0.500 [0.250, 0.750]? & 0.000 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_chosen_columns_and_a_float():
    text = an.latex(
        TABLE[:1],
        {"model": "Model", "delta_nats": "change (nats)"},
        digits=1,
        label="t",
        caption="C",
    )
    assert text.splitlines() == [
        r"\begin{table}[t]",
        r"\caption{C}",
        r"\label{t}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"Model & change (nats) \\",
        r"\midrule",
        r"a\_b \& 50 \% & +0.1 [$-$0.1, 0.2] \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        (None, None, "table is a NoneType; give a table that has rows"),
        (TABLE[:0], None, "give a table that has rows"),
        (TABLE, ["dose"], "columns is 'dose'; choose one of 'model'"),
    ],
)
def test_wrong_tables(table, columns, message):
    with pytest.raises(ValueError, match=message):
        an.latex(table, columns)


def test_what_the_mark_of_few_documents_means_stands_in_the_caption():
    lines = an.latex(TABLE, ["delta_nats"], caption="C").splitlines()
    assert lines[0] == r"\begin{table}[t]"
    assert lines[1].startswith(r"\caption{C (? from fewer than 20 documents, too few for")
    assert r"82 \% held" in lines[1]
    assert an.latex(TABLE[:1], caption="C").splitlines()[1] == r"\caption{C}"


def test_what_latex_would_take_for_something_else():
    table = pd.DataFrame({"a": ["[base]", None, pd.NA], 2: [1.0, np.nan, 0.5]})
    lines = an.latex(table, caption="50 % of a_b").splitlines()
    assert lines[1] == r"\caption{50 \% of a\_b}"
    assert lines[6:9] == [r"{}[base] & 1.000 \\", r"- & - \\", r"- & 0.500 \\"]
    with pytest.raises(ValueError, match="table has two columns of one name; it has a, a"):
        an.latex(table.set_axis(["a", "a"], axis=1))
    for digits in (True, -1, 1.5, "3"):
        with pytest.raises(ValueError, match=f"digits is {digits!r}"):
            an.latex(table, digits=digits)


def test_two_columns_of_one_title():
    text = an.latex(TABLE[:1], {"model": "x", "num_documents": "x"})
    assert text.splitlines()[2:5:2] == [r"x & x \\", r"a\_b \& 50 \% & 30 \\"]
