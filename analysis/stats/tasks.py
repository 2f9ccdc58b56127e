"""Tasks under conditions against the clean run, document by document."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.special import bdtr

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.columns import CHECKPOINT, CONDITION, check_columns, label
from analysis.stats.contrasts import holm
from analysis.stats.seeds import sign_flip_test

QUESTION = ["task", "filter", "document"]
HASHES = ["doc_hash", "prompt_hash", "target_hash"]
CLEAN = "clean"


def task_differences(samples: pd.DataFrame, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
    """Each metric of each task under each condition, less that of the clean run, a row each.

    samples   see `analysis.tasks.TaskResults`: value and weight of each document; a metric is the
              sum of values over the sum of weights

    model, family, train_seed, those of a condition, label, task, filter, metric, num_documents
    clean, value, difference, low, high   the difference with a BCa interval over documents, drawn
                     for both runs together
    lost, gained     of a metric that is 0 or 1: documents with 1 that have 0 under the condition,
                     and the reverse; NaN of others
    p                of such a metric McNemar's exact test (two-sided binomial of lost and gained),
                     of others a test that flips the signs of documents' differences
    p_holm           adjusted by Holm's method over all rows

    Raises `ValueError` where a document of the clean run is missing under a condition, or is
    another one there: other words, prompt or target.
    """
    check_columns("samples", samples, [*CHECKPOINT, *CONDITION, *QUESTION, *HASHES, "metric"])
    rows = [row for pair in _pairs(samples) for row in _rows(*pair, bootstrap)]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    table.insert(len(CHECKPOINT), "label", label(table))
    return table.assign(p_holm=holm(table.p.to_numpy()))


def _pairs(samples: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame, pd.DataFrame]]:
    """(what names it, the clean rows, those under a condition), documents in one order."""
    keys = [*CHECKPOINT, "task", "filter", "metric"]
    for key, own in samples.groupby(keys, sort=False):
        parts = dict([*own.groupby("condition", sort=False)])
        clean = parts.pop(CLEAN).set_index("document")
        for name, rows in parts.items():
            found = rows.set_index("document")
            if set(found.index) != set(clean.index) or len(found) != len(clean):
                raise ValueError(f"samples of {name!r} have other documents than the clean run")
            found = found.loc[clean.index]
            if other := [h for h in HASHES if (found[h] != clean[h]).any()]:
                which = clean.index[(found[other[0]] != clean[other[0]]).to_numpy()][0]
                raise ValueError(
                    f"samples of {name!r} have another {other[0]} for document {which!r} of task "
                    f"{key[3]!r} than the clean run: the task does not ask the same every time"
                )
            named = dict(zip(keys, key, strict=True)) | rows[CONDITION].iloc[0].to_dict()
            yield named, clean, found


def _rows(
    named: dict, clean: pd.DataFrame, found: pd.DataFrame, bootstrap: Bootstrap
) -> Iterator[dict]:
    values_2D = np.stack([clean.value, found.value]).astype(float)
    weights_2D = np.stack([clean.weight, found.weight]).astype(float)
    contrast_21 = np.array([[-1.0], [1.0]])
    interval = bootstrap.intervals(values_2D, weights_2D, contrast_21)
    binary = bool(np.isin(values_2D, (0, 1)).all() and (weights_2D == 1).all())
    change_D = values_2D[1] - values_2D[0]
    lost, gained = (float((change_D < 0).sum()), float((change_D > 0).sum()))
    p = mcnemar(int(lost), int(gained)) if binary else sign_flip_test(change_D, bootstrap)[0]
    first, second = values_2D.sum(1) / weights_2D.sum(1)
    yield named | dict(
        num_documents=len(clean),
        clean=first,
        value=second,
        difference=interval.value_M[0],
        low=interval.low_M[0],
        high=interval.high_M[0],
        lost=lost if binary else np.nan,
        gained=gained if binary else np.nan,
        p=p,
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p of McNemar's test (Psychometrika 12, 1947): of documents whose answer
    changes, as many are lost as gained; 1 where none changes."""
    changed = lost + gained
    return min(1.0, 2 * float(bdtr(min(lost, gained), changed, 0.5))) if changed else 1.0


def task_table(differences: pd.DataFrame, metric: str = "acc") -> pd.DataFrame:
    """One row a checkpoint and condition, "clean" first; of each task the metric, and its change as
    "TASK difference" with "TASK low" and "TASK high"."""
    rows = differences[differences.metric == metric]
    out: list[dict] = []
    for checkpoint, own in rows.groupby(CHECKPOINT, sort=False):
        named = dict(zip(CHECKPOINT, checkpoint, strict=True))
        clean = own.drop_duplicates(["task", "filter"])
        out.append(named | {"label": CLEAN} | dict(zip(_tasks(clean), clean.clean, strict=True)))
        for name, found in own.groupby("label", sort=False):
            row = named | {"label": name}
            for task, each in zip(_tasks(found), found.itertuples(), strict=True):
                row |= {task: each.value, f"{task} difference": each.difference}
                row |= {f"{task} low": each.low, f"{task} high": each.high}
            out.append(row)
    return pd.DataFrame(out)


def _tasks(rows: pd.DataFrame) -> list[str]:
    """What tasks are called: with the filter where there are several."""
    several = rows.groupby("task")["filter"].transform("nunique") > 1
    names = zip(rows.task, rows["filter"], several, strict=True)
    return [f"{task}, {own}" if many else task for task, own, many in names]
