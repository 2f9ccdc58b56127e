"""What it takes to measure a model that is larger than memory, told before anything is read of it.

Its configuration says how large it is. Times come from two shallow models of its shape with random
weights, one layer of experts and two: what the second adds is a layer's part, and there are so many
of them behind where a condition begins.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from analysis.adapters import Adapter, Shape, published_config, shallow, shape_of, weight_files
from analysis.measure import calibrate, measure
from analysis.perturb import CLEAN, Condition, Where
from analysis.study.machine import PROCESS, is_streamed
from analysis.study.plan import conditions_for
from analysis.study.specs import ModelSpec
from analysis.study.study import Study
from analysis.study.texts import Texts
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite

PROBE = 4  # sequences
SHORT = 30.0  # seconds that a probe may take before it is made smaller
READ = 2**28  # bytes that tell how fast a disk is
LAYERS = 3  # in memory at a time: one that runs, the next one, and what that is converted from


class Needs(NamedTuple):
    """streamed: whether a layer is in memory at a time; shards, cells: how many; bytes of memory,
    of hidden states on the disk, and read in all; seconds of reading, where files are there, and of
    computing, which go on at once."""

    shape: Shape
    streamed: bool
    shards: int
    cells: int
    memory: int
    disk: int
    read: int
    reading: float
    computing: float

    @property
    def seconds(self) -> float:
        """Of the whole."""
        return max(self.reading, self.computing)

    def __str__(self) -> str:
        """What it needs, in two lines."""
        shape = self.shape
        times = f", read {self.shards} times" if self.streamed and self.shards > 1 else ""
        layer = f", of which a layer has {_giga(shape.layer)}" if self.streamed else ""
        disk = f"; on the disk {_giga(self.disk)} of hidden states" if self.disk else ""
        return f"""\
    {shape.depth} layers, {len(shape.routed)} with experts; {_giga(shape.stored)} of weights{times}
    memory: about {_giga(self.memory)}{layer}{disk}"""


def needs_of(study: Study, spec: ModelSpec, texts: Texts | None) -> Needs:
    """Of one model of the study, under all of its conditions.

    texts   what it reads; None: as many documents as the study asks for, each of full length

    Raises `ValueError` where the library has no such model, or it cannot be measured exactly.
    """
    config = published_config(Path(spec.hf)) if spec.hf else spec.published or {}
    shape, data = shape_of(config), study.data
    sizes = [len(shard) for shard in texts.shards] if texts else _shards(study)
    small, more = (shape.routed[0], shape.routed[min(1, len(shape.routed) - 1)])
    first = shallow(config, small + 1)
    sites = [
        replace(site, layer=layer)
        for layer in shape.routed
        for site in first.sites()
        if site.layer == small
    ]
    arms = [CLEAN, *conditions_for(sites, study.conditions_of(spec))]
    _check(sites, study.conditions_of(spec))
    kinds = {_kind(arm): replace(arm, where=Where()) for arm in arms[1:]}
    batch, every = _probe(first, data.length, len(kinds))
    least = _seconds(first, batch, kinds if every else {})
    width = first.width
    del first
    most = _seconds(shallow(config, more + 1), batch, kinds if every else {})
    layers = max(1, more - small)
    a_layer = {kind: (most[kind] - least[kind]) / layers for kind in least}
    ends = max(0.0, least[None] - a_layer[None] * (small + 1))

    def of_arm(arm: Condition) -> float:
        """Seconds a sequence: layers in which it acts, and those behind the first of them."""
        acting = sum(map(arm.where, sites)) if arm != CLEAN else 0
        begins = next(s.layer for s in sites if arm.where(s)) if arm != CLEAN else 0
        own = a_layer.get(_kind(arm), a_layer[None])
        return ends + acting * own + (shape.depth - begins - acting) * a_layer[None]

    computing = sum(sizes) * sum(max(0.0, of_arm(arm)) for arm in arms)
    computing += study.measure.calibration * max(0.0, of_arm(CLEAN))
    streamed = is_streamed(spec)
    streams = max(sizes) * data.length * width * 2 * len(arms)
    on_disk = streamed and study.measure.streams == "disk"
    at_once = min(study.measure.batch_size, max(sizes)) / max(sizes) if on_disk else 1
    weights = shape.rest + LAYERS * shape.layer if streamed else shape.total
    read = shape.stored * (len(sizes) if streamed else 1)
    return Needs(
        shape,
        streamed,
        len(sizes),
        len(sizes) * len(arms),
        int(PROCESS + weights + streams * at_once),
        streams if on_disk else 0,
        read,
        read * _second_a_byte(Path(spec.hf)) if spec.hf else 0.0,
        computing,
    )


def _check(sites: Sequence[RouterSite], conditions: Sequence[Condition]) -> None:
    """Raise `ValueError` for conditions that the model cannot have."""
    layers = sorted({site.layer for site in sites})
    for condition in conditions:
        where = condition.where
        if where.layer is not None and where.layer not in layers:
            have = f"{layers[0]} to {layers[-1]}"
            raise ValueError(
                f"conditions: where is '{where}'; layers with a router are those of {have}"
            )
        condition.perturbation.check([site for site in sites if where(site)])


def _giga(size: float) -> str:
    return f"{size / 1e9:.2g} GB"


def _shards(study: Study) -> list[int]:
    """Sequences of each shard, of so many documents as were asked for."""
    data = study.data
    windows = -(-(data.max_tokens or data.length) // data.length)
    whole = (data.documents or data.shard) * windows
    return [min(data.shard, whole - at) for at in range(0, whole, data.shard)]


def _kind(arm: Condition) -> tuple | None:
    """What its time depends on, apart from where it acts."""
    return None if arm == CLEAN else (type(arm.perturbation), arm.effect, arm.downstream, arm.point)


def _probe(model: Adapter, length: int, kinds: int) -> tuple[Sequences, bool]:
    """Random tokens, as many as can be measured in `SHORT` seconds, and whether that is enough for
    conditions; else they are taken to be as long as the clean run."""
    measure(model, [], _random(model, 1, length))  # warms up
    start = time.perf_counter()
    measure(model, [], _random(model, 1, length))
    took = time.perf_counter() - start
    rows = PROBE if took * PROBE * 3 * (1 + kinds) < SHORT else 1
    return _random(model, rows, length), took * 3 * (1 + kinds) < 2 * SHORT


def _random(model: Adapter, rows: int, length: int) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (rows, length + 1), generator=generator)
    names, sizes = [str(row) for row in range(rows)], torch.full((rows,), length)
    ids = torch.arange(rows)
    return Sequences(tokens[:, :-1], tokens[:, 1:], ids, names, ["probe"] * rows, sizes)


def _seconds(model: Adapter, batch: Sequences, kinds: Mapping[Any, Condition]) -> dict[Any, float]:
    """Of a sequence, under each kind of condition; None: clean."""
    calibration = calibrate(model, batch, batch_size=len(batch))
    measure(model, [], batch, batch_size=len(batch))  # warms up
    how: dict[str, Any] = dict(batch_size=len(batch), calibration=calibration)
    cells = measure(model, [*kinds.values()], batch, reuse=frozenset(), **how)
    return {_kind(cell.condition): cell.seconds / len(batch) for cell in cells}


def _second_a_byte(folder: Path) -> float:
    """As the beginning of its files is read."""
    start = time.perf_counter()
    with weight_files(folder)[0].open("rb", buffering=0) as file:
        done = len(file.read(READ))
    return (time.perf_counter() - start) / max(1, done)
