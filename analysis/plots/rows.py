"""Which rows of an overlap a picture shows: of one metric, and of one site of one model."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.stats import INDEX, SITE, check_choice, check_columns, check_one_step, facts_of

NUMBERS = ["value", "low", "high", "null"]


def metric_rows(source: Any, metric: str, *tables: str) -> pd.DataFrame:
    """The rows of one metric, in the order in which sites were measured.

    source  an object with these tables as attributes, such as an Overlap, or one of its tables

    Raises `ValueError` for other things, missing columns, tables without rows, a metric that none
    of the tables has, naming those that they have, and rows of several steps of training.
    """
    kinds = " or ".join(tables)
    if isinstance(source, pd.DataFrame):
        fitting = [table for table in tables if set(INDEX[table]) <= set(source.columns)]
        frames = {(fitting or tables)[0]: source}
    else:
        frames = {table: getattr(source, table, None) for table in tables}
    if not all(isinstance(frame, pd.DataFrame) for frame in frames.values()):
        raise ValueError(
            f"overlap is a {type(source).__name__}; give an Overlap or its table {kinds}"
        )
    for table, frame in frames.items():
        check_columns(table, frame, [*SITE, "metric", *INDEX[table], *NUMBERS])
    if all(frame.empty for frame in frames.values()):
        raise ValueError(f"table {' or '.join(frames)} has no rows: nothing of it was measured")
    measured = {name: frame for frame in frames.values() for name in frame.metric.unique()}
    check_choice(f"metric of {kinds}", metric, measured)
    rows = measured[metric][measured[metric].metric == metric]
    check_one_step(rows)
    return rows


def one_site(
    rows: pd.DataFrame,
    layer: int | None = None,
    stage: int | None = None,
    model: str | None = None,
    train_seed: int | None = None,
) -> tuple[pd.DataFrame, str]:
    """Those of one site of one checkpoint, and "model, layer 2, stage 0".

    A layer or stage that is not given is the first one measured; a model or train_seed must be
    given where there are several. Raises `ValueError` with the choices.
    """
    seeds = rows.groupby("model").train_seed.nunique().max() > 1
    wanted = {"model": model, "train_seed": train_seed, "layer": layer, "stage": stage}
    for name in sorted(wanted, key=lambda name: wanted[name] is None):  # what is given comes first
        value, choices = wanted[name], rows[name].unique().tolist()
        if value is None and (name in ("layer", "stage") or len(choices) == 1):
            value = choices[0]
        check_choice(name, value, choices)
        rows = rows[rows[name] == value]
    first = rows.iloc[0]
    checkpoint = f"{first.model} #{first.train_seed}" if seeds else first.model
    return rows, f"{checkpoint}, layer {first.layer}, stage {first.stage}"


def toward_common(metric: str) -> str:
    """What stands at an axis on which more is more in common, as in the tables of `relate`."""
    return "\N{MINUS SIGN}" * facts_of(metric).apart + facts_of(metric).label
