"""A study: models x conditions x data, written as TOML (see `analysis.toml`).

    name = "quick"
    [data]                  # documents to measure on; the keys are the fields of `Data`
    corpus = "stdlib"
    [train]                 # models to train first: families x seeds, and fields of TrainConfig
    preset = "nano"
    families = ["dense", "cartesian"]
    [train.model]           # fields of ModelConfig, of all of them
    num_layers = 6
    # One more model, by its name; these fields beside those above. Without a family it is
    # Cartesian; with families = [] variants are all there is.
    [train.variants.parallel]
    family = "cartesian"
    composition = "parallel"
    [[models]]              # and, or instead, checkpoints there are
    path = "runs/mine"
    [measure]               # the fields of `Measure`
    tokens = true
    [contrasts]             # the fields of `Contrasts`
    reference = "cartesian"
    [[conditions]]          # a list as a value stands for one condition for each of its items
    perturbation = "DropTop"
    m = [1, 2]
    where = ["all", "stage 0"]
    models = ["cartesian"]  # only on models of these names; likewise train_seeds = [0]
    [[conditions]]          # of a parameter that is a list, only a list of lists stands for several
    perturbation = "KeepRanks"
    ranks = [1, 2]
    [[conditions]]          # a perturbation within another; one of your own, by where it is
    perturbation = "Compose"
    parts = [{name = "DropTop", m = 1}, {name = "package.module:Mine"}]

`Study.read` checks all of it before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.conditions import Condition
from cartmoe.config import ModelConfig, check_choice, check_least, check_whole
from cartmoe.corpora import check_options
from cartmoe.train import TrainConfig

PRECISIONS = ("fp32", "bf16")


def check_text(name: str, value: object) -> None:
    """Raise `ValueError` naming the parameter and the value unless it is a string with text."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}; it must be a text")


@dataclass(frozen=True)
class Data:
    """Documents to measure on.

    documents    how many at most; None: all of the split
    max_tokens   at most so many tokens of each document; None: all
    shard        sequences in a unit of work
    """

    corpus: str = "stdlib"
    tokenizer: str = "bytes"
    split: str = "validation"
    length: int = 256
    documents: int | None = 150
    max_tokens: int | None = None
    shard: int = 64

    def __post_init__(self) -> None:
        for name in ("corpus", "tokenizer"):
            check_text(name, getattr(self, name))
        check_options(self.corpus)
        check_choice("split", self.split, ("train", "validation"))
        check_whole("length", self.length, 2)
        check_whole("shard", self.shard, 1)
        for name, least in (("documents", 2), ("max_tokens", 1)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least)


@dataclass(frozen=True)
class Measure:
    """How to measure.

    calibration   documents of the training split that RandomRouting and others draw from
    tokens        keep every token's loss, for quantiles and groups of tokens
    threads       of each process on the CPU, which changes last bits; None: what the machine or
                  the executor has
    """

    batch_size: int = 16
    precision: str = "fp32"
    calibration: int = 16
    tokens: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("calibration", self.calibration, 1)
        check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.tokens, bool):
            raise ValueError(f"tokens is {self.tokens!r}; choose one of true, false")
        if self.threads is not None:
            check_whole("threads", self.threads, 1)


@dataclass(frozen=True)
class Contrasts:
    """What is compared, named before anything is measured: the reference against each other model.

    reference    the name of a model of the study
    conditions   labels, as tables show them: "DropTop(1)", "DropTop(1), stage 0, scores"
    margin       nats per token; differences that are surely smaller count as none
    """

    reference: str = "cartesian"
    conditions: tuple[str, ...] = ("DropTop(1)",)
    margin: float = 0.05

    def __post_init__(self) -> None:
        check_text("reference", self.reference)
        conditions = self.conditions
        conditions = (conditions,) if isinstance(conditions, str) else conditions
        if not isinstance(conditions, tuple | list) or not conditions:
            raise ValueError(f"conditions is {self.conditions!r}; it must be a list of labels")
        for label in conditions:
            check_text("conditions", label)
        object.__setattr__(self, "conditions", tuple(conditions))
        check_least("margin", self.margin, 0)


@dataclass(frozen=True)
class ModelSpec:
    """One model of a study: a checkpoint that is there, or a run that `config`, `train` make."""

    name: str
    train_seed: int = 0
    path: str | None = None
    config: ModelConfig | None = None
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        check_text("name", self.name)
        check_whole("train_seed", self.train_seed, 0)


@dataclass(frozen=True)
class Only:
    """Models that a condition is measured on: those of these names and train seeds (None: any).

    Gates and traces, for example, fit the models of one architecture alone.
    """

    models: tuple[str, ...] | None = None
    train_seeds: tuple[int, ...] | None = None

    def __call__(self, spec: ModelSpec) -> bool:
        """Whether the model is one of them."""
        by_name = self.models is None or spec.name in self.models
        return by_name and (self.train_seeds is None or spec.train_seed in self.train_seeds)


@dataclass(frozen=True)
class Study:
    """A grid. `read` makes one from TOML; `models` and `conditions` are its two sides.

    only     the models of those conditions that are not for all
    origin   what errors name: the file that it was read from
    """

    name: str
    data: Data = Data()
    measure: Measure = Measure()
    models: tuple[ModelSpec, ...] = ()
    conditions: tuple[Condition, ...] = ()
    contrasts: Contrasts | None = None
    only: Mapping[Condition, Only] = field(default_factory=dict, hash=False)
    origin: str = field(default="study", compare=False)

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """Raises `FileNotFoundError`, or `ValueError` listing every mistake: file, key, value."""
        from analysis.toml import read_study

        return read_study(Path(path))

    @classmethod
    def from_dict(
        cls, table: Mapping[str, Any], origin: str = "study", default_name: str = "study"
    ) -> Study:
        """The same from a parsed table."""
        from analysis.toml import study_from_table

        return study_from_table(table, origin, default_name)

    def conditions_of(self, spec: ModelSpec) -> list[Condition]:
        """Those that are for this model."""
        return [c for c in self.conditions if self.only.get(c, Only())(spec)]


def study_dict(study: Study) -> dict[str, Any]:
    """Plain JSON types, for the manifest."""
    return {
        "name": study.name,
        "data": asdict(study.data),
        "measure": asdict(study.measure),
        "models": [
            {
                "name": m.name,
                "train_seed": m.train_seed,
                "path": m.path,
                "config": m.config and m.config.to_dict(),
                "train": m.train and asdict(m.train),
            }
            for m in study.models
        ],
        "conditions": [
            c.to_dict() | (asdict(study.only[c]) if c in study.only else {})
            for c in study.conditions
        ],
    }
