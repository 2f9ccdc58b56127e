"""studies/planted.py: what it plants comes out, and a metric that is blind to it is told."""

import runpy
from pathlib import Path

import pytest

from analysis.overlap.metrics import weights

PATH = Path(__file__).parents[1] / "studies" / "planted.py"


@pytest.fixture
def planted():
    return runpy.run_path(str(PATH))


def test_all_hold(planted):
    rows = [row for cases in planted["CASES"] for row in cases()]
    assert len({(row.metric, row.case) for row in rows}) == len(rows) == 31
    assert [row for row in rows if not row.holds] == []


def test_a_blind_metric_does_not_hold(planted, monkeypatch):
    monkeypatch.setattr(weights, "matched_cosine", weights.flat_cosine)
    wrong = [row for row in planted["changed_experts"]() if not row.holds]
    assert {row.metric for row in wrong} == {"matched_cosine"}
    assert "hidden neurons permuted" in {row.case for row in wrong}
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(PATH), run_name="__main__")
    assert left.value.code == 1


def test_what_holds(planted):
    found = {got: planted["Row"]("metric", "case", 0, 1, got).holds for got in (-0.1, 0.5, 1.1)}
    assert found == {-0.1: False, 0.5: True, 1.1: False}
    assert not planted["Row"]("metric", "case", -1, 1, float("nan")).holds
    low, high = planted["exactly"](1.0)
    assert 0 < high - low < 1e-5
