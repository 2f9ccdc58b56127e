"""A study's TOML read and checked: every mistake at once, with its key, value and the choices."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from analysis.perturb import Condition, of_one_name, perturbation_class
from analysis.stats import ALL, CONDITION, label_of
from analysis.study.given import given_models
from analysis.study.reading import Mistakes, TableReader
from analysis.study.specs import Contrasts, Data, Measure, ModelSpec, Only
from cartmoe.config import FAMILIES, PRESETS, ModelConfig
from cartmoe.corpora import check_source
from cartmoe.foreign import named
from cartmoe.tokenizers import tokenizer_key
from cartmoe.train import TrainConfig

NAME = r"[\w+-]{1,100}"  # of a variant and its directory
SECTIONS = ("name", "data", "measure", "train", "models", "conditions", "contrasts")
RUNS = ("preset", "families", "seeds", "model", "variants")  # of [train], beside its settings
OF_DATA = {"corpus", "tokenizer", "length"}  # settings of a run that [data] says
SETTINGS = {f.name for f in fields(TrainConfig)} - OF_DATA - {"seed"}
MODEL = {f.name for f in fields(ModelConfig)}
OPTIONS = {f.name for f in fields(Condition)} - {"perturbation"}
FILTERS = {f.name for f in fields(Only)}


def read_study(path: Path, brought: str | Path | None) -> dict[str, Any]:
    """The fields of `Study`; see `Study.read`."""
    if not path.is_file():
        raise FileNotFoundError(f"no study at {path}")
    with named(f"{path}: not TOML"):
        text = path.read_text(encoding="utf-8-sig")
        table = tomllib.loads(text)
    return study_fields(table, str(path), path.stem, brought) | {"toml": text}


def study_fields(
    table: Mapping[str, Any], origin: str, default_name: str, brought: str | Path | None
) -> dict[str, Any]:
    """The fields of `Study`; see `Study.from_dict`."""
    reader = _Reader()
    reader.known("", table, SECTIONS)
    name = table.get("name", default_name)
    if not isinstance(name, str) or not name:
        reader.mistakes.append(f"name is {name!r}; it must be a text")
    data = reader.build("data", Data, table)
    if data is None:  # the files that it names are looked for all the same
        given = reader.table("data", table.get("data", {}))
        files = {key: given[key] for key in ("corpus", "tokenizer") if key in given}
        data = reader.build("data", Data, {"data": files}) or Data()
    measure = reader.build("measure", Measure, table) or Measure()
    models = [*reader.trained(table, data), *given_models(reader, table, brought)]
    names = [(m.name, m.train_seed) for m in models]
    for twice, seed in sorted({n for n in names if names.count(n) > 1}):
        reader.mistakes.append(f"models: {twice!r} with seed {seed} stands twice")
    only = reader.conditions(table, models)
    reader.names(models, only)
    contrasts = reader.contrasts(table, models, only)
    if not models and not reader.mistakes:
        reader.mistakes.append("no models: give [train] with families, or [[models]] with path, hf")
    if reader.mistakes:  # then these too; else who measures needs them, not who reads
        note_sources(reader, data)
    reader.finish(origin)
    return dict(
        name=name,
        data=data,
        measure=measure,
        models=tuple(models),
        conditions=tuple(only),
        contrasts=contrasts,
        only={condition: for_whom for condition, for_whom in only.items() if for_whom != Only()},
        origin=origin,
    )


def note_sources(noted: Mistakes, data: Data) -> None:
    """Note a corpus or a tokenizer that is not there."""
    noted.attempt("data.corpus", check_source, data.corpus)
    noted.attempt("data.tokenizer", tokenizer_key, data.tokenizer)


class _Reader(TableReader):
    """What each section of a study means."""

    def trained(self, study: Mapping, data: Data) -> Iterable[ModelSpec]:
        """families and variants x seeds of [train]; corpus, tokenizer, length come from [data]."""
        if "train" not in study:
            return
        table = self.table("train", study["train"])
        settings = self.known("train.", table, {*SETTINGS, *RUNS})
        given = {key: settings.pop(key) for key in RUNS if key in settings}
        presets = self.choices("train.preset", "preset", given.get("preset", "nano"), PRESETS)
        options = self.table("train.model", given.get("model", {}))
        variants = self.table("train.variants", given.get("variants", {}))
        families = given.get("families", list(FAMILIES))
        if families != [] or not variants:
            families = self.choices("train.families", "family", families, FAMILIES)
        settings |= {name: getattr(data, name) for name in OF_DATA}
        recipe = partial(TrainConfig.preset, *presets[:1] or ["nano"])
        train = self.attempt("train", recipe, **settings) or TrainConfig()
        seeds = self.items("train.seeds", given.get("seeds", [0]))
        runs = [self.attempt("train.seeds", replace, train, seed=seed) for seed in seeds]
        asked = [("train.model", family, family, options) for family in families]
        asked += self.variants(variants, options)
        for preset, (where, name, family, model) in itertools.product(presets[:1], asked):
            config = self.attempt(where, ModelConfig.preset, preset, family, **model)
            for run in filter(None, runs if config else ()):
                yield ModelSpec(name, run.seed, config=config, train=run)

    def variants(self, tables: Mapping, options: Mapping) -> Iterator[tuple[str, str, Any, dict]]:
        """(where, name, family, fields of ModelConfig) for each table of [train.variants]."""
        for name, table in tables.items():
            where = f"train.variants.{name}"
            own = self.known(f"{where}.", self.table(where, table), MODEL)
            model = {**options, **own}
            if re.fullmatch(NAME, name) and name != ALL:
                yield where, name, model.pop("family", "cartesian"), model
            else:
                self.mistakes.append(
                    f"{where}: {name!r} must be 1 to 100 letters, digits and _ - +, and not 'all'"
                )

    def conditions(self, study: Mapping, models: list[ModelSpec]) -> dict[Condition, Only]:
        """The product over all values that stand for several, and which models it is for."""
        found: dict[Condition, Only] = {}
        for where, table in self.tables("conditions", study):
            only = self._only(where, table, models)
            for condition in self._grid(where, table):
                if (before := found.setdefault(condition, only)) != only:
                    self.mistakes.append(
                        f"{where}: {condition.perturbation.label} stands twice, {before} and here "
                        f"{only}; write it once, with the models of both"
                    )
        return found

    def _grid(self, where: str, table: Mapping) -> Iterator[Condition]:
        asked = self.items(f"{where}.perturbation", table.get("perturbation"))
        classes = [self.attempt(f"{where}.perturbation", perturbation_class, p) for p in asked]
        parameters = {f.name for cls in classes if cls for f in fields(cls)}
        if all(classes):
            self.known(f"{where}.", table, {"perturbation", *OPTIONS, *FILTERS, *parameters})
        for name, cls in zip(asked, classes, strict=True):
            values = {
                key: self._values(f"{where}.{key}", value, cls is not None and key in cls.listed)
                for key, value in table.items()
                if key in OPTIONS | parameters
            }
            for combination in itertools.product(*values.values()) if cls else ():
                one = dict(zip(values, combination, strict=True))
                own = {key: one.pop(key) for key in list(one) if key not in OPTIONS}
                asked_for = one | {"perturbation": own | {"name": name}}
                condition = self.attempt(where, Condition.from_dict, asked_for)
                # Its id opens what it names, such as another checkpoint.
                if condition and self.attempt(where, lambda made=condition: made.id):
                    yield condition

    def _values(self, where: str, value: Any, listed: bool) -> list[Any]:
        """Those that a value stands for. One that is a list itself, as `listed` parameters are, is
        one; only a list of lists is several."""
        if listed and not (isinstance(value, list) and value and isinstance(value[0], list)):
            return [value]
        return self.items(where, value)

    def _only(self, where: str, table: Mapping, models: list[ModelSpec]) -> Only:
        have: dict[str, Any] = {
            "models": dict.fromkeys(m.name for m in models),
            "train_seeds": dict.fromkeys(m.train_seed for m in models),
        }
        asked = {
            key: tuple(self.choices(f"{where}.{key}", key, table[key], choices))
            for key, choices in have.items()
            if key in table
        }
        return Only(**asked)

    def names(self, models: list[ModelSpec], only: Mapping[Condition, Only]) -> None:
        """Conditions on one model need different names in tables."""
        for model in models:
            for name, same in of_one_name(c for c, mine in only.items() if mine(model)).items():
                listed = ", ".join(str(c.perturbation.to_dict()) for c in same)
                self.mistakes.append(
                    f"conditions: {len(same)} have one name in tables, {name!r}: {listed}; measure "
                    "them in studies of their own"
                )

    def contrasts(
        self, study: Mapping, models: list[ModelSpec], conditions: Iterable[Condition]
    ) -> Contrasts | None:
        """[contrasts], of models and conditions that the study has."""
        made = self.build("contrasts", Contrasts, study) if "contrasts" in study else None
        if made and isinstance(study["contrasts"], Mapping):
            names = dict.fromkeys(m.name for m in models)
            self.choices("contrasts.reference", "reference", made.reference, names)
            columns = [c.columns() for c in conditions]
            labels = [label_of(**{k: row[k] for k in CONDITION}) for row in columns]
            self.choices("contrasts.conditions", "condition", [*made.conditions], labels)
        return made
