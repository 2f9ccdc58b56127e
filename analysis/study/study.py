"""A study: models x conditions x data, written as TOML (see `analysis.study.parse`).

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
    [[models]]              # and, or instead, checkpoints there are, or a list of them
    path = "runs/mine"
    [[models]]              # or directories with models of the transformers library
    hf = "downloads/OLMoE-1B-7B-0924"
    stream = true           # a layer at a time; by default if more than half of the memory
    [[models]]              # or a place for one whose directory is given when the study is read
    name = "OLMoE-1B-7B"
    published = {model_type = "olmoe"}  # what its config.json says, for estimates
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

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.perturb import Condition
from analysis.study.parse import read_study, study_fields
from analysis.study.specs import Contrasts, Data, Measure, ModelSpec, Only
from cartmoe.files import path_of


@dataclass(frozen=True)
class Study:
    """A grid. `read` makes one from TOML; `models` and `conditions` are its two sides.

    only     the models of those conditions that are not for all
    origin   what errors name: the file that it was read from
    toml     the text of that file
    """

    name: str
    data: Data = Data()
    measure: Measure = Measure()
    models: tuple[ModelSpec, ...] = ()
    conditions: tuple[Condition, ...] = ()
    contrasts: Contrasts | None = None
    only: Mapping[Condition, Only] = field(default_factory=dict, hash=False)
    origin: str = field(default="study", compare=False)
    toml: str = field(default="", compare=False, repr=False)

    @classmethod
    def read(cls, path: str | Path, model: str | Path | None = None) -> Study:
        """model: the directory that a study with a `published` model leaves to its user.

        Raises `FileNotFoundError`, or `ValueError` listing every mistake: file, key, value."""
        return cls(**read_study(path_of("path", path), model))

    @classmethod
    def from_dict(
        cls,
        table: Mapping[str, Any],
        origin: str = "study",
        default_name: str = "study",
        model: str | Path | None = None,
    ) -> Study:
        """The same from a parsed table."""
        return cls(**study_fields(table, origin, default_name, model))

    @property
    def definition(self) -> str:
        """The text of the file that it was read from, "" if it says something else by now."""
        if not self.toml:
            return ""
        brought = next((spec.hf for spec in self.models if spec.published), None)
        table = tomllib.loads(self.toml)
        read = Study.from_dict(table, default_name=self.name, model=brought)
        return self.toml if read == self else ""

    def conditions_of(self, spec: ModelSpec) -> list[Condition]:
        """Those that are for this model."""
        return [c for c in self.conditions if self.only.get(c, Only())(spec)]


def study_dict(study: Study) -> dict[str, Any]:
    """Plain JSON types, for the manifest."""
    return {
        "name": study.name,
        "data": asdict(study.data),
        "measure": asdict(study.measure),
        "models": [asdict(model) for model in study.models],
        "conditions": [
            c.to_dict() | (asdict(study.only[c]) if c in study.only else {})
            for c in study.conditions
        ],
    }
