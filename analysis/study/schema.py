"""The JSON schema of a study's TOML, made of the fields: an editor completes keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from analysis.perturb import PERTURBATIONS, Condition, Where
from analysis.study.given import GIVEN, PUBLISHED
from analysis.study.parse import OPTIONS, SETTINGS
from analysis.study.specs import Contrasts, Data, Measure, ModelSpec, Only
from cartmoe.config import FAMILIES, PRESETS, ModelConfig
from cartmoe.train import TrainConfig

Schema = dict[str, Any]


def study_schema() -> Schema:
    """Of the whole file (JSON Schema 2020-12)."""
    model = _table(_fields(ModelConfig))
    runs = {
        "preset": {"enum": list(PRESETS)},
        "families": _one_or_several({"enum": list(FAMILIES)}),
        "seeds": _one_or_several({"type": "integer", "minimum": 0}),
        "model": model,
        "variants": {"type": "object", "additionalProperties": model},
    }
    settings = {key: of for key, of in _fields(TrainConfig).items() if key in SETTINGS}
    given = {key: of for key, of in _fields(ModelSpec).items() if key not in ("config", "train")}
    given |= {kind: _one_or_several({"type": "string"}) for kind in GIVEN}
    kinds = {"oneOf": _each_required([*GIVEN, PUBLISHED])}
    sections = {
        "name": {"type": "string", "minLength": 1},
        "data": _table(_fields(Data)),
        "measure": _table(_fields(Measure)),
        "train": _table(settings | runs),
        "models": {
            "type": "array",
            "items": _table(given) | kinds,
        },
        "conditions": {"type": "array", "items": {"anyOf": list(_conditions())}},
        "contrasts": _table(_fields(Contrasts)),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _table(sections)


def _conditions() -> Iterator[Schema]:
    """A table of one perturbation has its parameters, one of several the parameters of any, and
    one of a class of one's own (package.module:Name) anything."""
    common = {key: _one_or_several(of) for key, of in _fields(Condition).items() if key in OPTIONS}
    common |= _fields(Only)
    anything: Schema = {}
    for name, cls in PERTURBATIONS.items():
        own = {key: _one_or_several(of) for key, of in _fields(cls).items()}
        anything |= {key: {} for key in own}
        named = {"perturbation": _one_or_several({"const": name})}
        yield _table(named | common | own, "perturbation") | {"description": cls.__doc__}
    several: Schema = {"type": "array", "items": {"enum": list(PERTURBATIONS)}, "minItems": 2}
    yield _table({"perturbation": several} | common | anything, "perturbation")
    mine = {"type": "string", "pattern": ":"}
    own_class: Schema = {"anyOf": [mine, {"type": "array", "contains": mine}]}
    yield _table({"perturbation": own_class}, "perturbation") | {"additionalProperties": True}


def _fields(cls: type) -> Schema:
    """The schema of every field."""
    return TypeAdapter(cls).json_schema(schema_generator=_Schema)["properties"]


class _Schema(GenerateJsonSchema):
    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def is_instance_schema(self, schema: Any) -> Schema:
        """A perturbation within another one."""
        return _table({"name": {"type": "string"}}, "name") | {"additionalProperties": True}

    def dataclass_schema(self, schema: Any) -> Schema:
        """As it is written where it is a field: `Where` is a text."""
        return {"type": "string"} if schema["cls"] is Where else super().dataclass_schema(schema)


def _each_required(keys: Iterable[str]) -> list[Schema]:
    return [{"required": [key]} for key in keys]


def _one_or_several(of: Schema) -> Schema:
    return {"anyOf": [of, {"type": "array", "items": of, "minItems": 1}]}


def _table(properties: Schema, *required: str) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
