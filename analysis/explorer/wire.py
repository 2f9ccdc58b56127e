"""What goes to the browser: plain JSON, numbers in bulk as base64 of small integers.

Shapes: N tokens, K slots.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from torch import Tensor

from analysis.explorer.passage import Passage, Run, Slots

Json = dict[str, Any]
NATS = 1e-3  # what losses and margins are rounded to


def packed(values: Tensor, step: float = 1.0) -> Json:
    """Whole numbers of steps, as few bytes each as they need: base64 (little-endian), bytes (1, 2
    or 4), signed, step. What is not finite counts as 0."""
    steps = np.nan_to_num(values.double().numpy() / step, posinf=0.0, neginf=0.0).round()
    low, high = int(steps.min(initial=0)), int(steps.max(initial=0))
    sign = "i" if low < 0 else "u"
    kinds = (np.dtype(f"<{sign}{size}") for size in (1, 2, 4))
    kind = next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    text = base64.b64encode(steps.astype(kind).tobytes()).decode()
    return {"base64": text, "bytes": kind.itemsize, "signed": low < 0, "step": step}


def slots_json(slots: Slots) -> Json:
    """ids and weights (N, K) row by row; weights in 255ths of 1, or of the largest, at least one
    where a slot is in use."""
    step = max(1.0, float(slots.weights_NK.max())) / 255
    weights_NK = slots.weights_NK.clamp(min=step) * (slots.weights_NK != 0)
    weights = packed(weights_NK, step)
    return {"k": slots.ids_NK.shape[1], "ids": packed(slots.ids_NK), "weights": weights}


def passage_json(passage: Passage, text: str) -> Json:
    """The text as tokens, and the clean run: see `run_json`; margins by site, in what the router
    decides by."""
    clean = passage.undisturbed
    margins = {str(s): packed(m_N.float().cpu(), NATS) for s, m_N in passage.margins.items()}
    return {
        "text": text,
        "tokens": passage.texts,
        "margins": margins,
        "num_given": passage.num_given,
        "num_bytes": int(passage.docs.num_bytes_S.sum()),
        "length": passage.docs.tokens_SL.shape[1],
        **run_json(clean),
    }


def run_json(run: Run, clean: Run | None = None) -> Json:
    """nats a token on average, every token's loss, and by site what was decided; a site that
    decides as in the clean run is left out."""
    slots = {
        str(site): slots_json(own)
        for site, own in run.slots.items()
        if clean is None or not same(own, clean.slots[site])
    }
    nats = run.nll_N.double().mean().item()
    if not math.isfinite(nats):
        raise ValueError("the loss is not finite under this condition")
    return {"nats": nats, "nll": packed(run.nll_N.cpu(), NATS), "slots": slots}


def same(a: Slots, b: Slots) -> bool:
    """Whether they are equal to the last bit."""
    return all(x.shape == y.shape and bool((x == y).all()) for x, y in zip(a, b, strict=True))
