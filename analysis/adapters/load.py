"""From a path or an object to a model under study, and documents that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.adapters.cartmoe import CartMoEAdapter
from analysis.adapters.pretrained import as_tokenizer, is_pretrained, pretrained_sha256
from analysis.adapters.streamed import load_streamed
from analysis.adapters.transformers import TransformersAdapter, load_pretrained
from cartmoe.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    checkpoint_sha256,
    located,
    newest,
    read_config,
    read_meta,
    read_tokenizer,
)
from cartmoe.checkpoint import load as load_checkpoint
from cartmoe.config import ModelConfig
from cartmoe.files import path_of
from cartmoe.folders import MANIFEST
from cartmoe.hooks import RouterSite
from cartmoe.model import LanguageModel
from cartmoe.shipped import MODELS, TABLE
from cartmoe.skeleton import skeleton as model_skeleton
from cartmoe.tokenizers import Tokenizer


def load(
    path: str | Path,
    *,
    name: str | None = None,
    train_seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    device: str = "cpu",
    stream: bool = False,
) -> CartMoEAdapter | TransformersAdapter:
    """The model of a checkpoint, or of the newest good checkpoint of a run, or of a directory of
    the transformers library (config.json, weights, tokenizer.json).

    path   also a name of `analysis.models`, where no such path exists, and "olmoe", "olmoe_tuned",
           small models of that library; nothing is fetched
    stream of a pretrained model that is larger than memory: its weights stay on the disk, a layer's
           are read when it is run, and whoever measures goes segment by segment

    Compact models that are stored in half precision are computed with in fp32, pretrained ones as
    they are stored.
    Without a name it has that of the run's folder where a study trained it (NAME-sSEED), and that
    of its family elsewhere; without seed and tokenizer those that the checkpoint knows.

    Raises `FileNotFoundError` where there is none, `cartmoe.checkpoint.CheckpointError` naming the
    file of a damaged one, `ValueError` for a pretrained model that cannot be measured exactly,
    saying why.
    """
    if not isinstance(stream, bool):
        raise ValueError(f"stream is {stream!r}; it must be True or False")
    if is_pretrained(given := located(path_of("path", path))):
        own = as_tokenizer(tokenizer)
        if stream:
            found: TransformersAdapter = load_streamed(given, own, name=name, device=device)
        else:
            found = load_pretrained(given, own, name=name, device=device)
        found.train_seed = train_seed or 0
        return found
    if given.is_dir() and not (given / MANIFEST).exists() and not (given / CHECKPOINTS).exists():
        raise CheckpointError(
            f"{given} holds no checkpoint of this project, and no model of the transformers "
            "library: it has no config.json that names its model_type"
        )
    if stream and given.exists():
        raise ValueError(f"stream is for models of the transformers library; {given} is none")
    folder = newest(path).resolve()
    meta = read_meta(folder)
    trained = meta.get("train_seed", 0)
    run, ending = folder.parent.parent, f"-s{trained}"
    if name is None and folder.parent.name == CHECKPOINTS and run.name.endswith(ending):
        name = run.name.removesuffix(ending) or None
    name = name or meta.get("model")
    return CartMoEAdapter(
        _in_full(load_checkpoint(folder)).to(device).eval(),
        tokenizer or read_tokenizer(folder),
        name=name,
        train_seed=trained if train_seed is None else train_seed,
        identity=checkpoint_sha256(folder),
        trained_on=meta,
    )


def identity_of(path: str | Path) -> str:
    """The identity of the model at a path, from its manifest, or of a pretrained one from its
    files. Raises as `cartmoe.checkpoint.checkpoint_sha256` does."""
    given = located(path)
    return pretrained_sha256(given) if is_pretrained(given) else checkpoint_sha256(given)


def sites_of_path(path: str | Path) -> tuple[RouterSite, ...]:
    """The routers of the model at a path; of a compact one told from its configuration alone."""
    if is_pretrained(given := located(path)):
        return tuple(load(given).sites())
    return tuple(skeleton(read_config(given)).sites())


def _in_full(model: LanguageModel) -> LanguageModel:
    return model.float() if any(p.itemsize < 4 for p in model.parameters()) else model


def skeleton(
    config: ModelConfig, *, name: str | None = None, train_seed: int = 0
) -> CartMoEAdapter:
    """The model without any weights: its sites and what is fixed by the architecture."""
    return CartMoEAdapter(model_skeleton(config), name=name, train_seed=train_seed)


def adapt(
    model: Any,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    routers: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
) -> CartMoEAdapter | TransformersAdapter:
    """A model in memory as a model under study, with its tokenizer: a `cartmoe.LanguageModel`, a
    causal language model of the transformers library, or a module of your own that makes logits
    (B, L, V) of token ids (B, L).

    routers, experts   where they are not found, or others are meant: names of the modules that give
                       logits of experts, and of the single experts of a block that chooses among
                       them itself, as patterns ("layers.*.moe.experts.*")

    Raises `ValueError` for what is no such model, and for one that cannot be measured exactly,
    saying why.
    """
    if isinstance(model, LanguageModel):
        return CartMoEAdapter(model, tokenizer, name=name)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; analysis.adapt takes a cartmoe.LanguageModel, a "
            "causal language model of the transformers library, or a torch module that makes "
            "logits of token ids"
        )
    tokenizer = as_tokenizer(tokenizer)
    return TransformersAdapter(model, tokenizer, name=name, routers=routers, experts=experts)


def models() -> pd.DataFrame:
    """The trained models that come with the project, a row each, as they are kept (in bf16).

    name (for `load`), family, train_seed, parameters, tokens (trained on); on num_documents
    packages of validation text bits_per_byte with bpb_low, bpb_high, and nats per byte that
    RandomRouting and DropTop(1) cost (random_routing, drop_top, with _low and _high; NaN of
    dense); max_violation: E max f - 1 at the end of training, f an expert's share of the slots.
    Intervals are over documents: another training run is not in them.
    """
    return pd.read_csv(MODELS / TABLE)
