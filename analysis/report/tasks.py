"""What `python -m analysis eval` leaves in its directory: tables, a manifest, and words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import stats
from analysis.perturb import Condition
from analysis.report.made import write_note, write_tables
from analysis.report.overlap import MANIFEST, finished, named
from analysis.stats import FEW_DOCUMENTS, FEW_NOTE, interval_texts, number_text
from analysis.study import manifest
from analysis.tasks import evaluate, tasks_sha256
from cartmoe.files import write_atomically
from cartmoe.folders import check_directory
from cartmoe.lock import locked

WORDS = "tasks.txt"
NAMED = ["train_seed", "eval_seed"]  # said where they differ


def tasks_text(differences: pd.DataFrame) -> str:
    """A block a metric: tasks as columns, checkpoints and conditions as rows, "value, difference
    [95 % interval]"."""
    blocks = []
    for metric, rows in differences.groupby("metric", sort=False):
        table = stats.task_table(differences, str(metric))
        others = [name for name in NAMED if name in table and table[name].nunique() > 1]
        shown = table[["model", *others, "label"]].fillna("").copy()
        for task in dict.fromkeys(stats.task_names(rows)):
            change = table[[f"{task} {name}" for name in ("difference", "low", "high")]]
            change = change.assign(num_documents=rows.num_documents.min())
            changes = interval_texts(change, *change.columns[:3])
            values = [number_text(value) for value in table[task]]
            both = zip(values, changes, table[f"{task} difference"], strict=True)
            shown[task] = [v if pd.isna(d) else f"{v}, {change}" for v, change, d in both]
        blocks.append(f"{metric}\n\n{shown.to_string(index=False)}")
    note = (
        "Differences from the clean run, document by document: with Newcombe's intervals, and p of "
        "McNemar's test (differences.csv), where a metric is 0 or 1; elsewhere with BCa intervals "
        "over documents. answer nats: what the right answer costs."
    )
    few = [FEW_NOTE] if differences.num_documents.min() < FEW_DOCUMENTS else []
    return "\n\n".join([*blocks, note, *few]) + "\n"


def evaluate_into(
    out: Path,
    models: Sequence[Path],
    tasks: Sequence[str],
    conditions: Sequence[Condition],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[str, list[Path]]:
    """Write samples.csv, differences.csv, tasks.txt and manifest.json, unless this was asked there
    before; returns the text and the paths. Raises as `finished` and `evaluate` do."""
    check_directory(out)
    loaded = named(models)
    asked: dict[str, Any] = dict(
        models={f"{model.name}-s{model.train_seed}": model.identity for model in loaded},
        coverage={model.name: getattr(model, "coverage", "") for model in loaded},
        tasks=[*tasks],
        asked=tasks_sha256(tasks, include_path, num_fewshot, limit),
        conditions=[condition.to_dict() for condition in conditions],
        num_fewshot=num_fewshot,
        limit=limit,
    )
    files, words = finished(out, asked), out / WORDS
    if files is None:
        how: dict[str, Any] = dict(include_path=include_path, num_fewshot=num_fewshot, limit=limit)
        how |= dict(batch_size=batch_size, progress=progress)
        with locked(out):
            found = evaluate(loaded, tasks, conditions, **how)
            said, note = asked | manifest(), out / MANIFEST
            write_note(note, said, [])
            differences = found.differences()
            files = write_tables({"samples": found.samples, "differences": differences}, out)
            write_atomically(words, tasks_text(differences))
            write_note(note, said, [*files, words])
            files = [note, *files, words]
    return words.read_text(encoding="utf-8"), files
