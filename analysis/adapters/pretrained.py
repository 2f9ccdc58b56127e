"""Which directories hold models of the transformers library, and the tokenizers beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cartmoe.checkpoint import META, read_meta
from cartmoe.folders import MANIFEST, fingerprint
from cartmoe.foreign import named, read_text
from cartmoe.tokenizers import JsonTokenizer, Tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT, beside its weights
LARGE = 2**30  # bytes of weights; reading fewer needs no bar
STARTS = ("bos_token", "cls_token", "eos_token")  # what may start a text, the best first


def is_pretrained(folder: Path) -> bool:
    """Whether the directory has a config.json that names a family of the transformers library."""
    return "model_type" in _json(folder / CONFIG)


def pretrained_sha256(folder: Path) -> str:
    """The identity of a directory's model: of its configuration, its weights and the version of the
    library that runs it, whatever else lies there. Reads every byte.

    Raises `ValueError` for a directory that holds none.
    """
    if not is_pretrained(folder):
        raise ValueError(
            f"{folder} is no directory with a model of the transformers library: it has no "
            f"{CONFIG} that names its model_type. Nothing is fetched from a hub; download it first"
        )
    weights = weight_files(folder)
    if not weights:
        raise ValueError(f"{folder} has no weights ({', '.join(WEIGHTS)})")
    others = [path for path in (folder / CONFIG, folder / ADAPTER) if path.is_file()]
    files = {path.name: _sha256(path, path.stat()) for path in (*others, *weights)}
    said = json.dumps([files, transformers_version()])
    return hashlib.sha256(said.encode()).hexdigest()


def _sha256(path: Path, now: os.stat_result) -> str:
    return _read_sha256(path.resolve(), now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=4096)
def _read_sha256(path: Path, size: int, changed: int) -> str:
    """Of a file that was not touched since: hundreds of gigabytes are read once a process."""
    return fingerprint(path)["sha256"]


def read_model(folder: Path, device: str) -> Any:
    """Its causal language model, in the dtype that it is stored in.

    Raises `ImportError` without the library, `ValueError` naming the directory where that cannot
    read it.
    """
    try:
        from cartmoe.hf import AutoModelForCausalLM  # the library's, which knows ours, too
    except ImportError as error:
        raise ImportError('a pretrained model needs pip install "cartmoe[hf]"') from error
    small = sum(path.stat().st_size for path in weight_files(folder)) < LARGE
    with named(folder), without_bars() if small else nullcontext():
        load: Any = AutoModelForCausalLM.from_pretrained
        only: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
        if is_packed(_json(folder / CONFIG)):
            only |= dict(quantization_config=unpacking())
        model, told = load(folder, dtype="auto", output_loading_info=True, **only)
    absent = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    if absent:  # which the library fills with random numbers
        raise ValueError(
            f"{folder} has no weights, or of another shape, for {len(absent)} of its model's "
            f"tensors, such as {min(absent)}"
        )
    return model.to(device).eval()


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether its weights are in MXFP4, whose kernels route by themselves, so that it is
    dequantized."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def unpacking() -> Any:
    """How the library is told to dequantize."""
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4Config(dequantize=True)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the library's bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def origin_of(folder: Path) -> dict[str, Any]:
    """What a directory that this project made says of how its model was trained; {} of others."""
    ours = (folder / MANIFEST).is_file() and (folder / META).is_file()
    return read_meta(folder) if ours else {}


def weight_files(folder: Path) -> list[Path]:
    """Those of a directory with such a model."""
    return sorted(path for end in WEIGHTS for path in folder.glob(end))


def tensor_files(folder: Path) -> dict[str, Path]:
    """By name of a tensor, the safetensors that has it, as the library takes them: the only file,
    or as the index says. Raises `ValueError` naming the directory where there is neither, and
    `FileNotFoundError` for a file of the index that is missing."""
    from safetensors import safe_open

    only, index = folder / WHOLE, folder / INDEX
    if only.is_file():
        with named(only), safe_open(only, "pt") as file:
            return dict.fromkeys(file.keys(), only)
    if not index.is_file():
        raise ValueError(f"{folder} has neither {WHOLE} nor {INDEX}; only those are read in parts")
    found = {name: folder / file for name, file in _json(index).get("weight_map", {}).items()}
    if not found:
        raise ValueError(f"{index} names no tensors")
    for path in sorted({*found.values()}):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, which {INDEX} names")
    return found


def transformers_version() -> str:
    """That which is installed."""
    try:
        return version("transformers")
    except PackageNotFoundError as error:
        raise ImportError('a pretrained model needs pip install "cartmoe[hf]"') from error


def tokenizer_in(folder: Path) -> JsonTokenizer:
    """The model's own, from its tokenizer.json; documents begin with the token that the directory
    names for that, or, where it names none, with the one that ends a text.

    Raises `ValueError` where there is none.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{folder} has no {TOKENIZER}; give a tokenizer")
    return JsonTokenizer(read_text(path), folder.name, starts=[*_starts(folder)])


def _starts(folder: Path) -> Iterator[str]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = _json(folder / name)
        for key in STARTS:
            token = said.get(key)
            yield from filter(None, [token.get("content") if isinstance(token, dict) else token])


def as_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """One of the transformers library, as documents need it; others as they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if not (tokenizer is None or hasattr(tokenizer, "num_bytes")):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}; give one of the transformers library, "
                "or of cartmoe.tokenizers"
            )
        return tokenizer
    starts = [token for key in STARTS if (token := getattr(tokenizer, key, None))]
    return JsonTokenizer(backend.to_str(), type(tokenizer).__name__, starts=starts)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # which whoever reads it tells
        return {}
    return found if isinstance(found, dict) else {}
