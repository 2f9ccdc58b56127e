"""The same cells with the loops turned inside out: a segment outside, batches and conditions
inside, for a model of which a segment's weights are in memory at a time. Shapes: T tokens, B batch,
L length, D model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from analysis.adapters import Adapter, batches, owned
from analysis.measure.batch import Batch
from analysis.measure.bookmarks import Bookmarks, marked
from analysis.measure.calibrate import Calibrating
from analysis.measure.collector import Cell, join
from analysis.perturb import Calibration, Condition, Worst, models_of, parts_of, token_kinds
from cartmoe.data import Sequences


def measure_by_segment(
    model: Adapter,
    conditions: Sequence[Condition],
    shard: Sequences,
    *,
    batch_size: int,
    calibration: Calibration | Calibrating | None,
    reuse: Collection[Condition],
    keep_tokens: bool,
    streams: Path | None,
    progress: Callable[[int], object],
) -> list[Cell]:
    """See `measure`, which gives the same to the last bit. The streams of all batches and
    conditions are kept between segments: in memory, or in a folder, from which the same call goes
    on behind the last segment that a batch went through (`forget_streams` removes it). Raises as
    `check_streamed`.
    """
    check_streamed(model.name, conditions)
    kinds_V = token_kinds(model, [c.where for c in conditions])
    running = calibration if isinstance(calibration, Calibrating) else None
    known = calibration.known if isinstance(calibration, Calibrating) else calibration
    parts = batches(model, shard, batch_size)
    each = [Batch(model, part, conditions, known, kinds_V, keep_tokens) for part in parts]
    names = {batch: f"batch-{number:05}" for number, batch in enumerate(each)}
    marks = of_calibration = None
    if streams:
        common = {"model": model.identity, "calibration": calibration and calibration.sha256}
        own = {
            "conditions": [condition.id for condition in conditions],
            "reuse": sorted(condition.id for condition in reuse),
            "data": shard.sha256,
            "batch_size": batch_size,
            "tokenizer": getattr(model.tokenizer, "identity", None),  # kinds of tokens
        }
        marks, of_calibration = (Bookmarks(streams, common | of, model.device) for of in (own, {}))
    last = len(model.segments()) - 1
    with owned(*models_of(conditions)):
        for number in range(last + 1):
            behind = [b for b in each if not marks or marks.done(names[b]) <= number]
            if behind and running and not running.complete:
                with marked(of_calibration, "calibration", running):
                    running.reach(number)
            for batch in behind:
                with marked(marks, names[batch], batch):
                    batch.reach(number, reuse)
            progress(_share(len(each) * len(conditions), number, last + 1))
        cells = []
        for batch in each:
            with marked(marks, names[batch], batch, write=False):
                if running and batch.done <= last and not running.complete:  # it was damaged
                    with marked(of_calibration, "calibration", running):
                        running.reach(last)
                batch.reach(last, reuse)
                batch.end()
                cells.append(batch.cells())
    return [join(of_condition) for of_condition in zip(*cells, strict=True)]


def check_streamed(name: str, conditions: Sequence[Condition]) -> None:
    """Raise `ValueError` for conditions that are made of a whole clean pass, which a model of this
    name, of which a layer is in memory at a time, does not have at once."""
    for condition in conditions:
        for part in parts_of(condition.perturbation):
            if isinstance(part, Worst) or hasattr(part, "prepare"):
                raise ValueError(
                    f"{condition.perturbation.label} needs the whole model at once, of which "
                    f"{name} has a layer at a time in memory; load it whole"
                )


def _share(whole: int, number: int, parts: int) -> int:
    """The part of that number, so that all of them make the whole."""
    return whole * (number + 1) // parts - whole * number // parts
