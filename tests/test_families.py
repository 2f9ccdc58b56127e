"""studies/families.py, and the table of docs/pretrained.md that it makes."""

import re
from pathlib import Path

import pytest

from studies import families

PAGE = (Path(__file__).parents[1] / "docs" / "pretrained.md").read_text(encoding="utf-8")
TABLE = dict(re.findall(r"^\| (\w+) \| (.*) \|$", PAGE.partition("how far</summary>")[2], re.M))


def test_every_family_of_the_installed_library_is_listed():
    assert {*families.marked(), *families.UNMARKED} <= {*TABLE}


def test_enough_of_them_work():
    working = [name for name, cells in TABLE.items() if cells.startswith("yes | yes | yes")]
    assert len({*working} & {*families.marked()}) >= 45


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "gemma4", "qwen3_vl_moe", "longcat_flash"])
def test_its_rows(family):
    with families.quiet():
        row = families.tried(families.tiny(family))
    assert " | ".join(row[column] for column in families.COLUMNS) == TABLE[family]


@pytest.mark.slow
def test_the_whole_table():
    with families.quiet():
        made = families.markdown(families.table(sorted({*families.marked(), *families.UNMARKED})))
    for name, cells in re.findall(r"^\| (\w+) \| (.*) \|$", made, re.M):
        assert cells.startswith("yes") == TABLE[name].startswith("yes"), name


def test_what_cannot_be_made_says_so():
    found = families.table(["diffusion_gemma"])
    assert found.refused.item().startswith("not tried: diffusion_gemma: no tiny model")
    assert "| diffusion_gemma | not tried" in families.markdown(found)
