"""environment.yml (conda-forge) and pyproject.toml (PyPI) name the same packages."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml  # comes with jupyterlab

ROOT = Path(__file__).parents[1]
ON_PYPI = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
CONDA_ALONE = {"python", "pip"}  # what PyPI's dependencies do not name


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def pypi_packages() -> set[str]:
    """Core and lab dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(map(name_of, project["dependencies"] + project["optional-dependencies"]["lab"]))


def conda_packages(environment: dict) -> set[str]:
    """The same as conda has them, by their names on PyPI."""
    names = {name_of(item) for item in environment["dependencies"] if isinstance(item, str)}
    return {ON_PYPI.get(name, name) for name in names} - CONDA_ALONE


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_same_packages(environment):
    assert conda_packages(environment) == pypi_packages()


def test_conda_forge_alone(environment):
    assert set(environment["channels"]) - {"nodefaults"} == {"conda-forge"}


def test_pip_installs_nothing_beside_conda_but_this_project(environment):
    """A torch of pip beside conda's pytorch would be a second one."""
    for item in environment["dependencies"]:
        if isinstance(item, dict):
            assert all(line.startswith("-e .") for line in item["pip"])


def test_a_difference_would_be_seen():
    lines = ["python>=3.11", "pytorch >=2.10", "matplotlib-base", {"pip": ["-e ."]}]
    assert conda_packages({"dependencies": lines}) == {"torch", "matplotlib"}
    assert conda_packages({"dependencies": lines}) != pypi_packages()
