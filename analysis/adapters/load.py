"""From a path or an object to a model under study, and documents that fit it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.adapters.base import Adapter, as_adapter
from analysis.adapters.cartmoe import CartMoEAdapter
from cartmoe.checkpoint import CHECKPOINTS, checkpoint_sha256, newest, read_meta, read_tokenizer
from cartmoe.checkpoint import load as load_checkpoint
from cartmoe.config import ModelConfig, check_choice
from cartmoe.corpora import is_built_in, open_source, read_corpus
from cartmoe.data import Sequences, prepare, sequences, sequences_from
from cartmoe.files import path_of
from cartmoe.model import LanguageModel
from cartmoe.skeleton import skeleton as model_skeleton
from cartmoe.tokenized import SPLITS, documents_of
from cartmoe.tokenizers import ByteTokenizer, Tokenizer


def load(
    path: str | Path,
    *,
    name: str | None = None,
    train_seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    device: str = "cpu",
) -> CartMoEAdapter:
    """The model of a checkpoint, or of the newest good checkpoint of a run.

    Without a name it has that of the run's folder where a study trained it (NAME-sSEED), and that
    of its family elsewhere; without seed and tokenizer those that the checkpoint knows.

    Raises `FileNotFoundError` where there is none, `cartmoe.checkpoint.CheckpointError` naming the
    file of a damaged one.
    """
    folder = newest(path_of("path", path)).resolve()
    meta = read_meta(folder)
    trained = meta.get("train_seed", 0)
    run, ending = folder.parent.parent, f"-s{trained}"
    if name is None and folder.parent.name == CHECKPOINTS and run.name.endswith(ending):
        name = run.name.removesuffix(ending) or None
    return CartMoEAdapter(
        load_checkpoint(folder).to(device).eval(),
        tokenizer or read_tokenizer(folder),
        name=name,
        train_seed=trained if train_seed is None else train_seed,
        identity=checkpoint_sha256(folder),
        trained_on=meta,
    )


def skeleton(
    config: ModelConfig, *, name: str | None = None, train_seed: int = 0
) -> CartMoEAdapter:
    """The model without any weights: its sites and what is fixed by the architecture."""
    return CartMoEAdapter(model_skeleton(config), name=name, train_seed=train_seed)


def adapt(model: LanguageModel, tokenizer: Tokenizer | None = None, *, name: str | None = None):
    """A model in memory as a model under study; `ValueError` for a class that is not supported."""
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"model is a {type(model).__name__}; analysis.adapt takes a cartmoe.LanguageModel"
        )
    return CartMoEAdapter(model, tokenizer, name=name)


def documents(
    corpus: str | Path,
    model: Adapter | None = None,
    *,
    length: int = 256,
    limit: int | None = None,
    split: str | None = None,
    max_tokens_per_document: int | None = None,
) -> Sequences:
    """Documents as evaluation sequences, in the tokens of the model (bytes without one).

    corpus   a built-in one, or a path to text
    length   tokens of a sequence;  limit   documents, spread over the domains
    split    "validation" or "train", as training divides the corpus, or "all". Default: of a
             built-in corpus, and of one that the model was trained on, "validation"; else "all"

    Warns where the model was trained on these documents, as far as its checkpoint tells, and where
    documents repeat others, which are left out. Raises `ValueError` for an unknown split, one
    without documents, no text at all, and numbers below 1.
    """
    under_study = None if model is None else as_adapter(model)
    tokenizer: Any = (under_study and under_study.tokenizer) or ByteTokenizer()
    meta = getattr(under_study, "trained_on", {})
    seen = bool(meta) and _same_corpus(corpus, meta)
    split = split or ("validation" if is_built_in(corpus) or seen else "all")
    check_choice("split", split, (*SPLITS, "all"))
    if seen and split != "validation":
        name = getattr(under_study, "name", "the model")
        warnings.warn(
            f"{name} was trained on documents of {str(corpus)!r}, of which split={split!r} gives "
            'some: what is measured on them says little of other text. split="validation" has none',
            stacklevel=2,
        )
    limits: dict[str, Any] = dict(length=length, limit=limit)
    limits["max_tokens_per_document"] = max_tokens_per_document
    if split == "all":
        return sequences_from(read_corpus(corpus), tokenizer, **limits)
    if not is_built_in(corpus):
        return sequences_from(documents_of(open_source(corpus), split), tokenizer, **limits)
    prepared = prepare(corpus, tokenizer.name)
    if prepared.tokenizer.identity != tokenizer.identity:
        raise ValueError(
            f"the model's tokenizer {tokenizer.name!r} is not the one of that name trained on "
            f"{corpus!r} here; give documents as a path"
        )
    return sequences(prepared, split=split, **limits).by_group(prepared)


def _same_corpus(corpus: str | Path, meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's "meta" says that its model was trained on this corpus: the same text,
    or what lay at the same place then."""
    trained = meta.get("corpus")
    if trained is None:
        return False
    if is_built_in(corpus) or is_built_in(trained):
        return str(corpus) == trained
    if path_of("corpus", corpus).resolve() == path_of("corpus", trained).resolve():
        return True
    fingerprint = meta.get("corpus_fingerprint")
    return fingerprint is not None and open_source(corpus).fingerprint == fingerprint
