"""What a study has left in its directory, read back: the plan names cells, the store has them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.measure import FACTS, MODELS, Results, is_saved
from analysis.stats import CHECKPOINT
from analysis.study.store import Store
from cartmoe.corpora import unit_of
from cartmoe.files import path_of
from cartmoe.sealed import read_sealed

STORE, PLAN = "results.sqlite", "plan.json"
STREAMS = "streams"  # hidden states of models that are larger than memory, while they run


def read_plan(out: Path) -> dict[str, Any]:
    """What `run` has written: study, contrasts, manifest, facts, cells.

    Raises `FileNotFoundError` where there is no study, `ValueError` for a damaged file.
    """
    path = out / PLAN
    if not path.is_file():
        raise FileNotFoundError(f"{out} holds no study (no {PLAN}); run one with --out {out}")
    try:
        return read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{error}; run the study again") from error


def read(out: str | Path) -> Results:
    """The results in a study's directory, finished or not (of an unfinished one those that can be
    paired), or what `Results.save` wrote.

    Raises `FileNotFoundError` if there is neither, `ValueError` if nothing is measured yet and
    naming a damaged file.
    """
    out = path_of("out", out)
    if is_saved(out):
        return Results.load(out)
    plan = read_plan(out)
    planned = pd.DataFrame(plan["cells"])
    with Store(out / STORE, readonly=True) as store:
        seconds, failures = store.seconds(), store.failures()
        finished = planned[planned.key.isin(seconds.keys())]
        parts = [_paired(part) for _, part in finished.groupby(CHECKPOINT, sort=False)]
        if not sum(map(len, parts)):
            raise ValueError(
                f"{out}: {len(finished)} of {len(planned)} cells are measured, and no clean run; "
                "there is nothing to read"
            )
        paired = pd.concat(parts)
        columns = paired.drop(columns="shard")
        tables = {
            name: columns.merge(store.read(name, columns.key), on="key").drop(columns="key")
            for name in ("losses", "routing")
        }
    failed = planned[~planned.key.isin(seconds.keys())].merge(failures, on="key")
    return Results(
        unit=unit_of(plan["study"]["data"]["corpus"]),
        **tables,
        facts=pd.DataFrame(plan["facts"], columns=FACTS),
        finished=len(finished),
        planned=len(planned),
        cells=finished.assign(seconds=finished.key.map(seconds)).drop(columns="key"),
        failed=failed.drop(columns="key"),
        models=pd.DataFrame(plan["models"], columns=MODELS),
        tokens=partial(_tokens, out, paired) if plan["study"]["measure"]["tokens"] else None,
    )


def _tokens(
    out: Path, cells: pd.DataFrame, model: str, train_seed: int, condition: str
) -> pd.DataFrame:
    """`Results.tokens`: every token's loss, from the store when asked for."""
    wanted = (cells.model == model) & (cells.train_seed == train_seed)
    keys = cells[wanted & (cells.condition == condition)][["key"]]
    if keys.empty:
        raise KeyError((model, train_seed, condition))
    with Store(out / STORE, readonly=True) as store:
        rows = keys.merge(store.read("tokens", keys.key), on="key").drop(columns="key")
    return rows if condition == "clean" else rows.drop(columns="targets")


def _paired(cells: pd.DataFrame) -> pd.DataFrame:
    """Of one model's finished cells a largest product of shards and conditions, the clean run
    among them: a condition is compared with the clean run on the same documents."""
    shards = cells.groupby("condition").shard.agg(frozenset)
    clean = shards.get("clean", frozenset())

    def measured_on(wanted: frozenset[int]) -> list[str]:
        return [condition for condition, have in shards.items() if wanted <= have]

    candidates = [have for have in dict.fromkeys(shards) if have <= clean]
    best = max(candidates, key=lambda s: (len(s) * len(measured_on(s)), len(s)), default=clean)
    return cells[cells.shard.isin(best) & cells.condition.isin(measured_on(best))]


def progress_of(out: Path) -> str:
    """ "12 of 40 cells are measured", without reading any of them."""
    keys = [cell["key"] for cell in read_plan(out)["cells"]]
    with Store(out / STORE, readonly=True) as store:
        finished = store.keys()
    return f"{sum(key in finished for key in keys)} of {len(keys)} cells are measured"
