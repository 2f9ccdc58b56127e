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

import functools
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from analysis.conditions import Condition
from analysis.perturb import PERTURBATIONS, perturbation_from_dict
from cartmoe.config import FAMILIES, PRESETS, ModelConfig, check_choice, check_whole
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
    """

    batch_size: int = 16
    precision: str = "fp32"
    calibration: int = 16

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("calibration", self.calibration, 1)
        check_choice("precision", self.precision, PRECISIONS)


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
        reader = _Reader()
        reader.known("", table, ("name", "data", "measure", "train", "models", "conditions"))
        name = table.get("name", default_name)
        reader.attempt("", check_text, "name", name)
        data = reader.build("data", Data, table) or Data()
        measure = reader.build("measure", Measure, table) or Measure()
        models = [*reader.trained(table, data), *reader.given(table)]
        conditions = list(reader.conditions(table))
        names = [(m.name, m.train_seed) for m in models]
        for twice, seed in sorted({n for n in names if names.count(n) > 1}):
            reader.mistakes.append(f"models: {twice!r} with seed {seed} stands twice")
        if not models and not reader.mistakes:
            reader.mistakes.append("no models: give [train] with families, or [[models]] with path")
        if reader.mistakes:
            # A mistake may be met once for each member of a grid.
            raise ValueError("\n".join(f"{source}: {m}" for m in dict.fromkeys(reader.mistakes)))
        unique = tuple(dict.fromkeys(conditions))
        return cls(name, data, measure, tuple(models), unique, dict(table))


class _Reader:
    """Reads the tables of a study, and goes on after a mistake so that all are reported at once."""

    def __init__(self):
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
            # What a TypeError says names no parameter.
            given = f" ({kwargs})" if isinstance(error, TypeError) else ""
            self.mistakes.append(f"{where}: {error}{given}".removeprefix(": "))

    def table(self, where: str, value: Any) -> Mapping:
        """The value if it is a table; else an empty one."""
        if isinstance(value, Mapping):
            return value
        self.mistakes.append(f"{where}: it is {value!r}; write a table, [{where}]")
        return {}

    def tables(self, name: str, value: Any) -> Iterable[tuple[str, Mapping]]:
        """(where, table) for each of an array of tables."""
        if isinstance(value, list) and all(isinstance(table, Mapping) for table in value):
            return [(f"{name}[{i}]", table) for i, table in enumerate(value)]
        self.mistakes.append(f"{name}: it is {value!r}; write tables, [[{name}]]")
        return []

    def items(self, where: str, value: Any) -> list[Any]:
        """The items of a list, or the value as the only one."""
        if value == []:
            self.mistakes.append(f"{where}: the list is empty")
        return value if isinstance(value, list) else [value]

    def choices(self, where: str, name: str, value: Any, choices: Iterable[str]) -> list[str]:
        """Those items that are choices."""
        items, choices = self.items(where, value), list(choices)
        for item in items:
            self.attempt(where, check_choice, name, item, choices)
        return [item for item in items if item in choices]

    def build(self, name: str, cls, study: Mapping):
        table = self.table(name, study.get(name, {}))
        names = [f.name for f in fields(cls)]
        self.known(f"{name}.", table, names)
        return self.attempt(name, cls, **{k: v for k, v in table.items() if k in names})

    def trained(self, study: Mapping, data: Data) -> Iterable[ModelSpec]:
        """families x seeds of [train]; corpus, tokenizer and length come from [data]."""
        if "train" not in study:
            return
        table = dict(self.table("train", study["train"]))
        presets = self.choices("train.preset", "preset", table.pop("preset", "nano"), PRESETS)
        families = table.pop("families", list(FAMILIES))
        families = self.choices("train.families", "family", families, FAMILIES)
        seeds = self.items("train.seeds", table.pop("seeds", [0]))
        for seed in seeds:
            self.attempt("train.seeds", check_whole, "seed", seed, 0)
        options = self.table("train.model", table.pop("model", {}))
        allowed = {f.name for f in fields(TrainConfig)} - {"corpus", "tokenizer", "length", "seed"}
        self.known("train.", table, allowed | {"preset", "families", "seeds", "model"})
        chosen = {k: v for k, v in table.items() if k in allowed}
        chosen |= dict(corpus=data.corpus, tokenizer=data.tokenizer, length=data.length)
        train = self.attempt("train", TrainConfig, **chosen)
        for preset, family in itertools.product(presets[:1], families):
            build = functools.partial(ModelConfig.preset, preset, family)
            config = self.attempt("train.model", build, **options)
            if config and train:
                # Seeds that are none are mistakes already.
                for seed in (seed for seed in seeds if type(seed) is int and seed >= 0):
                    yield ModelSpec(family, seed, None, config, replace(train, seed=seed))

    def given(self, study: Mapping) -> Iterable[ModelSpec]:
        """[[models]] with path and, to tell them apart, name and train_seed."""
        for where, table in self.tables("models", study.get("models", [])):
            self.known(f"{where}.", table, ("path", "name", "train_seed"))
            text = table.get("path", "")
            path = Path(str(text)).expanduser()
            if not text or not isinstance(text, str) or not path.is_dir():
                self.mistakes.append(f"{where}.path: {text!r} is no checkpoint or run directory")
                continue
            name, seed = table.get("name", path.resolve().name), table.get("train_seed", 0)
            spec = self.attempt(where, ModelSpec, name, seed, str(path))
            if spec:
                yield spec

    def conditions(self, study: Mapping) -> Iterable[Condition]:
        """The product over all values that are lists."""
        shape = {f.name for f in fields(Condition)} - {"perturbation"}
        for where, table in self.tables("conditions", study.get("conditions", [])):
            asked = table.get("perturbation")
            names = self.choices(f"{where}.perturbation", "perturbation", asked, PERTURBATIONS)
            known = [PERTURBATIONS[name] for name in names]
            parameters = {f.name for cls in known for f in fields(cls)}
            if len(known) == len(asked if isinstance(asked, list) else [asked]):
                self.known(f"{where}.", table, shape | parameters | {"perturbation"})
            values = {
                k: self.items(f"{where}.{k}", v)
                for k, v in table.items()
                if k in shape | parameters
            }
            for cls, combination in itertools.product(known, itertools.product(*values.values())):
                one = dict(zip(values, combination, strict=True))
                own = {k: v for k, v in one.items() if k in parameters}
                rest = {k: v for k, v in one.items() if k in shape}
                p = self.attempt(where, perturbation_from_dict, {"name": cls.__name__} | own)
                condition = p and self.attempt(where, Condition, p, **rest)
                if condition:
                    yield condition


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
