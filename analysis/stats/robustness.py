"""The paper's Table 4: what disabling the router's first choice costs, beside its controls."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.columns import CHECKPOINT, KEY, check_columns, control, of_checkpoint
from analysis.stats.texts import interval_texts, number_text

TOP1 = "DropTop(1)"
CONTROLS = ("identity", "DropChosen(1)", "DropUnchosen(1)", "RandomRouting", "NoRouted")
# What is printed of a checkpoint, and its title.
NUMBERS = {
    **{"num_documents": "n", "top_k": "K", "renormalize": "renorm"},
    "routed_share": "routed share",
    **{"clean_perplexity": "clean ppl", "perplexity": "top-1 off ppl"},
}
INTERVAL = ["delta_nats", "low", "high"]


def robustness_table(damage: pd.DataFrame, sites: pd.DataFrame | None = None) -> pd.DataFrame:
    """Table 4 of arXiv 2410.16077 with intervals, both mask points, each stage and controls.

    One row per checkpoint: model, family, train_seed; with `sites` also top_k (a number per
    stage, "2+2"; with top-p the mean number), renormalize ("yes", "no", "mixed"), routed_share and
    routed_ratio; num_documents; clean_perplexity; perplexity (top-1 disabled everywhere, on
    logits); and for each condition named below a column of its change in nats per token, with
    "<name> low" and "<name> high": "DropTop(1)", "DropTop(1), scores", "DropTop(1), stage 0", ...
    (where that was run), then "identity", "DropChosen(1)", "DropUnchosen(1)", "RandomRouting",
    "NoRouted".

    What was not run is NaN. RandomRouting is that of the greatest strength; of several
    identities the one that is farthest from 0 stands, since each has to be exactly 0.
    """
    check_columns("damage", damage, [*KEY, "name", "label", *INTERVAL, "perplexity"])
    stages = sorted(w for w in damage["where"].unique() if str(w).startswith("stage "))
    top1 = [TOP1, f"{TOP1}, scores"]
    top1 += [f"{TOP1}, {stage}{point}" for stage in stages for point in ("", ", scores")]
    top1 = [name for name in top1 if name in set(damage.label) or name == TOP1]
    out = []
    for key, rows in damage.groupby(CHECKPOINT, sort=False):
        row = dict(zip(CHECKPOINT, key, strict=True))
        row |= {} if sites is None else router_columns(sites, row)
        if "num_documents" in rows:
            row["num_documents"] = rows.num_documents.iloc[0]
        row["clean_perplexity"] = rows.clean_perplexity.iloc[0]
        row["perplexity"] = rows.perplexity[rows.label == TOP1].max()
        for name in (*top1, *CONTROLS):
            row |= dict(zip((name, f"{name} low", f"{name} high"), _cell(rows, name), strict=True))
        out.append(row)
    return pd.DataFrame(out)


def positive_control(damage: pd.DataFrame) -> pd.DataFrame:
    """Checkpoints where random routing is not shown to hurt: an empty table is the good answer.

    Columns model, family, train_seed, delta_nats, low, high (nats per token), taken from
    RandomRouting at its greatest strength; NaN where it was not run. A model here has not been
    shown to have learnt its routing, so no other condition proves anything about it.
    """
    check_columns("damage", damage, [*KEY, "name", "label", *INTERVAL])
    groups = damage.groupby(CHECKPOINT, sort=False)
    cells = [(*key, *_cell(rows, "RandomRouting")) for key, rows in groups]
    table = pd.DataFrame(cells, columns=[*CHECKPOINT, *INTERVAL])
    return table[~(table.low > 0)].reset_index(drop=True)


def find(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows, the decisive one last, of a label or a name in `CONTROLS` in one checkpoint's rows."""
    if name == "identity":
        found = rows[rows["name"].str.lower() == name]
        return found.sort_values("delta_nats", key=np.abs, kind="stable")
    if name in ("RandomRouting", "NoRouted"):
        return control(rows, name)
    return rows[rows.label == name]


def _cell(rows: pd.DataFrame, name: str) -> tuple[float, float, float]:
    found = find(rows, name)[INTERVAL]
    return tuple(found.iloc[-1]) if len(found) else (np.nan,) * 3


def router_columns(sites: pd.DataFrame, row: dict[str, object]) -> dict[str, object]:
    """What tables print of a checkpoint's router beside its damage, by column."""
    check_columns("sites", sites, ["model", "train_seed", "layer", "stage", "metric", "value"])
    mine = of_checkpoint(sites, row)

    def metric(name: str) -> pd.Series:
        return mine[mine.metric == name].set_index("stage").value.astype(float).dropna()

    top_k, active = (metric(name).groupby("stage").mean() for name in ("top_k", "active"))
    renormalized = tuple(set(metric("renormalize").astype(bool)))
    return {
        "top_k": "+".join(f"{k:.3g}" for k in top_k.combine_first(active)) or None,
        "renormalize": {(True,): "yes", (False,): "no", (): None}.get(renormalized, "mixed"),
        "routed_share": metric("routed_share").mean(),
        "routed_ratio": metric("routed_ratio").mean(),
    }


def format_robustness(table: pd.DataFrame, width: int = 140) -> str:
    """The table as aligned text of at most `width` columns, intervals in brackets.

    Controls and columns that do not fit go into further blocks below, each of which begins
    with the model. A cell that was not measured is "-", a number behind a model its train_seed.
    """
    check_columns("robustness", table, ["model", "train_seed", "clean_perplexity", "perplexity"])
    names = table.model.astype(str)
    if table.model.duplicated().any():
        names = names + " #" + table.train_seed.astype(str)
    columns = {"model": names.tolist()}
    for name, title in NUMBERS.items():
        if name in table:
            columns[title] = [_number(v) for v in table[name]]
    for name in table.columns:
        if f"{name} low" in table:
            columns[name] = interval_texts(table, name, f"{name} low", f"{name} high")
    blocks: list[list[list[str]]] = [[]]
    first, *rest = (_aligned(title, cells) for title, cells in columns.items())
    for column in rest:
        full = len("  ".join(cells[0] for cells in (first, *blocks[-1], column))) > width
        if blocks[-1] and (full or column[0].strip() == CONTROLS[0]):
            blocks.append([])
        blocks[-1].append(column)
    lines = ["Change in nats per token [interval over documents], after perplexities (ppl):"]
    for block in blocks:
        lines += ["  ".join(cells).rstrip() for cells in zip(first, *block, strict=True)] + [""]
    return "\n".join(lines[:-1])


def _aligned(title: str, cells: list[str]) -> list[str]:
    size = max(map(len, (title, *cells)))
    side = "<" if title == "model" else ">"
    return [f"{text:{side}{size}}" for text in (title, *cells)]


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "-"
    return str(value) if isinstance(value, Integral) else number_text(value, 2)
