"""What is said of a model that is larger than memory, or not there yet, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from analysis.adapters import weight_files
from analysis.study.larger import needs_of
from analysis.study.machine import is_streamed, threads_for
from analysis.study.plan import Plan
from analysis.study.provenance import default_device, platform_identity
from analysis.study.specs import ModelSpec
from analysis.study.study import Study
from analysis.study.texts import Texts, tokenizer_of
from analysis.study.unlike import why_others
from analysis.study.worker import autocast, numerics


def by_configuration(spec: ModelSpec) -> bool:
    """Whether nothing of the model itself is read: it is too large for that, or not there."""
    nothing = spec.published and spec.hf and not weight_files(Path(spec.hf))
    return spec.absent or bool(nothing) or is_streamed(spec)


def told(
    study: Study,
    spec: ModelSpec,
    out: Path,
    kept: Mapping[str, dict[str, Any]],
    chosen: int | None,
) -> str:
    """What is said of a model that is larger than memory, or not there yet."""
    alone = replace(study, models=(spec,), contrasts=None)
    texts = None if spec.absent else Texts.of(alone, tokenizer_of(alone, spec))
    finished, others, threads = 0, [], threads_for(spec, chosen)
    platform = platform_identity(default_device(), threads)
    with torch.random.fork_rng(), numerics(platform), autocast(study.measure.precision):
        needs = needs_of(alone, spec, texts)
    if kept:
        plan = Plan.of(alone, chosen)
        planned = [cell for there in plan.find(out) if there for cell in plan.work(there).cells]
        finished, others = sum(cell.key in kept for cell in planned), why_others(planned, kept)
    left = 1 - finished / needs.cells
    at_most = "at most " if spec.absent else ""
    lines = [
        f"Study {study.name!r}, {spec.name}: {at_most}{needs.cells} cells, {finished} finished",
        str(needs),
        f"    measuring, with {threads} thread{'s' * (threads > 1)}: about "
        f"{spoken(needs.seconds * left)}",
        "Told from its configuration, the time from two shallow models of that with random weights"
        f"{'' if needs.reading else ', without the time of reading'}; nothing was written.",
    ]
    return "\n".join([*lines, *others])


def spoken(seconds: float) -> str:
    """ "3 s", "12 min", "5.2 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
