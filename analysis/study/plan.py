"""Which cells a study has, each with its whole identity."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.adapters import Adapter, skeleton
from analysis.measure import Description, check_streamed, describe, worth_reusing
from analysis.perturb import CLEAN, Condition, Where
from analysis.study.machine import is_streamed, threads_for
from analysis.study.models import Checkpoint, find, place_of
from analysis.study.parse import note_sources
from analysis.study.provenance import default_device, platform_identity
from analysis.study.reading import Mistakes
from analysis.study.specs import ModelSpec
from analysis.study.store import cell_key
from analysis.study.study import Study
from analysis.study.texts import Texts, tokenizer_of
from analysis.study.worker import PlannedCell, Source, Task, opened
from cartmoe.checkpoint import read_config, read_meta
from cartmoe.hooks import RouterSite

TASKS_A_WORKER = 3  # at least so many, so that none waits long for the last one
MOST_CELLS = 32  # of a task: what is lost when it is stopped; its clean pass is then 3 % of it


@dataclass(frozen=True)
class Subject:
    """A model as far as a plan needs it, which is without its weights.

    described   what results say of it (see `analysis.measure.describe`)
    arms        what it is measured under: the clean run, and every condition that it has a router
                for -> whether experts' outputs come from a table
    """

    described: Description
    sites: list[RouterSite]
    arms: dict[Condition, bool]


@dataclass(frozen=True)
class Work:
    """The cells of one model, shard by shard."""

    checkpoint: Checkpoint
    described: Description
    cells: list[PlannedCell]


@dataclass(frozen=True)
class Plan:
    """What is measured, on what, and how.

    texts     what the study's models read; that of pretrained ones by their directory
    chosen    threads of whoever computes a cell; None: one, and of a streamed model all cores
    """

    study: Study
    texts: dict[str | None, Texts]
    chosen: int | None
    _subjects: dict[tuple, Subject] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, study: Study, threads: int | None) -> Plan:
        """Raises `ValueError` or `OSError` for documents that cannot be read."""
        noted = Mistakes()
        note_sources(noted, study.data)
        kinds = {spec.hf: noted.attempt(place_of(spec), tokenizer_of, study, spec)
                 for spec in study.models}  # fmt: skip
        noted.finish(study.origin)
        texts = {hf: Texts.of(study, kind) for hf, kind in kinds.items()}
        if study.contrasts and len({text.corpus.tokenizer.identity for text in texts.values()}) > 1:
            raise ValueError(
                f"{study.origin}: contrasts are of nats per token, and the study's models read "
                "other tokens; compare those that share them in a study of their own"
            )
        return cls(study, texts, threads)

    def text(self, spec: ModelSpec) -> Texts:
        """What this model reads."""
        return self.texts[spec.hf]

    def find(self, out: Path) -> list[Checkpoint | None]:
        """Every model's checkpoint that is there, given or trained in `out`.

        Raises `ValueError` as `models.find` does, and, a line a mistake, for conditions that do not
        fit a model, and for layers that none has. (Stages may be missing: most families have one.)
        """
        noted = Mistakes()
        found = [
            noted.attempt(place_of(spec), find, self.study, spec, self.text(spec).corpus, out)
            for spec in self.study.models
        ]
        noted.finish(self.study.origin)
        layers: set[int] = set()
        for spec, checkpoint in zip(self.study.models, found, strict=True):
            noted.attempt(f"model {spec.name!r}", self._check_vocabulary, spec)
            if is_streamed(spec):
                asked = self.study.conditions_of(spec)
                noted.attempt("conditions", check_streamed, spec.name, asked)
            subject = noted.attempt(f"model {spec.name!r}", self.subject, spec, checkpoint)
            if subject is None:
                continue
            for condition in subject.arms:
                p, sites = condition.perturbation, filter(condition.where, subject.sites)
                noted.attempt(f"conditions: {p.label}, model {spec.name!r}", p.check, list(sites))
            layers |= {site.layer for site in subject.sites}
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
        needed = self.text(spec).corpus.vocab_size
        if not spec.given and spec.config.vocab_size < needed:
            raise ValueError(
                f"vocab_size is {spec.config.vocab_size}; data.tokenizer "
                f"{self.study.data.tokenizer!r} needs {needed}"
            )

    @property
    def threads(self) -> int:
        """Of whoever computes a cell of a model in memory, or trains one."""
        return self.chosen or 1

    def platform(self, spec: ModelSpec) -> dict[str, Any]:
        """What of this machine changes bits of this model's cells."""
        return platform_identity(default_device(), threads_for(spec, self.chosen))

    def subject(self, spec: ModelSpec, checkpoint: Checkpoint | None) -> Subject:
        """The model of this specification.

        Which tables are made is decided here, by all conditions of the study, so that it does not
        depend on which of them are measured together. Raises as `analysis.load` does.
        """
        key = spec.name, spec.train_seed, checkpoint
        if key not in self._subjects:
            self._subjects[key] = self._subject(self._model(spec, checkpoint), spec)
        return self._subjects[key]

    def _model(self, spec: ModelSpec, checkpoint: Checkpoint | None) -> Adapter:
        """Without weights, where what is fixed by the architecture can be told without them."""
        if spec.hf and checkpoint:
            path, identity = checkpoint.path.resolve(), checkpoint.identity
            return opened(path, identity, spec.name, is_streamed(spec))
        config = read_config(checkpoint.path) if checkpoint else spec.config
        model = skeleton(config, name=spec.name, train_seed=spec.train_seed)
        model.trained_on = read_meta(checkpoint.path) if checkpoint else {}
        return model

    def _subject(self, model: Adapter, spec: ModelSpec) -> Subject:
        model.train_seed = spec.train_seed
        conditions = conditions_for(model.sites(), self.study.conditions_of(spec))
        tokens = self.study.measure.batch_size * self.study.data.length
        reuses = worth_reusing(model, conditions, tokens)
        arms = {c: c in reuses for c in (CLEAN, *conditions)}
        return Subject(describe(model), model.sites(), arms)

    def work(self, checkpoint: Checkpoint) -> Work:
        """The cells of one model."""
        subject, measure = self.subject(checkpoint.spec, checkpoint), self.study.measure
        text = self.text(checkpoint.spec)
        calibration = {"sequences": text.calibration.sha256, "batch_size": measure.batch_size}
        # The clean run has neither.
        own: dict[Condition, dict[str, Any]] = {
            c: {"condition": c.to_dict(), "calibration": calibration} for c in subject.arms
        }
        own[CLEAN] = {"condition": None, "calibration": None}
        common = self.platform(checkpoint.spec) | {
            "model": checkpoint.identity,
            "tokenizer": text.corpus.tokenizer.identity,
            "batch_size": measure.batch_size,
            "precision": measure.precision,
            "keep_tokens": measure.tokens,
        }
        cells = []
        for number, shard in enumerate(text.shards):
            for condition, reuses in subject.arms.items():
                identity = common | own[condition] | {"data": shard.sha256, "reuses": reuses}
                key = cell_key(identity)
                cells.append(PlannedCell(key, number, condition, reuses, identity))
        return Work(checkpoint, subject.described, cells)

    def tasks(
        self, work: Sequence[Work], keys: Collection[str], workers: int, streams: Path | None = None
    ) -> list[Task]:
        """These cells in tasks: those of one model and shard together, since they share a clean
        pass, but cut where they are many, or where workers would be left without any.

        streams   a folder for hidden states of streamed models, whose cells are not cut: each task
                  reads all layers
        """
        taken: set[str] = set()  # two names may stand for one model
        together: dict[tuple[Checkpoint, int], list[PlannedCell]] = {}
        for checkpoint, cell in ((w.checkpoint, cell) for w in work for cell in w.cells):
            if cell.key in keys and cell.key not in taken:
                taken.add(cell.key)
                together.setdefault((checkpoint, cell.shard), []).append(cell)
        busy = math.ceil(TASKS_A_WORKER * workers / max(1, len(together))) if workers > 1 else 1
        keep, tasks = self.study.measure.tokens, []
        for (checkpoint, shard), cells in together.items():
            source, docs = self._source(checkpoint), self.text(checkpoint.spec).shards[shard]
            pieces = 1 if source.stream else max(busy, math.ceil(len(cells) / MOST_CELLS))
            tasks += [Task(source, docs, part, keep, streams) for part in _cut(cells, pieces)]
        return tasks

    def _source(self, checkpoint: Checkpoint) -> Source:
        text, measure = self.text(checkpoint.spec), self.study.measure
        return Source(
            checkpoint=checkpoint.path.resolve(),
            identity=checkpoint.identity,
            name=checkpoint.spec.name,
            tokenizer=text.corpus.tokenizer,
            calibration=text.calibration,
            calibration_sha256=text.calibration.sha256,
            batch_size=measure.batch_size,
            precision=measure.precision,
            stream=is_streamed(checkpoint.spec),
            platform=tuple(self.platform(checkpoint.spec).items()),
        )


def _cut(cells: list[PlannedCell], pieces: int) -> Iterator[tuple[PlannedCell, ...]]:
    size = math.ceil(len(cells) / pieces)
    for first in range(0, len(cells), size):
        yield tuple(cells[first : first + size])


def conditions_for(sites: Sequence[RouterSite], conditions: Sequence[Condition]) -> list[Condition]:
    """Those that perturb one of a model's routers, leaving out a part that is the whole: in a model
    of one stage a layer, "stage 0" is "all"."""

    def fits(where: Where) -> bool:
        chosen = sum(map(where, sites))
        a_part = where.stage is None or where.layer is not None or chosen < len(sites)
        return chosen > 0 and a_part

    return [condition for condition in conditions if fits(condition.where)]
