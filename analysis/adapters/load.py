"""From a path or an object to a model under study, and documents that fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.adapters.base import Adapter, as_adapter
from analysis.adapters.cartmoe import CartMoEAdapter
from cartmoe.checkpoint import CHECKPOINTS, checkpoint_sha256, newest, read_meta, read_tokenizer
from cartmoe.checkpoint import load as load_checkpoint
from cartmoe.config import ModelConfig
from cartmoe.corpora import is_built_in, read_corpus
from cartmoe.data import Sequences, prepare, sequences, sequences_from
from cartmoe.model import LanguageModel
from cartmoe.skeleton import skeleton as model_skeleton
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
    folder = newest(path).resolve()
    trained = read_meta(folder).get("train_seed", 0)
    run, ending = folder.parent.parent, f"-s{trained}"
    if name is None and folder.parent.name == CHECKPOINTS and run.name.endswith(ending):
        name = run.name.removesuffix(ending) or None
    return CartMoEAdapter(
        load_checkpoint(folder).to(device).eval(),
        tokenizer or read_tokenizer(folder),
        name=name,
        train_seed=trained if train_seed is None else train_seed,
        identity=checkpoint_sha256(folder),
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
    split: str = "validation",
    max_tokens_per_document: int | None = None,
) -> Sequences:
    """Documents as evaluation sequences, in the tokens of the model (bytes without one).

    corpus   a built-in one, of which the split is taken, or a path to text, of which all is
    length   tokens of a sequence;  limit   documents, spread over the domains
    """
    tokenizer: Any = (model and as_adapter(model).tokenizer) or ByteTokenizer()
    limits: dict[str, Any] = dict(length=length, limit=limit)
    limits["max_tokens_per_document"] = max_tokens_per_document
    if not is_built_in(corpus):
        return sequences_from(read_corpus(corpus), tokenizer, **limits)
    prepared = prepare(corpus, tokenizer.name)
    if prepared.tokenizer.identity != tokenizer.identity:
        raise ValueError(
            f"the model's tokenizer {tokenizer.name!r} is not the one of that name trained on "
            f"{corpus!r} here; give documents as a path"
        )
    return sequences(prepared, split=split, **limits).by_group(prepared)
