"""Documents that fit a model: in its tokens, and none that it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.adapters.base import Adapter, as_adapter
from analysis.adapters.transformers import TransformersAdapter
from cartmoe.config import check_choice
from cartmoe.corpora import in_memory, is_built_in, open_source, unit_of
from cartmoe.data import Sequences, Windows, prepare, sequences, sequences_from
from cartmoe.files import path_of
from cartmoe.tokenized import SPLITS, documents_of
from cartmoe.tokenizers import ByteTokenizer


def documents(
    corpus: str | Path | Mapping[str, str],
    model: Adapter | None = None,
    *,
    length: int = 256,
    limit: int | None = None,
    split: str | None = None,
    max_tokens_per_document: int | None = None,
    windows: Windows = "spread",
) -> Sequences:
    """Documents as evaluation sequences, in the tokens of the model (bytes without one).

    corpus   a built-in one, a path to text, or texts by name: {"my notes": "..."}
    length   tokens of a sequence;  limit   documents, of each domain as it has text
    max_tokens_per_document, windows   of a longer one, windows "spread" over it, or its "first"
    split    "validation" or "train", as training divided the corpus, or "all". Default: of a
             built-in corpus, and of one that the model was trained on, "validation"; else "all"

    What a model was trained on is told by the groups of documents that its checkpoint lists (files
    by their content, the standard library's by their package), wherever they are found again.
    Warns where it was trained on some of these documents, and where documents repeat others, which
    are left out. Raises `ValueError` for an unknown split, one without documents, no text at all,
    texts that are none, and numbers below 1.
    """
    under_study = None if model is None else as_adapter(model)
    tokenizer = tokenizer_of(under_study)
    if split is not None:
        check_choice("split", split, (*SPLITS, "all"))
    limits: dict[str, Any] = dict(length=length, limit=limit, windows=windows)
    limits["max_tokens_per_document"] = max_tokens_per_document
    if is_built_in(corpus) and split != "all":
        prepared = prepare(corpus, tokenizer)
        split, table = split or "validation", prepared.documents
        seen = _check_seen(under_study, corpus, table.group, split)
        if seen:
            table = table.assign(split=np.where(table.group.isin(seen), *SPLITS))
        chosen = replace(prepared, documents=table)
        docs = sequences(chosen, split=split, **limits)
        return docs.by_group(prepared.group_of, unit_of(corpus))
    if isinstance(corpus, list | tuple):
        kind = type(corpus).__name__
        raise ValueError(f'corpus is a {kind}; give a path, or texts by name: {{"one": "..."}}')
    source = in_memory(corpus) if isinstance(corpus, Mapping) else open_source(corpus)
    found = list(source.documents)
    groups = [document.group for document in found]
    if split is None:
        saw = _groups_seen(under_study, groups) or _same_corpus(under_study, corpus)
        split = "validation" if saw or is_built_in(corpus) else "all"
    seen = _check_seen(under_study, corpus, groups, split)
    if split != "all":
        found = documents_of(source._replace(documents=iter(found)), split, seen)
    docs = sequences_from(found, tokenizer, **limits)
    if is_built_in(corpus):
        docs = docs.by_group({d.id: d.group for d in found}, unit_of(corpus))
    return docs


def tokenizer_of(model: Adapter | None) -> Any:
    """The model's tokenizer, or bytes. Raises `ValueError` for a pretrained model without one."""
    if isinstance(model, TransformersAdapter) and model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer: analysis.adapt(model, tokenizer)")
    return (model and model.tokenizer) or ByteTokenizer()


def _check_seen(
    model: Any, corpus: str | Path | Mapping[str, str], groups: Iterable[str], split: str
) -> Collection[str]:
    """Those of these groups that the model was trained on; a warning if they are to be measured."""
    seen = _groups_seen(model, groups)
    named = "the texts given" if isinstance(corpus, Mapping) else str(corpus)
    if split != "validation" and (seen or _same_corpus(model, corpus)):
        warnings.warn(
            f"{model.name} was trained on documents of {named!r}, of which split={split!r} "
            'gives some: what is measured on them says little of other text. split="validation" '
            "has none",
            stacklevel=3,
        )
    return seen


def _groups_seen(model: Any, groups: Iterable[str]) -> Collection[str]:
    return {*getattr(model, "trained_on", {}).get("groups", ())}.intersection(groups)


def _same_corpus(model: Any, corpus: str | Path | Mapping[str, str]) -> bool:
    """Whether a model that lists no groups says that it was trained on this corpus: the same text,
    or what lay at the same place then."""
    meta: Mapping[str, Any] = getattr(model, "trained_on", {})
    trained = meta.get("corpus")
    if trained is None or "groups" in meta or isinstance(corpus, Mapping):
        return False
    if is_built_in(corpus) or is_built_in(trained):
        return str(corpus) == trained
    if path_of("corpus", corpus).resolve() == path_of("corpus", trained).resolve():
        return True
    fingerprint = meta.get("corpus_fingerprint")
    return fingerprint is not None and open_source(corpus).fingerprint == fingerprint
