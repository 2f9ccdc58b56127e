"""A study: models x conditions x data, written as TOML.

    name = "quick"
    [data]                  # documents to measure on; the keys are the fields of `Data`
    corpus = "stdlib"
    [train]                 # models to train first: families x seeds, and fields of TrainConfig
    preset = "nano"
    families = ["dense", "cartesian"]
    [[models]]              # and, or instead, checkpoints there are
    path = "runs/mine"
    [[conditions]]          # a list as a value stands for one condition for each of its items
    perturbation = "DropTop"
    m = [1, 2]
    where = ["all", "stage 0"]

`Study.read` checks all of it before anything is computed.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from analysis.conditions import Condition
from analysis.perturb import PERTURBATIONS, perturbation_from_dict
from cartmoe.config import FAMILIES, ModelConfig, check_choice, check_least
from cartmoe.train import TrainConfig

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Data:
    """Documents to measure on.

    documents    how many; None: all of the split
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
        check_choice("split", self.split, ("train", "validation"))
        check_least("length", self.length, 2)
        check_least("shard", self.shard, 1)
        if self.documents is not None:
            check_least("documents", self.documents, 2)


@dataclass(frozen=True)
class Measure:
    """How to measure.

    calibration   documents of the training split that RandomRouting and others draw from
    """

    batch_size: int = 16
    precision: str = "fp32"
    calibration: int = 16

    def __post_init__(self) -> None:
        check_least("batch_size", self.batch_size, 1)
        check_least("calibration", self.calibration, 1)
        check_choice("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class ModelSpec:
    """One model of a study: a checkpoint that is there, or a run that `config`, `train` make."""

    name: str
    train_seed: int = 0
    path: str | None = None
    config: ModelConfig | None = None
    train: TrainConfig | None = None


@dataclass(frozen=True)
class Study:
    """A grid. `read` makes one from TOML; `specs` and `conditions` are its two sides."""

    name: str
    data: Data = Data()
    measure: Measure = Measure()
    models: tuple[ModelSpec, ...] = ()
    conditions: tuple[Condition, ...] = ()
    source: dict[str, Any] = field(default_factory=dict, compare=False)  # the TOML as it was

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """Raises `FileNotFoundError`, or `ValueError` listing every mistake: file, key, value."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no study at {path}")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not TOML: {error}") from error
        return cls.from_dict(table, str(path), default_name=path.stem)

    @classmethod
    def from_dict(
        cls, table: Mapping[str, Any], source: str = "study", default_name="study"
    ) -> Study:
        """The same from a parsed table; `source` is what errors name."""
        reader = _Reader(source)
        reader.known("", table, ("name", "data", "measure", "train", "models", "conditions"))
        data = reader.build("data", Data, table.get("data", {}))
        measure = reader.build("measure", Measure, table.get("measure", {}))
        models = [*reader.trained(table.get("train"), data), *reader.given(table.get("models", []))]
        conditions = list(reader.conditions(table.get("conditions", [])))
        names = [(m.name, m.train_seed) for m in models]
        for name in sorted({n for n in names if names.count(n) > 1}):
            reader.mistakes.append(f"models: {name[0]!r} with seed {name[1]} stands twice")
        if not models and not reader.mistakes:
            reader.mistakes.append("no models: give [train] with families, or [[models]] with path")
        if reader.mistakes:
            raise ValueError("\n".join(f"{source}: {m}" for m in reader.mistakes))
        name = str(table.get("name", default_name))
        unique = tuple(dict.fromkeys(conditions))
        return cls(name, data, measure, tuple(models), unique, dict(table))


class _Reader:
    """Reads the tables of a study, and goes on after a mistake so that all are reported at once."""

    def __init__(self, source: str):
        self.source = source
        self.mistakes: list[str] = []

    def known(self, where: str, table: Mapping, keys: Iterable[str]) -> None:
        keys = sorted(keys)
        for key in table:
            if key not in keys:
                self.mistakes.append(f"{where}{key}: no such key; choose one of {', '.join(keys)}")

    def attempt(self, where: str, make, /, *args, **kwargs):
        """make(...), or None with its mistake noted."""
        try:
            return make(*args, **kwargs)
        except (ValueError, TypeError) as error:
            self.mistakes.append(f"{where}: {error}")

    def build(self, where: str, cls, table: Mapping):
        names = [f.name for f in fields(cls)]
        self.known(f"{where}.", table, names)
        return self.attempt(where, cls, **{k: v for k, v in table.items() if k in names})

    def trained(self, table: Mapping | None, data: Data | None) -> Iterable[ModelSpec]:
        """families x seeds of [train]; corpus, tokenizer and length come from [data]."""
        if table is None or data is None:
            return
        table = dict(table)
        preset = table.pop("preset", "nano")
        families = table.pop("families", list(FAMILIES))
        seeds = table.pop("seeds", [0])
        options = table.pop("model", {})
        allowed = {f.name for f in fields(TrainConfig)} - {"corpus", "tokenizer", "length", "seed"}
        self.known("train.", table, allowed | {"preset", "families", "seeds", "model"})
        for family, seed in itertools.product(families, seeds):
            where = f"train.families={family}"
            config = self.attempt(where, ModelConfig.preset, preset, family, **options)
            chosen = {k: v for k, v in table.items() if k in allowed}
            shared = dict(corpus=data.corpus, tokenizer=data.tokenizer, length=data.length)
            train = self.attempt("train", TrainConfig, seed=seed, **chosen, **shared)
            if config and train:
                yield ModelSpec(family, seed, config=config, train=train)

    def given(self, tables: list[Mapping]) -> Iterable[ModelSpec]:
        """[[models]] with path and, to tell them apart, name and train_seed."""
        for i, table in enumerate(tables):
            where = f"models[{i}]."
            self.known(where, table, ("path", "name", "train_seed"))
            path = Path(str(table.get("path", "")))
            if not table.get("path") or not path.is_dir():
                self.mistakes.append(
                    f"{where}path: {str(path)!r} is no checkpoint or run directory"
                )
                continue
            yield ModelSpec(table.get("name", path.name), table.get("train_seed", 0), str(path))

    def conditions(self, tables: list[Mapping]) -> Iterable[Condition]:
        """The product over all values that are lists."""
        shape = {f.name for f in fields(Condition)} - {"perturbation"}
        for i, table in enumerate(tables):
            where = f"conditions[{i}]"
            names = _as_list(table.get("perturbation"))
            for name in names:
                self.attempt(f"{where}.perturbation", check_choice, "it", name, PERTURBATIONS)
            known = [PERTURBATIONS[name] for name in names if name in PERTURBATIONS]
            parameters = {f.name for cls in known for f in fields(cls)}
            if len(known) == len(names):
                self.known(f"{where}.", table, shape | parameters | {"perturbation"})
            values = {k: _as_list(v) for k, v in table.items() if k in shape | parameters}
            for cls, combination in itertools.product(known, itertools.product(*values.values())):
                one = dict(zip(values, combination, strict=True))
                own = {k: v for k, v in one.items() if k in parameters}
                rest = {k: v for k, v in one.items() if k in shape}
                p = self.attempt(where, perturbation_from_dict, {"name": cls.__name__} | own)
                condition = p and self.attempt(where, Condition, p, **rest)
                if condition:
                    yield condition


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
        "conditions": [c.to_dict() for c in study.conditions],
    }
