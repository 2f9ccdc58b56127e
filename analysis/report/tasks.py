"""What `python -m analysis eval` leaves in its directory: tables, a manifest, and words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.perturb import Condition
from analysis.report.made import write_note, write_tables
from analysis.report.overlap import MANIFEST, finished, named
from analysis.stats import CHECKPOINT, FEW_DOCUMENTS, FEW_NOTE, interval_texts, number_text
from analysis.study import manifest
from analysis.tasks import evaluate, files_sha256
from cartmoe.files import write_atomically
from cartmoe.folders import check_directory
from cartmoe.lock import locked

WORDS = "tasks.txt"


def tasks_text(differences: pd.DataFrame) -> str:
    """A block a metric: tasks as columns, checkpoints and conditions as rows, "value, difference
    [95 % interval]"."""
    blocks = []
    for metric, rows in differences.groupby("metric", sort=False):
        change = interval_texts(rows, "difference", "low", "high")
        values = [number_text(value) for value in rows.value]
        cells = [f"{value}, {text}" for value, text in zip(values, change, strict=True)]
        key = [*CHECKPOINT[:1], "train_seed", "label"]
        clean = rows.drop_duplicates([*CHECKPOINT, "task", "filter"])
        first = clean.assign(label="clean", cell=[number_text(value) for value in clean.clean])
        table = pd.concat([first, rows.assign(cell=cells)])
        wide = table.pivot_table(
            index=key, columns=["task", "filter"], values="cell", aggfunc="first", sort=False
        )
        wide.columns = [t if f == "none" else f"{t}, {f}" for t, f in wide.columns]
        body = wide.reset_index().fillna("").to_string(index=False)
        blocks.append(f"{metric}\n\n{body}")
    note = (
        "Differences from the clean run with BCa intervals over documents, drawn for both runs "
        "together; p of McNemar's test where a metric is 0 or 1 (differences.csv)."
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
        task_files=files_sha256(include_path) if include_path else None,
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
