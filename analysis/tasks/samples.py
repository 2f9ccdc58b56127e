"""What lm-eval logs of a run as a table: of each document and metric a value and a weight."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd

# By the function that makes one number of documents, which here is a mean or a ratio of sums: what
# a metric is called ("": as it is), what its values are divided by, and whether each document comes
# with a weight, its words or bytes. Perplexities are exponentials of such means: kept as nats.
KINDS: dict[str, tuple[str, float, bool]] = {
    "mean": ("", 1.0, False),
    "nanmean": ("", 1.0, False),
    "perplexity": ("nats", -1.0, False),
    "weighted_perplexity": ("nats per unit", -1.0, True),
    "bits_per_byte": ("bits per byte", -math.log(2), True),
}
UNITS = {"word_perplexity": "nats per word", "byte_perplexity": "nats per byte"}
ANSWER = "answer nats"  # of the right answer


def sample_table(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    aggregations: Mapping[str, Mapping[str, str]],
) -> pd.DataFrame:
    """task, filter, document, doc_hash, prompt_hash, target_hash, metric, value, weight.

    aggregations   by task and metric, the name of the function that lm-eval makes one number with

    Perplexities, which are no means, are kept as nats and their number of words or bytes, or of
    documents; "answer nats" is what the right answer's tokens cost, where there are several. Other
    metrics that are no means of documents are left out, with a warning. Raises `ValueError` where
    nothing is left of a task.
    """
    rows: list[dict[str, Any]] = []
    left: dict[str, None] = {}
    for task, logged in samples.items():
        before = len(rows)
        for sample in logged:
            named = dict(task=task, filter=sample["filter"], document=str(sample["doc_id"]))
            named |= {name: sample[name] for name in ("doc_hash", "prompt_hash", "target_hash")}
            for metric in sample["metrics"]:
                found = _measured(metric, sample[metric], aggregations[task].get(metric, "mean"))
                if found is None:
                    left[f"{metric} of {task}"] = None
                else:
                    rows.append(named | found)
            if (nats := _answer(sample)) is not None:
                rows.append(named | dict(metric=ANSWER, value=nats, weight=1.0))
        if len(rows) == before:
            have = ", ".join(logged[0]["metrics"]) if logged else "no document"
            raise ValueError(
                f"task {task} has nothing that is a mean over documents ({have}), so nothing that "
                "can be paired with the clean run"
            )
    if left:
        warnings.warn(f"no means over documents, and left out: {', '.join(left)}", stacklevel=2)
    return pd.DataFrame(rows)


def _measured(metric: str, value: Any, how: str) -> dict[str, Any] | None:
    if how not in KINDS:
        return None
    called, unit, weighted = KINDS[how]
    number, weight = value if weighted else (value, 1.0)
    if not isinstance(number, Real):
        return None
    name = UNITS.get(metric, called) or metric
    return dict(metric=name, value=float(number) / unit, weight=float(weight))


def _answer(sample: Mapping[str, Any]) -> float | None:
    """Nats of the right answer, of a document with several that differ in their continuation."""
    found, target = sample["filtered_resps"], sample["target"]
    if len(found) < 2 or not all(isinstance(each, tuple) and len(each) == 2 for each in found):
        return None
    said = [str(arguments[1]) for arguments in sample["arguments"]]
    if len(set(said)) < len(found):
        return None
    if isinstance(target, str):
        answers = [each.strip() for each in said]
        target = answers.index(target.strip()) if target.strip() in answers else None
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < len(found):
        return None
    return -float(found[target][0])
