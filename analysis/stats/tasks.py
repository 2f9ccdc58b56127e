"""Tasks under conditions against the clean run, document by document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import bdtr, ndtri

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.columns import CHECKPOINT, CONDITION, check_columns, label
from analysis.stats.contrasts import holm
from analysis.stats.seeds import sign_flip_test

QUESTION = ["task", "filter", "document"]
HASHES = ["doc_hash", "prompt_hash", "target_hash"]
ARM = ["condition", *CONDITION, "eval_seed"]
CLEAN = "clean"


def task_differences(
    samples: pd.DataFrame,
    bootstrap: Bootstrap = Bootstrap(),
    groups: Mapping[str, Sequence[str]] = {},
) -> pd.DataFrame:
    """Each metric of each task under each condition, less that of the clean run, a row each.

    samples   see `analysis.tasks.TaskResults`: value and weight of each document; a metric is the
              sum of values over the sum of weights
    groups    by name, tasks that are taken together, too: all their documents as those of one task,
              in a row behind theirs, of metrics that all of them have

    model, family, train_seed, label, those of a condition and its eval_seed, task, filter, metric,
    num_documents
    clean, value, difference, low, high   the difference with its interval over documents: of a
                     metric that is 0 or 1 Newcombe's for paired proportions (see `newcombe`), of
                     others BCa, drawn for both runs together
    lost, gained     of a metric that is 0 or 1: documents with 1 that have 0 under the condition,
                     and the reverse; NaN of others
    p, min_p         of such a metric McNemar's exact test (two-sided binomial of lost and gained),
                     of others a test that flips the signs of documents' differences; and the
                     smallest that so many documents (so many that change) allow
    p_holm           adjusted by Holm's method over the rows of one checkpoint and metric, those of
                     tasks, and those of groups, apart

    Raises `ValueError` where a document of the clean run is missing under a condition, or is
    another one there: other words, prompt or target.
    """
    check_columns("samples", samples, [*CHECKPOINT, *ARM, *QUESTION, *HASHES, "metric"])
    together = pd.concat([samples, *_grouped(samples, groups)], ignore_index=True)
    rows = [_row(*pair, bootstrap) for pair in _pairs(together)]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    table.insert(len(CHECKPOINT), "label", label(table))
    families = table.groupby([*CHECKPOINT, "metric", table.task.isin(groups)], sort=False).p
    return table.assign(p_holm=families.transform(lambda p: holm(p.to_numpy())))


def _grouped(samples: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> Iterator[pd.DataFrame]:
    """Of each group, the documents of its tasks as those of one."""
    for name, tasks in groups.items():
        own = samples[samples.task.isin(tasks)]
        have = own.groupby(["metric", "filter"]).task.transform("nunique")
        own = own[have == own.task.nunique()]
        yield own.assign(task=name, document=own.task + "/" + own.document)


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
            named = dict(zip(keys, key, strict=True)) | rows[ARM].iloc[0].to_dict()
            yield named, clean, found


def _row(named: dict, clean: pd.DataFrame, found: pd.DataFrame, bootstrap: Bootstrap) -> dict:
    values_2D = np.stack([clean.value, found.value]).astype(float)
    weights_2D = np.stack([clean.weight, found.weight]).astype(float)
    first, second = values_2D.sum(1) / weights_2D.sum(1)
    row = named | dict(num_documents=len(clean), clean=first, value=second)
    if np.isin(values_2D, (0, 1)).all() and (weights_2D == 1).all():
        was, now = values_2D.astype(bool)
        lost, gained = int((was & ~now).sum()), int((now & ~was).sum())
        low, high = newcombe(int((was & now).sum()), lost, gained, len(clean), bootstrap.confidence)
        p, least = mcnemar(lost, gained), mcnemar(lost + gained, 0)
        return (
            row
            | dict(difference=second - first, low=low, high=high)
            | dict(lost=float(lost), gained=float(gained), p=p, min_p=least)
        )
    contrast_21 = np.array([[-1.0], [1.0]])
    interval = bootstrap.intervals(values_2D, weights_2D, contrast_21)
    p, least = sign_flip_test(values_2D[1] - values_2D[0], bootstrap)
    bounds = {name: own[0] for name, own in interval.columns("difference", "low", "high").items()}
    return row | bounds | dict(lost=np.nan, gained=np.nan, p=p, min_p=least)


def newcombe(
    both: int, lost: int, gained: int, documents: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Bounds of the change of a share, of paired answers: Newcombe's method 10 (Statistics in
    Medicine 17, 1998), from Wilson's intervals of the two shares and their correlation. It has a
    width where no answer changes, as a bootstrap has not."""
    shares = (both + gained) / documents, (both + lost) / documents  # under the condition, clean
    bounds = [wilson(share, documents, confidence) for share in shares]
    neither = documents - both - lost - gained
    sides = [both + gained, lost + neither, both + lost, gained + neither]
    excess = float(both * neither - lost * gained)
    if excess > 0:  # with continuity correction
        excess = max(0.0, excess - documents / 2)
    phi = excess / np.sqrt(np.prod(np.array(sides, float))) if all(sides) else 0.0
    (low_1, high_1), (low_2, high_2) = bounds

    def width(a: float, b: float) -> float:
        return float(np.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)))

    change = shares[0] - shares[1]
    low = change - width(shares[0] - low_1, high_2 - shares[1])
    return low, change + width(high_1 - shares[0], shares[1] - low_2)


def wilson(share: float, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a share (Wilson, JASA 22, 1927)."""
    z2 = float(ndtri((1 + confidence) / 2)) ** 2
    center, size = share + z2 / (2 * number), 1 + z2 / number
    half = np.sqrt(z2 * (share * (1 - share) / number + z2 / (4 * number**2)))
    return float((center - half) / size), float((center + half) / size)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p of McNemar's test (Psychometrika 12, 1947): of documents whose answer
    changes, as many are lost as gained; 1 where none changes."""
    changed = lost + gained
    return min(1.0, 2 * float(bdtr(min(lost, gained), changed, 0.5))) if changed else 1.0


def task_table(differences: pd.DataFrame, metric: str = "acc") -> pd.DataFrame:
    """One row a checkpoint and condition, "clean" first; of each task that has the metric its
    value, and its change as "TASK difference" with "TASK low" and "TASK high"."""
    rows = differences[differences.metric == metric]
    rows = rows.assign(column=task_names(rows))
    out: list[dict] = []
    for checkpoint, own in rows.groupby(CHECKPOINT, sort=False):
        named = dict(zip(CHECKPOINT, checkpoint, strict=True))
        clean = own.drop_duplicates("column")
        out.append(named | {"label": CLEAN} | dict(zip(clean.column, clean.clean, strict=True)))
        for _, found in own.groupby("condition", sort=False):
            row = named | {"label": found.label.iloc[0], "eval_seed": found.eval_seed.iloc[0]}
            for each in found.itertuples():
                row |= {each.column: each.value, f"{each.column} difference": each.difference}
                row |= {f"{each.column} low": each.low, f"{each.column} high": each.high}
            out.append(row)
    table = pd.DataFrame(out)
    return table if table.eval_seed.nunique() > 1 else table.drop(columns="eval_seed")


def task_names(differences: pd.DataFrame) -> list[str]:
    """What tasks are called, row by row: with the filter where a task has several."""
    several = differences.groupby("task")["filter"].transform("nunique") > 1
    names = zip(differences.task, differences["filter"], several, strict=True)
    return [f"{task}, {own}" if many else task for task, own, many in names]
