"""What a study is made of: data, how to measure, models, and which conditions are for which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from cartmoe.config import ModelConfig
from cartmoe.corpora import check_options
from cartmoe.data import Windows
from cartmoe.fields import Count, Flag, NonNegative, Positive, Several, Text, declared, listed
from cartmoe.train import TrainConfig


@declared
class Data:
    """Documents to measure on.

    documents    how many at most; None: all of the split
    max_tokens   at most so many tokens of each document; None: all
    windows      of a longer one, windows "spread" over it, or its "first" tokens
    shard        sequences in a unit of work
    """

    corpus: Text = "stdlib"
    tokenizer: Text = "bytes"
    split: Literal["train", "validation"] = "validation"
    length: Several = 256
    documents: Several | None = 150
    max_tokens: Positive | None = None
    windows: Windows = "spread"
    shard: Positive = 64

    def __post_init__(self) -> None:
        check_options(self.corpus)


@declared
class Measure:
    """How to measure.

    calibration   documents of the training split that RandomRouting and others draw from
    tokens        keep every token's loss, for quantiles and groups of tokens
    streams       where a model that is larger than memory keeps hidden states between its layers:
                  on the "disk", from where it goes on when it was stopped, or in "memory"
    threads       of each process on the CPU, which changes last bits; None: what the executor
                  has, or 1
    """

    batch_size: Positive = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    calibration: Positive = 16
    tokens: Flag = False
    streams: Literal["disk", "memory"] = "disk"
    threads: Positive | None = None


@declared
class Contrasts:
    """What is compared, named before anything is measured: the reference against each other model.

    reference    the name of a model of the study
    conditions   labels, as tables show them: "DropTop(1)", "DropTop(1), stage 0, scores"
    margin       nats per token; differences that are surely smaller count as none
    """

    reference: Text = "cartesian"
    conditions: Annotated[tuple[Text, ...], Field(min_length=1), listed(Text)] = ("DropTop(1)",)
    margin: NonNegative = 0.05


@declared
class ModelSpec:
    """One model of a study.

    path   of a checkpoint or a run;  hf   of a directory with a model of the transformers library
    published   of one whose directory its user brings: what its config.json says
    stream      whether weights stay on the disk, a layer in memory; None: if they would
                take more than half of it
    config, train   where none of these is given: how it is trained
    """

    name: Text
    train_seed: Count = 0
    path: str | None = None
    hf: str | None = None
    published: dict[str, Any] | None = field(default=None, hash=False)
    stream: Flag | None = None
    config: ModelConfig = None  # type: ignore[assignment]
    train: TrainConfig = None  # type: ignore[assignment]

    @property
    def given(self) -> str | None:
        """Where it is, of one that is not to be trained."""
        return self.path or self.hf

    @property
    def absent(self) -> bool:
        """Whether its user has not brought it yet."""
        return self.published is not None and self.hf is None


@dataclass(frozen=True)
class Only:
    """Models that a condition is measured on: those of these names and train seeds (None: any).

    Gates and traces, for example, fit the models of one architecture alone.
    """

    models: Annotated[tuple[str, ...] | None, listed(str)] = None
    train_seeds: Annotated[tuple[int, ...] | None, listed(int)] = None

    def __str__(self) -> str:
        """ "for cartesian, smoe, train_seeds 0, 1"."""
        names = ", ".join(self.models) if self.models is not None else "all models"
        seeds = "" if self.train_seeds is None else f", train_seeds {self.train_seeds}"
        return f"for {names}{seeds}"

    def __call__(self, spec: ModelSpec) -> bool:
        """Whether the model is one of them."""
        by_name = self.models is None or spec.name in self.models
        return by_name and (self.train_seeds is None or spec.train_seed in self.train_seeds)
