"""What a study is made of: data, how to measure, models, and which conditions are for which."""

from __future__ import annotations

from dataclasses import dataclass

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
