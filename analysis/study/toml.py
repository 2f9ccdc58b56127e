"""A study's TOML read and checked: every mistake at once, with its key, value and the choices."""

from __future__ import annotations

import functools
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from analysis.perturb import (
    PERTURBATIONS,
    Condition,
    GateSwap,
    Perturbation,
    Replay,
    of_one_name,
    parts_of,
    perturbation_class,
    perturbation_from_dict,
)
from analysis.stats import ALL, CONDITION, label_of
from analysis.study.reading import TableReader
from analysis.study.specs import Contrasts, Data, Measure, ModelSpec, Only, check_text
from cartmoe.config import FAMILIES, PRESETS, ModelConfig, check_choice, check_whole
from cartmoe.train import TrainConfig

NAME = r"[\w+-]{1,100}"  # of a variant and its directory
SECTIONS = ("name", "data", "measure", "train", "models", "conditions", "contrasts")


def read_study(path: Path) -> dict[str, Any]:
    """The fields of `Study`; see `Study.read`."""
    if not path.is_file():
        raise FileNotFoundError(f"no study at {path}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    return study_fields(table, str(path), path.stem)


def study_fields(table: Mapping[str, Any], origin: str, default_name: str) -> dict[str, Any]:
    """The fields of `Study`; see `Study.from_dict`."""
    reader = _Reader()
    reader.known("", table, SECTIONS)
    name = table.get("name", default_name)
    reader.attempt("", check_text, "name", name)
    data = reader.build("data", Data, table) or Data()
    measure = reader.build("measure", Measure, table) or Measure()
    models = [*reader.trained(table, data), *reader.given(table)]
    names = [(m.name, m.train_seed) for m in models]
    for twice, seed in sorted({n for n in names if names.count(n) > 1}):
        reader.mistakes.append(f"models: {twice!r} with seed {seed} stands twice")
    restricted = list(reader.conditions(table, models))
    conditions = tuple(dict.fromkeys(condition for condition, _ in restricted))
    only = reader.only(restricted)
    reader.names(models, conditions, only)
    contrasts = reader.contrasts(table, models, conditions)
    if not models and not reader.mistakes:
        reader.mistakes.append("no models: give [train] with families, or [[models]] with path")
    if reader.mistakes:
        # A mistake may be met once for each member of a grid.
        raise ValueError("\n".join(f"{origin}: {m}" for m in dict.fromkeys(reader.mistakes)))
    return dict(
        name=name,
        data=data,
        measure=measure,
        models=tuple(models),
        conditions=conditions,
        contrasts=contrasts,
        only=only,
        origin=origin,
    )


class _Reader(TableReader):
    """What each section of a study means."""

    def trained(self, study: Mapping, data: Data) -> Iterable[ModelSpec]:
        """families and variants x seeds of [train]; corpus, tokenizer, length come from [data]."""
        if "train" not in study:
            return
        table = dict(self.table("train", study["train"]))
        presets = self.choices("train.preset", "preset", table.pop("preset", "nano"), PRESETS)
        options = self.table("train.model", table.pop("model", {}))
        variants = self.table("train.variants", table.pop("variants", {}))
        families = table.pop("families", list(FAMILIES))
        if families != [] or not variants:
            families = self.choices("train.families", "family", families, FAMILIES)
        seeds = self.items("train.seeds", table.pop("seeds", [0]))
        for seed in seeds:
            self.attempt("train.seeds", check_whole, "seed", seed, 0)
        allowed = {f.name for f in fields(TrainConfig)} - {"corpus", "tokenizer", "length", "seed"}
        taken = {"preset", "families", "seeds", "model", "variants"}
        self.known("train.", table, allowed | taken)
        chosen = {k: v for k, v in table.items() if k in allowed}
        chosen |= dict(corpus=data.corpus, tokenizer=data.tokenizer, length=data.length)
        train = self.attempt("train", TrainConfig, **chosen)
        asked = [("train.model", family, family, options) for family in families]
        asked += self.variants(variants, options)
        for preset, (where, name, family, model) in itertools.product(presets[:1], asked):
            build = functools.partial(ModelConfig.preset, preset, family)
            config = self.attempt(where, build, **model)
            if config and train:
                # Seeds that are none are mistakes already.
                for seed in (seed for seed in seeds if type(seed) is int and seed >= 0):
                    yield ModelSpec(name, seed, None, config, replace(train, seed=seed))

    def variants(self, tables: Mapping, options: Mapping) -> Iterator[tuple[str, str, Any, dict]]:
        """(where, name, family, fields of ModelConfig) for each table of [train.variants]."""
        for name, table in tables.items():
            where = f"train.variants.{name}"
            own = dict(self.table(where, table))
            known = {f.name for f in fields(ModelConfig)}
            self.known(f"{where}.", own, known)
            if not re.fullmatch(NAME, name) or name == ALL:
                self.mistakes.append(
                    f"{where}: {name!r} must be 1 to 100 letters, digits and _ - +, and not 'all'"
                )
            else:
                family = own.pop("family", "cartesian")
                model = {**options, **{k: v for k, v in own.items() if k in known}}
                yield where, name, family, model

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

    def conditions(
        self, study: Mapping, models: list[ModelSpec]
    ) -> Iterator[tuple[Condition, Only]]:
        """The product over all values that stand for several, and which models it is for."""
        shape = {f.name for f in fields(Condition)} - {"perturbation"}
        filters = {f.name for f in fields(Only)}
        for where, table in self.tables("conditions", study.get("conditions", [])):
            asked = self.items(f"{where}.perturbation", table.get("perturbation"))
            known = [(name, cls) for name in asked if (cls := self._class(where, name))]
            parameters = {f.name for _, cls in known for f in fields(cls)}
            if len(known) == len(asked):
                self.known(f"{where}.", table, shape | parameters | filters | {"perturbation"})
            only = self._only(where, table, models)
            for name, cls in known:
                values = {
                    k: self._values(f"{where}.{k}", v, k in cls.listed)
                    for k, v in table.items()
                    if k in shape | parameters
                }
                for combination in itertools.product(*values.values()):
                    one = dict(zip(values, combination, strict=True))
                    own = {k: v for k, v in one.items() if k in parameters}
                    rest = {k: v for k, v in one.items() if k in shape}
                    p = self.attempt(where, perturbation_from_dict, {"name": name} | own)
                    condition = p and self.attempt(where, Condition, p, **rest)
                    # Its id opens what it names, such as another checkpoint.
                    if condition and self._paths_exist(where, p):
                        self.attempt(where, lambda condition=condition: condition.id)
                        yield condition, only

    def _only(self, where: str, table: Mapping, models: list[ModelSpec]) -> Only:
        have = {
            "models": list(dict.fromkeys(m.name for m in models)),
            "train_seeds": list(dict.fromkeys(m.train_seed for m in models)),
        }
        return Only(
            **{
                key: tuple(self.choices(f"{where}.{key}", key, table[key], choices))
                for key, choices in have.items()
                if key in table
            }
        )

    def only(self, restricted: Iterable[tuple[Condition, Only]]) -> dict[Condition, Only]:
        """Those that are not for all models."""
        found: dict[Condition, Only] = {}
        for condition, only in restricted:
            if found.setdefault(condition, only) != only:
                self.mistakes.append(
                    f"conditions: {condition.perturbation.label} stands twice, for other models"
                )
        return {condition: only for condition, only in found.items() if only != Only()}

    def _class(self, where: str, name: Any) -> type[Perturbation] | None:
        where = f"{where}.perturbation"
        if not isinstance(name, str) or ":" not in name:
            self.attempt(where, check_choice, "perturbation", name, list(PERTURBATIONS))
            return PERTURBATIONS[name] if isinstance(name, str) and name in PERTURBATIONS else None
        try:
            return perturbation_class(name)
        except Exception as error:  # whatever a module of the user's does when it is imported
            self.mistakes.append(f"{where}: {name!r}: {error}")

    def _values(self, where: str, value: Any, listed: bool) -> list[Any]:
        """Those that a value stands for. One that is a list itself, as `listed` parameters are, is
        one; only a list of lists is several."""
        if listed and not (isinstance(value, list) and value and isinstance(value[0], list)):
            return [value]
        return self.items(where, value)

    def _paths_exist(self, where: str, perturbation: Perturbation) -> bool:
        good = True
        for p in parts_of(perturbation):
            name = {Replay: "trace", GateSwap: "checkpoint"}.get(type(p))
            if name and not Path(str(getattr(p, name))).is_dir():
                self.mistakes.append(f"{where}.{name}: {getattr(p, name)!r} is no directory")
                good = False
        return good

    def names(
        self,
        models: list[ModelSpec],
        conditions: tuple[Condition, ...],
        only: Mapping[Condition, Only],
    ) -> None:
        """Conditions on one model need different names in tables."""
        for model in models:
            mine = [c for c in conditions if only.get(c, Only())(model)]
            for name, same in of_one_name(mine).items():
                listed = ", ".join(str(c.perturbation.to_dict()) for c in same)
                self.mistakes.append(
                    f"conditions: {len(same)} have one name in tables, {name!r}: {listed}; measure "
                    "them in studies of their own"
                )

    def contrasts(
        self, study: Mapping, models: list[ModelSpec], conditions: tuple[Condition, ...]
    ) -> Contrasts | None:
        """[contrasts], of models and conditions that the study has."""
        if "contrasts" not in study:
            return None
        made = self.build("contrasts", Contrasts, study)
        if made and isinstance(study["contrasts"], Mapping):
            names = dict.fromkeys(m.name for m in models)
            self.attempt("contrasts.reference", check_choice, "reference", made.reference, names)
            columns = [c.columns() for c in conditions]
            labels = [label_of(**{k: row[k] for k in CONDITION}) for row in columns]
            for label in made.conditions:
                self.attempt("contrasts.conditions", check_choice, "condition", label, labels)
        return made
