"""The key of a perturbation of one's own follows the module that it stands in."""

import importlib
import linecache
import sys
from types import ModuleType

import pytest
import torch

from analysis.perturb import Custom
from analysis.perturb.source import code_sha256

MODULE = """
from dataclasses import dataclass
from analysis.perturb import Perturbation

FACTOR = {factor}

def scaled(logits_TE):
    return logits_TE * FACTOR{more}

@dataclass(frozen=True)
class Mine(Perturbation):
    def __call__(self, logits_TE, ctx):
        return scaled(logits_TE)
"""


@pytest.fixture
def sha256_of(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def of(**words):
        (tmp_path / "mine_of_a_test.py").write_text(MODULE.format(**words))
        sys.modules.pop("mine_of_a_test", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return code_sha256(importlib.import_module("mine_of_a_test").Mine)

    yield of
    sys.modules.pop("mine_of_a_test", None)


def test_what_the_class_uses_is_part_of_it(sha256_of):
    first = sha256_of(factor=1.0, more="")
    assert sha256_of(factor=1.0, more="") == first
    assert sha256_of(factor=-1.0, more="") != first
    assert sha256_of(factor=1.0, more=" + 1") != first


CELLS = """
from functools import partial

FACTOR = {factor}
TABLE = {{"a": [{entry}]}}

def helper(x):
    return x * 1.5{more}

def inner(x):
    return helper(x) + FACTOR + TABLE["a"][0]

def decide(x, *, shift=0):
    return [inner(y) for y in x]

class Mine:
    kept = {kept}
    def __call__(self, x):
        return decide(x)

def closed(factor):
    return lambda x: x * factor

one, two = closed({closed}), partial(decide, shift={shift})
"""
PLAIN = dict(factor=1, entry=2, more="", kept=3, closed=4, shift=5)


def cells(**words):
    """What a notebook has after this cell."""
    space = {"__name__": "__main__"}
    exec(CELLS.format(**PLAIN | words), space)
    return space


@pytest.fixture(autouse=True)
def notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


@pytest.mark.parametrize(
    ("name", "change", "covers"),
    [
        ("Mine", {"factor": -1}, True),
        ("Mine", {"entry": -1}, True),
        ("Mine", {"more": " + 1"}, True),
        ("Mine", {"kept": 0}, True),
        ("Mine", {"closed": 0, "shift": 0}, False),
        ("one", {"closed": 0}, True),
        ("one", {"more": " + 1"}, False),
        ("two", {"shift": 0}, True),
        ("two", {"more": " + 1"}, True),
    ],
)
def test_what_a_notebook_defines(name, change, covers):
    """Which has no file: what is used by name is followed."""
    first = code_sha256(cells()[name])
    assert first == code_sha256(cells()[name])
    assert (code_sha256(cells(**change)[name]) != first) == covers


def test_a_method_that_is_put_in_later(sha256_of):
    first = sha256_of(factor=1.0, more="")
    cls = sys.modules["mine_of_a_test"].Mine
    cls.__call__ = cells()["decide"]
    assert code_sha256(cls) != first


def test_a_function_of_yours():
    def identity(**words):
        return Custom(cells(**words)["decide"], "Mine").to_dict()

    assert identity() == identity()
    assert identity() != identity(factor=-1)
    assert identity()["source"]


def test_nothing_of_yours():
    assert code_sha256(Custom) is None
    assert code_sha256(torch.relu) is None
