"""results/: tables that are whole, and a page of which each sentence says where it stands."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer

from analysis.stats import Bootstrap, damage
from cartmoe.folders import damage as damage_of_files
from studies.findings import PARTS, asked, by_document

from .analysis.synthetic import arm, losses

RESULTS = Path(__file__).parents[1] / "results"
PAGE = (RESULTS / "README.md").read_text()
TABLES = sorted(RESULTS.glob("*/*.parquet"))


def test_every_part_is_here_and_whole():
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    assert folders == set(PARTS)
    for name in folders:
        manifest = json.loads((RESULTS / name / "manifest.json").read_text())
        assert damage_of_files(RESULTS / name, key=manifest["key"]) is None
        assert manifest["key"]["command"] == f"python -m studies.findings {name}"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_tables_can_be_read(path):
    assert len(pd.read_parquet(path)) > 0


def test_every_sentence_names_its_table():
    named = set(re.findall(r"`(\w+/\w+)`", PAGE))
    assert named <= {f"{path.parent.name}/{path.stem}" for path in TABLES}
    findings, _, _ = PAGE.partition("\n## What can be held against this")
    items = re.split(r"\n(?=- )", findings)[1:]
    assert len(items) >= 10
    assert [item for item in items if not re.search(r"`\w+/\w+`", item)] == []


def test_documents_as_one_have_the_same_damage():
    """Intervals too: whole documents are drawn."""
    table = losses([arm("DropTop", 1, 0.5), arm("GaussianNoise", 1.0, 0.2)], documents=24)
    table["num_touched"] = table.num_tokens
    window = table.groupby(["condition", "document_id"]).cumcount()
    table["domain"] = np.where(window == 0, "code", "tests")
    one = by_document(table)
    assert len(one) < len(table)
    assert not one.duplicated(["condition", "document_id", "sequence_id"]).any()
    few = Bootstrap(resamples=99)
    columns = ["label", "num_documents", "num_tokens", "delta_nats", "low", "high", "agreement"]
    found, expected = (damage(t, bootstrap=few)[columns] for t in (one, table))
    pd.testing.assert_frame_equal(found, expected)


def test_a_part_that_is_none():
    with pytest.raises(typer.BadParameter, match="part is 'x'; choose of third"):
        asked(["x"])
    assert asked([]) == list(PARTS)
