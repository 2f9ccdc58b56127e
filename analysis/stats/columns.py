"""What tables are called by: their columns, labels of conditions, and checks of what is given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import pandas as pd

CHECKPOINT = ["model", "family", "train_seed"]
CONDITION = ["perturbation", "strength", "where", "point", "effect", "downstream"]
KEY = CHECKPOINT + CONDITION
SITE = [*CHECKPOINT, "layer", "stage"]
UNIT = ["document_id", "sequence_id"]
SUMS = ["num_tokens", "num_bytes", "nll_sum", "kl_sum", "num_agree"]
NAMED = ["name", "parameters"]  # of the perturbation, to be read by programs; labels are for people
OTHER = ["condition", *NAMED, "expects", "eval_seed", "delta_max"]
MEASURED = ["kl", "agreement", "delta_max", "num_touched"]

# What a condition has unless it says otherwise, and what a label therefore leaves out.
PLAIN = {"where": "all", "point": "logits", "effect": "full", "downstream": "reroute"}


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise `ValueError` naming the parameter, the value and the choices unless value is one."""
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices)) or "nothing: there is none"
        raise ValueError(f"{name} is {value!r}; choose one of {listed}")


def check_columns(name: str, frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise `ValueError` naming the table and the columns that it lacks, or what it is instead."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"{name} is a {type(frame).__name__}; give the table of that name")
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        hint = "; damage(full=True) has all" if name == "damage" else ""
        raise ValueError(f"table {name} lacks the columns {', '.join(missing)}{hint}")


def of_checkpoint(frame: pd.DataFrame, checkpoint: Mapping[str, object]) -> pd.DataFrame:
    """Its rows of a table that names checkpoints by model and train_seed."""
    same = [frame[name] == checkpoint[name] for name in ("model", "train_seed")]
    return frame[same[0] & same[1]]


def label(conditions: pd.DataFrame) -> pd.Series:
    """One readable name a row: "DropTop(1)", "DropTop(1), stage 0, scores", "NoRouted".

    It tells rows apart as well as the columns perturbation, strength, where, point, effect and
    downstream do, so it also serves to choose a condition. A perturbation's own options stand
    behind its strength: "DropTop(ratio)" of 0.25 is "DropTop(0.25, ratio)".
    """
    names = [label_of(**row) for row in conditions[CONDITION].to_dict("records")]
    return pd.Series(names, index=conditions.index, name="label", dtype=object)


def label_of(perturbation: str, strength: float, **options: str) -> str:
    """The label of one condition; its columns as in `CONDITION`."""
    if not pd.isna(strength):
        base, _, own = perturbation.partition("(")
        perturbation = f"{base}({strength:.12g}, {own}" if own else f"{base}({strength:.12g})"
    extra = [options[name] for name, plain in PLAIN.items() if options[name] != plain]
    return ", ".join([perturbation, *extra])


def is_plain(conditions: pd.DataFrame) -> pd.Series:
    """Whether a row acts everywhere, with all its effect, as `PLAIN` says."""
    return (conditions[list(PLAIN)] == list(PLAIN.values())).all(axis=1)


def parameter(conditions: pd.DataFrame, name: str) -> pd.Series:
    """A parameter of each row's perturbation; None where it has none of that name."""
    return conditions.parameters.map(lambda text: json.loads(text).get(name)).astype(object)


def control(damage: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of a control under plain options, the greatest strength last.

    Of two variants of equal strength the one with the perturbation's default options is last.
    """
    rows = damage[is_plain(damage) & (damage["name"] == name)]
    return rows.sort_values(["strength", "perturbation"], ascending=[True, False])
