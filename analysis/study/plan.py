"""Which cells a study has, each with its whole identity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.adapters import Adapter, skeleton
from analysis.measure import worth_reusing
from analysis.perturb import CLEAN, Condition, Where
from analysis.study.models import Checkpoint, find, last_checkpoint, place_of
from analysis.study.parse import note_sources
from analysis.study.provenance import default_device, platform_identity
from analysis.study.reading import Mistakes
from analysis.study.specs import ModelSpec
from analysis.study.store import cell_key
from analysis.study.study import Study
from analysis.study.worker import PlannedCell, Source, Task
from cartmoe.checkpoint import read_config, read_meta
from cartmoe.corpora import is_built_in
from cartmoe.data import Corpus, Sequences, prepare, sequences
from cartmoe.tokenized import SPLITS

TASKS_A_WORKER = 3  # at least so many, so that none waits long for the last one
MOST_CELLS = 32  # of a task: what is lost when it is stopped; its clean pass is then 3 % of it


@dataclass(frozen=True)
class Work:
    """The cells of one model, shard by shard.

    model   without weights
    """

    checkpoint: Checkpoint
    model: Adapter
    cells: list[PlannedCell]


@dataclass(frozen=True)
class Plan:
    """What is measured, on what, and how.

    threads   of whoever computes a cell
    """

    study: Study
    corpus: Corpus
    shards: list[Sequences]
    calibration: Sequences
    threads: int

    @classmethod
    def of(cls, study: Study, threads: int) -> Plan:
        """Raises `ValueError` or `OSError` for documents that cannot be read."""
        noted = Mistakes()
        note_sources(noted, study.data)
        noted.finish(study.origin)
        corpus, docs = documents_of(study)
        size = study.data.shard
        shards = [docs[i : i + size] for i in range(0, len(docs), size)]
        limit = study.measure.calibration
        calibration = sequences(corpus, split="train", limit=limit, **_limits(study))
        return cls(study, corpus, shards, calibration, threads)

    def find(self, out: Path) -> list[Checkpoint | None]:
        """Every model's checkpoint that is there, given or trained in `out`.

        Raises `ValueError` as `models.find` does, and, a line a mistake, for conditions that do not
        fit a model, and for layers that none has. (Stages may be missing: most families have one.)
        """
        noted = Mistakes()
        found = [
            noted.attempt(place_of(spec), find, self.study, spec, self.corpus, out)
            for spec in self.study.models
        ]
        noted.finish(self.study.origin)
        layers: set[int] = set()
        for spec, checkpoint in zip(self.study.models, found, strict=True):
            noted.attempt(f"model {spec.name!r}", self._check_vocabulary, spec)
            model, arms = self.arms(spec, checkpoint)
            for condition in arms:
                p, sites = condition.perturbation, filter(condition.where, model.sites())
                noted.attempt(f"conditions: {p.label}, model {model.name!r}", p.check, list(sites))
            layers |= {site.layer for site in model.sites()}
        have = ", ".join(map(str, sorted(layers))) or "none: all are dense"
        for where in (condition.where for condition in self.study.conditions):
            if where.layer is not None and where.layer not in layers:
                noted.mistakes.append(
                    f"conditions: where is '{where}'; layers with a router are {have}"
                )
        noted.finish(self.study.origin)
        return found

    def _check_vocabulary(self, spec: ModelSpec) -> None:
        """Of one that is to be trained."""
        needed = self.corpus.vocab_size
        if not spec.path and spec.config.vocab_size < needed:
            raise ValueError(
                f"vocab_size is {spec.config.vocab_size}; data.tokenizer "
                f"{self.study.data.tokenizer!r} needs {needed}"
            )

    @cached_property
    def platform(self) -> dict[str, Any]:
        """What of this machine changes bits."""
        return platform_identity(default_device(), self.threads)

    def arms(
        self, spec: ModelSpec, checkpoint: Checkpoint | None
    ) -> tuple[Adapter, dict[Condition, bool]]:
        """(the model without weights, what it is measured under: the clean run, and every
        condition that it has a router for -> whether experts' outputs come from a table).

        The latter is decided here, by all conditions of the study, so that it does not depend on
        which of them are measured together.
        """
        config = read_config(checkpoint.path) if checkpoint else spec.config
        model = skeleton(config, name=spec.name, train_seed=spec.train_seed)
        conditions = conditions_for(model, self.study.conditions_of(spec))
        tokens = self.study.measure.batch_size * self.study.data.length
        reuses = worth_reusing(model, conditions, tokens)
        return model, {c: c in reuses for c in (CLEAN, *conditions)}

    def work(self, checkpoint: Checkpoint) -> Work:
        """The cells of one model."""
        model, arms = self.arms(checkpoint.spec, checkpoint)
        measure = self.study.measure
        calibration = {"sequences": self.calibration.sha256, "batch_size": measure.batch_size}
        # The clean run has neither.
        own: dict[Condition, dict[str, Any]] = {
            c: {"condition": c.to_dict(), "calibration": calibration} for c in arms
        }
        own[CLEAN] = {"condition": None, "calibration": None}
        common = self.platform | {
            "model": checkpoint.identity,
            "tokenizer": self.corpus.tokenizer.identity,
            "batch_size": measure.batch_size,
            "precision": measure.precision,
            "keep_tokens": measure.tokens,
        }
        cells = []
        for number, shard in enumerate(self.shards):
            for condition, reuses in arms.items():
                identity = common | own[condition] | {"data": shard.sha256, "reuses": reuses}
                key = cell_key(identity)
                cells.append(PlannedCell(key, number, condition, reuses, identity))
        return Work(checkpoint, model, cells)

    def tasks(self, work: Sequence[Work], keys: Collection[str], workers: int) -> list[Task]:
        """These cells in tasks: those of one model and shard together, since they share a clean
        pass, but cut where they are many, or where workers would be left without any."""
        taken: set[str] = set()  # two names may stand for one model
        together: dict[tuple[Checkpoint, int], list[PlannedCell]] = {}
        for checkpoint, cell in ((w.checkpoint, cell) for w in work for cell in w.cells):
            if cell.key in keys and cell.key not in taken:
                taken.add(cell.key)
                together.setdefault((checkpoint, cell.shard), []).append(cell)
        pieces = math.ceil(TASKS_A_WORKER * workers / max(1, len(together))) if workers > 1 else 1
        keep = self.study.measure.tokens
        return [
            Task(self._source(checkpoint), self.shards[shard], part, keep)
            for (checkpoint, shard), cells in together.items()
            for part in _cut(cells, max(pieces, math.ceil(len(cells) / MOST_CELLS)))
        ]

    def _source(self, checkpoint: Checkpoint) -> Source:
        tokenizer, measure = self.corpus.tokenizer, self.study.measure
        return Source(
            checkpoint=checkpoint.path.resolve(),
            identity=checkpoint.identity,
            name=checkpoint.spec.name,
            tokenizer=(tokenizer.name, getattr(tokenizer, "json", None)),
            calibration=self.calibration,
            calibration_sha256=self.calibration.sha256,
            batch_size=measure.batch_size,
            precision=measure.precision,
            platform=tuple(self.platform.items()),
        )


def documents_of(study: Study) -> tuple[Corpus, Sequences]:
    """(the study's corpus, what of it is measured on). Warns if that is less than was asked for."""
    data = study.data
    corpus = _withholding(prepare(data.corpus, data.tokenizer), study.models)
    have = len(corpus.split(data.split))
    if data.documents is not None and data.documents > have:
        warnings.warn(
            f"corpus {corpus.name!r} has only {have} {data.split} documents (at most "
            f"{data.documents} were asked for), and all of them are taken",
            stacklevel=2,
        )
    docs = sequences(corpus, split=data.split, limit=data.documents, **_limits(study))
    return corpus, docs.by_group(corpus.group_of) if is_built_in(data.corpus) else docs


def _withholding(corpus: Corpus, models: Sequence[ModelSpec]) -> Corpus:
    """The corpus, what any given model was trained on being for training: under another Python
    the standard library splits at another place."""
    seen: set[str] = set()
    for spec in models:
        if spec.path:
            with suppress(OSError, ValueError):  # which `find` tells
                seen.update(read_meta(last_checkpoint(Path(spec.path))).get("groups", ()))
    table = corpus.documents
    held_in = table.group.isin(seen)
    return replace(corpus, documents=table.assign(split=table.split.mask(held_in, SPLITS[0])))


def _limits(study: Study) -> dict[str, Any]:
    data = study.data
    return dict(length=data.length, max_tokens_per_document=data.max_tokens, windows=data.windows)


def _cut(cells: list[PlannedCell], pieces: int) -> Iterator[tuple[PlannedCell, ...]]:
    size = math.ceil(len(cells) / pieces)
    for first in range(0, len(cells), size):
        yield tuple(cells[first : first + size])


def conditions_for(model: Adapter, conditions: Sequence[Condition]) -> list[Condition]:
    """Those that perturb a router of the model, leaving out a part that is the whole: in a model
    of one stage a layer, "stage 0" is "all"."""
    sites = model.sites()

    def fits(where: Where) -> bool:
        chosen = sum(map(where, sites))
        a_part = where.stage is None or where.layer is not None or chosen < len(sites)
        return chosen > 0 and a_part

    return [condition for condition in conditions if fits(condition.where)]
