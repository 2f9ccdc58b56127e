"""How long the explorer's browser waits: from a changed trait to the answer as JSON.

python -m benchmarks.explorer prints these rows alone.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

import analysis as an
from benchmarks.timing import Row

ROOT = Path(__file__).parents[1]
GOAL = 0.3  # seconds
SIZES = (300, 1000)  # tokens
SEARCHES = ("Worst",)  # flips by the gradient of the loss: a backward and several forwards


def rows():
    """Rows of the bench table: over all perturbations, at the strength at which they begin and at
    another one; and of another text, with its clean pass and calibration."""
    text = (ROOT / "cartmoe" / "routing.py").read_text()
    for size in SIZES:
        widget = an.explore("cartesian", text[:size])
        waits = {}
        for control in widget.about["controls"]:
            other = control["strengths"][len(control["strengths"]) // 2]
            for strength in {control["start"], other}:
                question = {"perturbation": control["name"], "strength": float(strength)}
                waits[control["name"], strength] = _wait(widget, question)
        plain = {asked: wait for asked, wait in waits.items() if asked[0] not in SEARCHES}
        worst = max(plain, key=lambda asked: plain[asked])
        searches = max(wait for asked, wait in waits.items() if asked not in plain)
        detail = (
            f"median {1e3 * statistics.median(plain.values()):.0f} ms, worst "
            f"{1e3 * plain[worst]:.0f} ms ({worst[0]}); Worst {1e3 * searches:.0f} ms"
        )
        what = f"explorer, cartesian, {size} tokens: worst answer / 300 ms"
        yield Row(what, plain[worst] / GOAL, "<= 1", detail)
        widget.set_state({"perturbation": "DropTop", "strength": 1.0})
        texts = [_wait(widget, {"text": text[n : n + size]}) for n in range(1, 6)]
        detail = f"median of 5 {1e3 * statistics.median(texts):.0f} ms"
        what = f"explorer, cartesian, {size} tokens: another text / 300 ms"
        yield Row(what, statistics.median(texts) / GOAL, "<= 2", detail)


def _wait(widget, question: dict) -> float:
    """Seconds until what the browser is sent for this question is written."""
    start = time.perf_counter()
    widget.set_state(question | {"asked": widget.asked + 1})
    json.dumps(widget.get_state(["run", "curve", "message", "answered", "passage"]))
    assert not widget.message, widget.message
    return time.perf_counter() - start


if __name__ == "__main__":
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}")
    for row in rows():
        print(f"{row.what:<62} {row.ratio:>6.3f}  {row.goal:<5} {row.detail}")
