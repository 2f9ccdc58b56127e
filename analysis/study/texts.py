"""What models of a study read: its documents in the tokens of each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.adapters import tokenizer_in
from analysis.study.models import last_checkpoint
from analysis.study.specs import ModelSpec
from analysis.study.study import Study
from cartmoe.checkpoint import read_meta
from cartmoe.corpora import is_built_in, unit_of
from cartmoe.data import Corpus, Sequences, prepare, sequences
from cartmoe.tokenized import SPLITS
from cartmoe.tokenizers import Tokenizer


@dataclass(frozen=True)
class Texts:
    """The study's documents in tokens of one kind.

    shards        those to measure on, so many sequences at a time
    calibration   of the training split
    """

    corpus: Corpus
    shards: list[Sequences]
    calibration: Sequences

    @classmethod
    def of(cls, study: Study, tokenizer: str | Tokenizer) -> Texts:
        """Raises `ValueError` or `OSError` for documents that cannot be read."""
        corpus, docs = documents_of(study, tokenizer)
        size = study.data.shard
        shards = [docs[i : i + size] for i in range(0, len(docs), size)]
        limit = study.measure.calibration
        calibration = sequences(corpus, split="train", limit=limit, **_limits(study))
        return cls(corpus, shards, calibration)


def tokenizer_of(study: Study, spec: ModelSpec) -> str | Tokenizer:
    """A pretrained model's own; for the others the one that the study names. Raises `ValueError`
    for a model that is absent."""
    if spec.absent:
        raise ValueError(
            "its user brings it: give the directory that it was downloaded to, --model DIR "
            "(Study.read(path, model=DIR))"
        )
    return tokenizer_in(Path(spec.hf)) if spec.hf else study.data.tokenizer


def documents_of(
    study: Study, tokenizer: str | Tokenizer | None = None
) -> tuple[Corpus, Sequences]:
    """(the study's corpus, what of it is measured on), in tokens of this kind (None: the one that
    the study names). Warns if that is less than was asked for."""
    data = study.data
    corpus = prepare(data.corpus, data.tokenizer if tokenizer is None else tokenizer)
    corpus = _withholding(corpus, study.models)
    have = len(corpus.split(data.split))
    if data.documents is not None and data.documents > have:
        warnings.warn(
            f"corpus {corpus.name!r} has only {have} {data.split} documents (at most "
            f"{data.documents} were asked for), and all of them are taken",
            stacklevel=2,
        )
    docs = sequences(corpus, split=data.split, limit=data.documents, **_limits(study))
    return corpus, docs.by_group(corpus.group_of, unit_of(data.corpus)) if is_built_in(
        data.corpus
    ) else docs


def _withholding(corpus: Corpus, models: Sequence[ModelSpec]) -> Corpus:
    """The corpus, what any given model was trained on being for training: under another Python
    the standard library splits at another place."""
    seen: set[str] = set()
    for given in filter(None, (spec.given for spec in models)):
        with suppress(OSError, ValueError):  # which `find` tells, or which is none of ours
            seen.update(read_meta(last_checkpoint(Path(given))).get("groups", ()))
    table = corpus.documents
    held_in = table.group.isin(seen)
    return replace(corpus, documents=table.assign(split=table.split.mask(held_in, SPLITS[0])))


def _limits(study: Study) -> dict[str, Any]:
    data = study.data
    return dict(length=data.length, max_tokens_per_document=data.max_tokens, windows=data.windows)
