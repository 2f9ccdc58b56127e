"""What lm-eval logs of a run as a table: of each document and metric a value and a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd

# Of a document (nats, words or bytes): what each is called here, and what its nats are divided by.
RATIOS = {
    "word_perplexity": ("nats per word", 1.0),
    "byte_perplexity": ("nats per byte", 1.0),
    "bits_per_byte": ("bits per byte", math.log(2)),
}
ANSWER = "answer nats"  # of the right answer


def sample_table(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """task, filter, document, doc_hash, prompt_hash, target_hash, metric, value, weight.

    Perplexities, which are no means, are kept as nats and their number of words or bytes, or of
    documents; "answer nats" is what the right answer's tokens cost, where answers are given.
    Metrics that are not numbers of a document are left out.
    """
    rows = []
    for task, logged in samples.items():
        for sample in logged:
            named = dict(task=task, filter=sample["filter"], document=str(sample["doc_id"]))
            named |= {name: sample[name] for name in ("doc_hash", "prompt_hash", "target_hash")}
            for metric, value, weight in _metrics(sample):
                rows.append(named | dict(metric=metric, value=value, weight=weight))
    return pd.DataFrame(rows)


def _metrics(sample: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    for name in sample["metrics"]:
        value = sample[name]
        if name in RATIOS:
            called, unit = RATIOS[name]
            yield called, -float(value[0]) / unit, float(value[1])
        elif name == "perplexity":
            yield "nats", -float(value), 1.0
        elif isinstance(value, Real):
            yield name, float(value), 1.0
    if (nats := _answer(sample)) is not None:
        yield ANSWER, nats, 1.0


def _answer(sample: Mapping[str, Any]) -> float | None:
    """Nats of the right answer, of a document that has answers with likelihoods."""
    found = sample["filtered_resps"]
    if not all(isinstance(each, Sequence) and len(each) == 2 for each in found):
        return None
    if not all(isinstance(p, Real) and isinstance(best, bool) for p, best in found):
        return None
    if len(found) == 1:
        return -float(found[0][0])
    target = sample["target"]
    if isinstance(target, str):
        said = [str(arguments[1]).strip() for arguments in sample["arguments"]]
        target = said.index(target.strip()) if target.strip() in said else None
    if not isinstance(target, int) or not 0 <= target < len(found):
        return None
    return -float(found[target][0])
