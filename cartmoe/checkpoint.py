"""Checkpoints: folders that are written atomically and checked byte by byte when read.

    config.json            `ModelConfig`
    meta.json              where the weights come from: family, corpus, tokenizer, seed, step, ...
    model.safetensors
    tokenizer.json         of the tokenizers library, unless the tokens are bytes
    optimizer.safetensors  of a training run, to go on with
    manifest.json          size and SHA-256 of each

A run (see `cartmoe.run`) holds them as RUN/checkpoints/step-00000100.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cartmoe.config import ModelConfig, check_whole
from cartmoe.files import path_of
from cartmoe.folders import damage, read_manifest, write_folder
from cartmoe.foreign import named, read_object, read_text
from cartmoe.model import LanguageModel
from cartmoe.reference import config_from_reference, from_reference
from cartmoe.shipped import PRETRAINED, shipped, shipped_names
from cartmoe.skeleton import skeleton
from cartmoe.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer

__all__ = [
    "CheckpointError",
    "checkpoint_sha256",
    "from_reference",
    "import_reference",
    "load",
    "newest",
    "read_config",
    "read_meta",
    "read_optimizer",
    "read_tokenizer",
    "save",
]

CHECKPOINTS, STEP = "checkpoints", "step-"
META = "meta.json"


class CheckpointError(ValueError):
    """A checkpoint that is not what was written, or not one at all; names the file."""


def save(
    model: LanguageModel,
    directory: str | Path,
    meta: Mapping[str, Any] | None = None,
    *,
    tokenizer_json: str | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint in one step: whatever happens, it is there whole or not at all.

    meta            plain JSON: what there is to know of the weights' origin; "family" is added
    tokenizer_json  the text that a `JsonTokenizer` was made from
    optimizer       its state as tensors
    files           name -> text of what else is to lie beside them

    Raises `FileExistsError` where the directory exists.
    """
    meta = {"family": model.config.family} | dict(meta or {})

    def fill(folder: Path) -> None:
        _write_json(folder / "config.json", model.config.to_dict())
        _write_json(folder / META, meta)
        with named(directory):
            save_file(_tensors(model), folder / "model.safetensors")
            if optimizer is not None:
                save_file(dict(optimizer), folder / "optimizer.safetensors")
        if tokenizer_json is not None:
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")

    write_folder(path_of("directory", directory), fill)


def _tensors(model: LanguageModel) -> dict[str, Tensor]:
    """By name, a tensor that the architecture shares once, and a copy of one that was tied."""
    kept: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of the architecture's tensors, by which one it is
    taken: set[int] = set()
    tensors, slots = model.state_dict(), skeleton(model.config).state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        first = names.setdefault(id(slots.get(name, tensor)), name)
        where = tensor.untyped_storage().data_ptr()
        if first == name or where != tensors[first].untyped_storage().data_ptr():
            kept[name] = tensor.clone() if where in taken else tensor.contiguous()
            taken.add(where)
    return kept


def load(directory: str | Path) -> LanguageModel:
    """The model of a checkpoint, or of the newest one of a run, on the CPU, in its stored dtype.

    Raises as `newest` does, and `CheckpointError` for weights that are not the configuration's.
    """
    folder = newest(directory)
    config = read_config(folder)
    with named(folder / "config.json", CheckpointError):
        model = skeleton(config)
    with named(folder / "model.safetensors", CheckpointError):
        # A copy, because tensors mapped from a file are not aligned as torch aligns its own.
        tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
        unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    # Names of a shared tensor, stored under another, were filled in with it.
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing or unexpected:
        raise CheckpointError(
            f"{folder}/model.safetensors is not of config.json: it lacks {missing[:5]}, and has "
            f"{unexpected[:5]} too much"
        )
    return model


def located(directory: str | Path) -> Path:
    """The path, or where there is none the model of that name that comes with the project."""
    path = path_of("directory", directory)
    return path if path.exists() else shipped(directory) or path


def newest(directory: str | Path) -> Path:
    """The directory itself if it is a checkpoint, or the newest good checkpoint of a run.

    Every byte is checked. A damaged checkpoint of a run is passed over with a warning. Raises
    `FileNotFoundError` where there is none, `CheckpointError` where all there are are damaged.
    A name of `cartmoe.shipped` is the model that comes with the project, where no such path exists.
    """
    directory = located(directory)
    if not directory.is_dir():
        there = [*shipped_names(), *(path.name for path in sorted(PRETRAINED.glob("*")))]
        names = f"; {', '.join(there)} come with the project" * bool(there)
        raise FileNotFoundError(
            f"{directory} is no directory: there is no checkpoint, and none is fetched{names}"
        )
    if not (directory / CHECKPOINTS).is_dir():
        _raise_damage(directory, damage(directory))
        return directory
    problems: list[str] = []
    for folder in reversed(run_checkpoints(directory)):
        problem = damage(folder)
        if problem is None:
            for text in problems:
                warnings.warn(f"{text}; {folder.name} is used instead", stacklevel=2)
            return folder
        problems.append(f"checkpoint {folder} is damaged: {problem}")
    if problems:
        raise CheckpointError("; ".join(problems))
    raise FileNotFoundError(f"run {directory} has no checkpoint yet")


def run_checkpoints(run: Path) -> list[Path]:
    """Those of a run, oldest first, good or not; not what somebody else put beside them."""
    folders = (run / CHECKPOINTS).glob(f"{STEP}*")
    return sorted(filter(_is_step, folders), key=step_of)


def _is_step(folder: Path) -> bool:
    number = folder.name.removeprefix(STEP)
    return number.isascii() and number.isdecimal()


def step_folder(run: Path, step: int) -> Path:
    """Where the run keeps the checkpoint of that step."""
    return run / CHECKPOINTS / f"{STEP}{step:08d}"


def step_of(folder: Path) -> int:
    """The inverse of `step_folder`."""
    return int(folder.name.removeprefix(STEP))


def checkpoint_sha256(directory: str | Path) -> str:
    """The identity of a checkpoint's model, from its manifest: of its configuration and weights,
    whatever else is stored beside them. `newest` and `load` check that the files agree with it."""
    files = read_manifest(_checked(directory))
    parts = [files[name]["sha256"] for name in ("config.json", "model.safetensors")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_config(directory: str | Path) -> ModelConfig:
    """The model's configuration."""
    path = _checked(directory, "config.json") / "config.json"
    fields = read_object(path, CheckpointError)
    if "model_type" in fields:
        raise CheckpointError(
            f"{path.parent} holds a model of the transformers library; analysis.load takes it"
        )
    with named(path, CheckpointError):
        return ModelConfig.from_dict(fields)


def read_meta(directory: str | Path) -> dict[str, Any]:
    """What `save` was given as meta, and "family"."""
    path = _checked(directory, META) / META
    meta = read_object(path, CheckpointError)
    with named(path, CheckpointError):
        for name in ("family", "corpus", "tokenizer"):
            if not isinstance(meta.get(name), str | None):
                raise ValueError(f"{name} is {meta[name]!r}; it must be a text")
        for name in {"step", "steps", "train_seed"} & meta.keys():
            check_whole(name, meta[name], 0)
    return meta


def _checked(directory: str | Path, *names: str) -> Path:
    """As `newest`, but of a checkpoint check these files alone: weights take long to hash."""
    directory = located(directory)
    if (directory / CHECKPOINTS).is_dir() or not directory.is_dir():
        return newest(directory)
    _raise_damage(directory, damage(directory, names))
    return directory


def _raise_damage(directory: Path, problem: str | None) -> None:
    if problem:
        raise CheckpointError(f"{directory} is not a whole checkpoint: {problem}")


def read_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer that the model was trained with, as far as the checkpoint knows it."""
    folder = _checked(directory, META)
    name = read_meta(folder).get("tokenizer")
    if "tokenizer.json" in read_manifest(folder):
        path = _checked(folder, "tokenizer.json") / "tokenizer.json"
        with named(path, CheckpointError):
            return JsonTokenizer(path.read_text(encoding="utf-8"), name or folder.name)
    return ByteTokenizer() if name == ByteTokenizer.name else None


def read_optimizer(directory: str | Path) -> dict[str, Tensor]:
    """The optimizer's state. Raises `CheckpointError` for a checkpoint that has none."""
    name = "optimizer.safetensors"
    path = _checked(directory)
    if name not in read_manifest(path):
        raise CheckpointError(f"{path} has no {name}; training cannot go on from it")
    _checked(path, name)
    with named(path / name, CheckpointError):
        return {name: tensor.clone() for name, tensor in load_file(path / name).items()}


def import_reference(directory: str | Path, out: str | Path) -> LanguageModel:
    """Write a checkpoint of the authors' weights: a folder of config.json and *.safetensors.

    Weights may be in shards, with or without an index. Returns the model. Raises
    `FileNotFoundError` for missing files, `CheckpointError` naming a file that cannot be read,
    and as `from_reference` does.
    """
    directory = path_of("directory", directory)
    read = _parse(directory / "config.json")
    with named(directory / "config.json", CheckpointError):
        config = config_from_reference(read)
    state: dict[str, Tensor] = {}
    for path in _shards(directory):
        with named(f"{path} is not a whole safetensors file", CheckpointError):
            state |= load_file(path)
    with named(directory, CheckpointError):
        model = from_reference(state, config)
    tokenizer = directory / "tokenizer.json"
    text = read_text(tokenizer) if tokenizer.exists() else None
    save(model, out, {"source": "reference checkpoint"}, tokenizer_json=text)
    return model


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        with named(index, CheckpointError):
            names = sorted({str(name) for name in _parse(index)["weight_map"].values()})
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise FileNotFoundError(f"{directory} lacks {', '.join(missing)} of {index.name}")
        return [directory / name for name in names]
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{directory} has no *.safetensors file")
    return shards


def _parse(path: Path) -> dict[str, Any]:
    """A JSON object that others wrote."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    return read_object(path, CheckpointError)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
