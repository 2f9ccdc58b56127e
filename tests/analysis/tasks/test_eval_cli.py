"""`python -m analysis eval`: tables, words, a manifest; mistakes are one line."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.__main__ import app

ASKED = ["--tasks", "tiny_choice", "--condition", "DropTop(1)", "--limit", 3]


def asked(*words):
    return CliRunner().invoke(app, ["eval", *map(str, words), "--no-progress"])


@pytest.fixture(scope="module")
def out(task_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "out"
    done = asked("smoe", *ASKED, "--include-path", task_folder, "--out", folder)
    assert done.exit_code == 0, done.output
    assert "smoe" in done.output
    return folder


def test_what_is_left(out):
    samples = pd.read_csv(out / "samples.csv")
    assert set(samples.condition) > {"clean"}
    differences = pd.read_csv(out / "differences.csv")
    assert differences.label.tolist() == ["DropTop(1)"] * 2
    assert (differences.num_documents == 3).all()
    text = (out / "tasks.txt").read_text()
    assert "DropTop(1)" in text
    assert "? from fewer than 20 documents" in text
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tasks"] == ["tiny_choice"]
    assert "torch" in manifest["versions"]


def test_what_is_finished_is_not_asked_again(out, task_folder):
    before = (out / "samples.csv").stat().st_mtime_ns
    done = asked("smoe", *ASKED, "--include-path", task_folder, "--out", out)
    assert done.exit_code == 0
    assert (out / "samples.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("model", "changed"),
    [("cartesian", []), ("smoe", ["--seed", 1]), ("smoe", ["--condition", "DropTop(2)"])],
)
def test_other_results_are_not_lost(out, task_folder, model, changed):
    """Nor ever taken for those of another model or condition."""
    done = asked(model, *ASKED, *changed, "--include-path", task_folder, "--out", out)
    assert done.exit_code == 2
    assert "holds other results" in done.output


def test_a_task_that_was_edited_is_another(out, task_folder):
    path = task_folder / "lines.jsonl"
    before = path.read_text()
    path.write_text(before.replace("zq", "zz"))
    try:
        done = asked("smoe", *ASKED, "--include-path", task_folder, "--out", out)
    finally:
        path.write_text(before)
    assert "holds other results (asked)" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "tiny_choice", "--condition", "Drop(1)"], "choose one of"),
        (["--tasks", ",", "--condition", "DropTop(1)"], "tasks is empty"),
        (["--tasks", "tiny_choice", "--condition", "DropTop(99)"], "99"),
    ],
)
def test_mistakes(task_folder, tmp_path, words, said):
    out = tmp_path / "out"
    done = asked("smoe", *words, "--include-path", task_folder, "--out", out)
    assert done.exit_code == 2, done.output
    assert "error: " in done.output
    assert "Traceback" not in done.output
    assert said in done.output
    assert not list(out.glob("*.csv"))


def test_a_directory_that_there_is_not(tmp_path):
    where = ["--include-path", tmp_path / "no", "--out", tmp_path / "out"]
    done = asked("smoe", *ASKED, *where)
    assert done.exit_code == 2
    assert "no directory" in done.output
