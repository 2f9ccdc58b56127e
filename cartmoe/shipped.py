"""The trained models that come with the project: models/NAME-sSEED, checkpoints in bf16, and
models/hf/NAME, directories of the transformers library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "models"
PRETRAINED = MODELS / "hf"  # those of the transformers library
TABLE = "models.csv"  # what was measured of each; see `analysis.models`
BASELINES = "baselines.csv"  # bits per byte of simpler models on the same text
CHECK, CHECKED = "check.txt", "check.json"  # a text, and the nats per byte of each model on it


def shipped(name: str | Path) -> Path | None:
    """The folder of the model of that name: "cartesian" (training seed 0) or "cartesian-s1", or
    "olmoe", which is one of the transformers library."""
    text = str(name)
    if not re.fullmatch(r"\w+(-s\d+)?", text, re.ASCII):
        return None
    folders = MODELS / (text if "-s" in text else f"{text}-s0"), PRETRAINED / text
    return next(filter(Path.is_dir, folders), None)


def named_by(folder: Path) -> dict[str, Any] | None:
    """{"name": ..., "train_seed": ...} of the folder of one of them."""
    if folder.parent != MODELS:
        return None
    name, _, seed = folder.name.rpartition("-s")
    return {"name": name, "train_seed": int(seed)}


def shipped_names() -> list[str]:
    """Of all compact ones, seed 0 first."""
    folders = (path for path in MODELS.glob("*-s*") if path.is_dir())
    return sorted((path.name for path in folders), key=lambda name: (name.split("-s")[1], name))


def checked_nats() -> dict[str, Any]:
    """name -> nats per byte on `CHECK`, as it was where the model was trained."""
    return json.loads((MODELS / CHECKED).read_text(encoding="utf-8"))
