"""`python -m analysis schema`: what an editor is told about a study's TOML."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.perturb.catalogue import PERTURBATIONS
from analysis.study.parse import RUNS, SECTIONS
from analysis.study.study import Study

STUDIES = sorted((Path(__file__).parents[3] / "studies").glob("*.toml"))
TRAIN = {"families": ["cartesian"], "steps": 2}


@pytest.fixture(scope="module")
def schema() -> dict:
    result = CliRunner().invoke(app, ["schema"])
    assert (result.exit_code, result.stderr) == (0, "")
    schema = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def is_valid(schema, study) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(study)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_project(schema, path):
    jsonschema.validate(tomllib.loads(path.read_text()), schema)


def test_it_has_all_there_is(schema):
    assert set(schema["properties"]) == set(SECTIONS)
    assert set(RUNS) <= set(schema["properties"]["train"]["properties"])
    named = str(schema["properties"]["conditions"])
    assert all(name in named for name in PERTURBATIONS)


GOOD = [
    {"train": TRAIN | {"model": {"top_k": 2}, "variants": {"a": {"composition": "parallel"}}}},
    {"train": TRAIN | {"model": {"top_k": [1, 2]}, "betas": [0.9, 0.99]}},
    {"contrasts": {"conditions": "DropTop(1)"}},
    {"conditions": [{"perturbation": "DropTop", "m": [1, 2], "where": ["all", "stage 0"]}]},
    {"conditions": [{"perturbation": ["DropTop", "Identity"], "m": 1}]},
    {"conditions": [{"perturbation": "KeepRanks", "ranks": [[1], [1, 2]]}]},
    {"conditions": [{"perturbation": "DropExperts", "ids": {"layer 0": [1]}}]},
    {"conditions": [{"perturbation": "Compose", "parts": [{"name": "DropTop", "m": 2}]}]},
    {"conditions": [{"perturbation": "ResidualNoise", "of": {"name": "DropTop"}}]},
    {"conditions": [{"perturbation": "a.b:Mine", "by": 3}, {"perturbation": "NoRouted"}]},
    {"conditions": [{"perturbation": "DropTop", "models": ["smoe"], "train_seeds": [0]}]},
    {"conditions": [{"perturbation": "DropTop", "models": "smoe", "train_seeds": 0}]},
    {"conditions": [{"perturbation": "DropTop", "effect": ["full", "part set"]}]},
    {"train": TRAIN | {"families": "cartesian"}},
]
BAD = [
    {"dat": {}},
    {"data": {"corpora": "stdlib"}},
    {"data": {"length": 1}},
    {"data": {"split": "test"}},
    {"train": TRAIN | {"family": "smoe"}},
    {"train": TRAIN | {"length": 3}},
    {"train": TRAIN | {"model": {"width": 3}}},
    {"models": [{"name": "x"}]},
    {"conditions": [{"perturbation": "DropTpo"}]},
    {"conditions": [{"perturbation": "DropTop", "mm": 1}]},
    {"conditions": [{"perturbation": "DropTop", "m": -1}]},
    {"conditions": [{"perturbation": "DropTop", "point": "logit"}]},
    {"conditions": [{"perturbation": "DropTop", "effect": "half"}]},
    {"conditions": [{"perturbation": ["DropTop", "Identity"], "mm": 1}]},
    {"contrasts": {"margin": -1}},
]


@pytest.mark.parametrize("study", GOOD, ids=str)
def test_good(schema, study):
    assert is_valid(schema, study)


@pytest.mark.parametrize("study", BAD, ids=str)
def test_misspelt_keys_and_wrong_values(schema, study):
    assert not is_valid(schema, study)
    with pytest.raises(ValueError, match=r"^study: "):
        Study.from_dict(study)
