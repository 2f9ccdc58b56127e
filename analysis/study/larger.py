"""What it takes to measure a model that is larger than memory, told before anything is read of it.

Its configuration says how large it is. Times come from two shallow models of its shape with random
weights, one layer of experts and two: what the second adds is a layer's part, and there are so many
of them behind where a condition begins.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from analysis.adapters import Adapter, Shape, published_config, shallow, shape_of, weight_files
from analysis.measure import calibrate, check_streamed, measure
from analysis.perturb import CLEAN, Condition, Where
from analysis.study.machine import is_streamed
from analysis.study.plan import conditions_for
from analysis.study.specs import ModelSpec
from analysis.study.study import Study
from analysis.study.texts import Texts
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite

REPEATS = 3
OPENING = 3  # times that all is read before: for its identity, and when the model is tried
LONG = 90.0  # seconds of conditions that are not waited for: they are taken to be as the clean run
READ = 2**28  # bytes that tell how fast a disk is
BESIDE = 2**31  # bytes of libraries, and of what is computed of a batch
LAYERS = 4  # in memory at a time: the one that runs, the next one, its files, what is made of them


class Needs(NamedTuple):
    """streamed: whether a layer is in memory at a time; shards, cells: how many; bytes of memory,
    and of hidden states on the disk; seconds of reading all weights once, where they are there, and
    of computing."""

    shape: Shape
    streamed: bool
    shards: int
    cells: int
    memory: int
    disk: int
    reading: float
    computing: float

    @property
    def seconds(self) -> float:
        """Of the whole: of a shard, reading and computing go on at once."""
        shards = self.shards if self.streamed else 0
        return OPENING * self.reading + max(shards * self.reading, self.computing)

    def __str__(self) -> str:
        """What it needs, in two lines."""
        shape = self.shape
        number = OPENING + self.shards
        times = f", read {number} times, {OPENING} of them before the first shard"
        times = times if self.streamed else ""
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
    try:
        if is_streamed(spec):
            check_streamed(spec.name, study.conditions_of(spec))
        times = _Times.of(config, shape, data.length, study.conditions_of(spec))
    except ValueError as error:
        raise ValueError(f"{study.origin}: model {spec.name!r}: {error}") from error
    sizes = [len(shard) for shard in texts.shards] if texts else _shards(study)
    arms = [CLEAN, *conditions_for(times.sites, study.conditions_of(spec))]
    computing = sum(sizes) * sum(times.of_arm(arm, shape.depth) for arm in arms)
    computing += study.measure.calibration * times.of_arm(CLEAN, shape.depth)
    streamed = is_streamed(spec)
    streams = max(sizes) * data.length * times.token * len(arms)
    on_disk = streamed and study.measure.streams == "disk"
    at_once = min(study.measure.batch_size, max(sizes)) / max(sizes) if on_disk else 1
    weights = shape.rest + LAYERS * shape.layer if streamed else shape.total
    return Needs(
        shape,
        streamed,
        len(sizes),
        len(sizes) * len(arms),
        int(BESIDE + weights + streams * at_once),
        streams if on_disk else 0,
        shape.stored * _second_a_byte(Path(spec.hf)) if spec.hf else 0.0,
        computing,
    )


class _Times(NamedTuple):
    """Seconds of a sequence; token: bytes of one's hidden state.

    ends    in the clean run, before the first layer and behind the last;  layer: in a layer
    losses  what a condition takes more behind the last one
    acting  what a layer takes more in which it acts, by kind of condition
    """

    sites: list[RouterSite]
    token: int
    ends: float
    layer: float
    losses: float
    acting: dict[tuple, float]

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        shape: Shape,
        length: int,
        conditions: Sequence[Condition],
    ) -> _Times:
        """From two shallow models. Raises `ValueError` for conditions that cannot be."""
        number, next_number = (*shape.routed, shape.routed[0])[:2]
        model = shallow(config, number + 1)
        sites = [
            replace(site, layer=layer)
            for layer in shape.routed
            for site in model.sites()
            if site.layer == number
        ]
        _check(sites, conditions)
        kinds = {_kind(arm): replace(arm, where=Where()) for arm in conditions}
        least = _clean(model, _random(model, length))
        del model
        model = shallow(config, max(next_number, number) + 1)
        batch = _random(model, length)
        most, more = _clean(model, batch), {}
        if most * (1 + len(kinds)) < LONG:
            with suppress(ValueError):  # a trace, say, has no decisions on random tokens
                stats = calibrate(model, batch)
                cells = measure(model, [*kinds.values()], batch, calibration=stats, reuse=())
                more = {_kind(cell.condition): cell.seconds - most for cell in cells[1:]}
        losses = max(0.0, min(more.values(), default=0.0))
        acting = {kind: (each - losses) / len(model.sites()) for kind, each in more.items()}
        layer = max(0.0, most - least) / max(1, next_number - number)
        ends = max(0.0, least - layer * (number + 1))
        token = model.width * model.model.dtype.itemsize
        return cls(sites, token, ends, layer, losses, acting)

    def of_arm(self, arm: Condition, depth: int) -> float:
        """All layers from the first in which it acts."""
        if arm == CLEAN:
            return self.ends + depth * self.layer
        places = [site.layer for site in self.sites if arm.where(site)]
        acting = len(places) * self.acting.get(_kind(arm), 0.0)
        return self.ends + self.losses + (depth - places[0]) * self.layer + acting


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
    return f"{size / 1e9:.2g} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _shards(study: Study) -> list[int]:
    """Sequences of each shard, of so many documents as were asked for."""
    data = study.data
    windows = -(-(data.max_tokens or data.length) // data.length)
    whole = (data.documents or data.shard) * windows
    return [min(data.shard, whole - at) for at in range(0, whole, data.shard)]


def _kind(arm: Condition) -> tuple:
    """What its time depends on, apart from where it acts."""
    return type(arm.perturbation), arm.effect, arm.downstream, arm.point


def _random(model: Adapter, length: int) -> Sequences:
    """One sequence of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (1, length + 1), generator=generator)
    size = torch.tensor([length])
    return Sequences(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(size), ["probe"], [""], size)


def _clean(model: Adapter, batch: Sequences) -> float:
    """Seconds of the clean run, the fastest of some."""
    return min(measure(model, [], batch)[0].seconds for _ in range(REPEATS))


def _second_a_byte(folder: Path) -> float:
    """As the beginning of its files is read; 0 where there are none."""
    files = weight_files(folder)
    if not files:
        return 0.0
    start = time.perf_counter()
    with files[0].open("rb", buffering=0) as file:
        done = len(file.read(READ))
    return (time.perf_counter() - start) / max(1, done)
