"""results/: tables that are whole, and a page of which each sentence says where it stands."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import typer

from cartmoe.folders import damage
from studies.findings import PARTS, asked

RESULTS = Path(__file__).parents[1] / "results"
PAGE = (RESULTS / "README.md").read_text()
TABLES = sorted(RESULTS.glob("*/*.parquet"))


def test_every_part_is_here_and_whole():
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    assert folders == set(PARTS)
    for name in folders:
        manifest = json.loads((RESULTS / name / "manifest.json").read_text())
        assert damage(RESULTS / name, key=manifest["key"]) is None
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


def test_a_part_that_is_none():
    with pytest.raises(typer.BadParameter, match="part is 'x'; choose of trained"):
        asked(["x"])
    assert asked([]) == list(PARTS)
