"""The key of a perturbation of one's own follows the module that it stands in."""

import importlib
import linecache
import sys

import pytest

from analysis.perturb.base import source_sha256

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
        return source_sha256(importlib.import_module("mine_of_a_test").Mine)

    yield of
    sys.modules.pop("mine_of_a_test", None)


def test_what_the_class_uses_is_part_of_it(sha256_of):
    first = sha256_of(factor=1.0, more="")
    assert sha256_of(factor=1.0, more="") == first
    assert sha256_of(factor=-1.0, more="") != first
    assert sha256_of(factor=1.0, more=" + 1") != first


def test_a_class_of_a_notebook():
    """Its module has no file: the class is all there is, here not even that."""
    space = {"__name__": "__main__"}
    exec("class Mine:\n    pass", space)
    assert source_sha256(space["Mine"]) is None
