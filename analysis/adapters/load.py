"""From a path or an object to a model under study, and documents that fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.adapters.base import Adapter, as_adapter
from analysis.adapters.cartmoe import CartMoEAdapter
from cartmoe.checkpoint import (
    CHECKPOINTS,
    checkpoint_sha256,
    newest,
    read_meta,
    read_tokenizer,
)
from cartmoe.checkpoint import load as load_checkpoint
from cartmoe.corpora import is_built_in, read_corpus
from cartmoe.data import Sequences, prepare, sequences, sequences_from
from cartmoe.model import LanguageModel
from cartmoe.tokenizers import ByteTokenizer, Tokenizer


def load(path: str | Path, *, name: str | None = None) -> CartMoEAdapter:
    """The model of a checkpoint, or of the newest good checkpoint of a run.

    Without a name it has that of the run's folder where a study trained it (NAME-sSEED), and that
    of its family elsewhere.

    Raises `FileNotFoundError` where there is none, `cartmoe.checkpoint.CheckpointError` naming the
    file of a damaged one.
    """
    folder = newest(path).resolve()
    train_seed = read_meta(folder).get("train_seed", 0)
    run, ending = folder.parent.parent, f"-s{train_seed}"
    if name is None and folder.parent.name == CHECKPOINTS and run.name.endswith(ending):
        name = run.name.removesuffix(ending) or None
    return CartMoEAdapter(
        load_checkpoint(folder).eval(),
        read_tokenizer(folder),
        name=name,
        train_seed=train_seed,
        identity=checkpoint_sha256(folder),
    )


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
    split: str = "validation",
    max_tokens_per_document: int | None = None,
) -> Sequences:
    """Documents as evaluation sequences, in the tokens of the model (bytes without one).

    corpus   a built-in one, of which the split is taken, or a path to text, of which all is
    length   tokens of a sequence;  limit   documents, spread over the domains
    """
    tokenizer: Any = (model and as_adapter(model).tokenizer) or ByteTokenizer()
    limits = dict(length=length, limit=limit, max_tokens_per_document=max_tokens_per_document)
    if not is_built_in(corpus):
        return sequences_from(read_corpus(corpus), tokenizer, **limits)
    prepared = prepare(corpus, tokenizer.name)
    if prepared.tokenizer.identity != tokenizer.identity:
        raise ValueError(
            f"the model's tokenizer {tokenizer.name!r} is not the one of that name trained on "
            f"{corpus!r} here; give documents as a path"
        )
    return sequences(prepared, split=split, **limits).by_group(prepared)
