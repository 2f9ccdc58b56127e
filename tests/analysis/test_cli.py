"""python -m analysis: what it prints, its exit codes, and errors without a traceback."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.__main__ import app

COMMANDS = ["run", "summarize", "plot", "report", "export"]


def call(*arguments):
    """In this process; what it printed on stdout and stderr, and its exit code."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def error_of(*arguments) -> str:
    """The message; nothing but it is printed, and the exit code is 2."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def small(write_study, tmp_path_factory):
    """(a study of one model and one condition, its finished directory, what the run printed)."""
    folder = tmp_path_factory.mktemp("cli")
    conditions = [{"perturbation": "DropTop"}]
    path = write_study(folder / "s.toml", train={"families": ["cartesian"]}, conditions=conditions)
    return path, folder / "out", call("run", path, "--out", folder / "out", "--no-progress")


# ---- what it does


def test_run(small):
    _, out, result = small
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no bars
    assert result.stdout.startswith("6 of 6 cells are measured\n\nClean validation loss")
    assert "DropTop(1)" in result.stdout
    assert f"Everything is in {out}" in result.stdout
    for path in (out / "figures").glob("[!.]*"):
        assert f"  {path}\n" in result.stdout


def test_summarize_and_plot(small):
    _, out, result = small
    summary = call("summarize", out)
    assert (summary.exit_code, summary.stderr) == (0, "")
    assert result.stdout.startswith(summary.stdout.rstrip())
    plot = call("plot", out)
    assert plot.exit_code == 0
    assert plot.stdout.startswith("6 of 6 cells are measured\nFigures:\n")
    drawn = list((out / "figures").glob("*.pdf"))
    assert plot.stdout.count(".pdf") == plot.stdout.count(".png") == len(drawn) > 0


def test_again(small):
    path, out, result = small
    again = call("run", path, "--out", out, "--no-progress")
    assert again.exit_code == 0
    assert (
        again.stdout.split(" s in all")[0].rsplit("\n", 1)[0]
        == (result.stdout.split(" s in all")[0].rsplit("\n", 1)[0])
    )


def test_progress(small):
    path, out, _ = small
    result = call("run", path, "--out", out)
    assert result.exit_code == 0
    assert "measuring" not in result.stdout  # there is nothing left


def test_export(small, tmp_path):
    _, out, _ = small
    result = call("export", out, "--format", "csv", "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    names = ("losses", "routing", "cells", "damage")
    assert result.stdout.splitlines() == [str(tmp_path / f"{name}.csv") for name in names]


def test_report(small, tmp_path):
    _, out, _ = small
    result = call("report", out, "-o", tmp_path / "page.html", "--no-progress")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert (
        error_of("report", out, "-o", tmp_path) == f"out is '{tmp_path}', a directory; name a file"
    )


def test_workers(small, tmp_path):
    """Of a finished study nothing is left to do for them."""
    path, out, _ = small
    assert call("run", path, "--out", out, "--no-progress", "--workers", 2).exit_code == 0
    assert error_of("run", path, "--out", tmp_path, "--workers", 2, "--dask", "x") == (
        "--workers and --dask: give one of them"
    )
    assert call("run", path, "--out", tmp_path, "--workers", 0).exit_code == 2


# ---- dry runs


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_dry_run_of_what_is_not_there(small, write_study, tmp_path):
    """Models that are not trained; nothing is written, not even a directory."""
    path = write_study(tmp_path / "s.toml", contrasts={"reference": "cartesian"})
    result = call("run", path, "--out", tmp_path / "out", "--dry-run", "--workers", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "Study 'tiny': 3 models, 66 cells, 0 finished, 66 missing"
    rows = [" ".join(line.split()) for line in lines[2:5]]
    assert rows[0].startswith("dense (seed 0) 3 shards x 1 = 3 0 3 ")
    assert rows[1].startswith("smoe_share (seed 0) 3 shards x 10 = 30 0 30 ")
    assert rows[2].startswith("cartesian (seed 0) 3 shards x 11 = 33 0 33 ")
    assert all(row.split()[-3] == "3" for row in rows)  # steps
    assert lines[5].startswith("Training, side by side: about ")
    assert "Measuring with 2 processes of 1 thread: about " in lines[6]
    assert lines[7].startswith("Estimated from one batch of 2 sequences a model and kind of cond")
    assert [p.name for p in tmp_path.iterdir()] == ["s.toml"]


def test_dry_run_of_a_study_to_go_on_with(small, write_study, tmp_path):
    _, out, _ = small
    conditions = [{"perturbation": "DropTop", "m": [1, 2]}]
    path = write_study(
        tmp_path / "s.toml", train={"families": ["cartesian"]}, conditions=conditions
    )
    before = snapshot(out)
    result = call("run", path, "--out", out, "--dry-run")
    assert "1 models, 9 cells, 6 finished, 3 missing" in result.stdout
    assert "Training, one model after the other: about 0 s" in result.stdout
    assert snapshot(out) == before


# ---- help


@pytest.mark.parametrize("arguments", [["--help"], *([c, "--help"] for c in COMMANDS)], ids=str)
def test_help(environment, arguments):
    result = call(*arguments)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_without_arguments(environment):
    result = call()
    assert result.exit_code in (0, 2)  # click has changed its mind about that
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("arguments", [["walk"], ["run"], ["run", "x"], ["summarize", "a", "b"]])
def test_wrong_usage(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


# ---- mistakes


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_directories_without_a_study(tmp_path, command):
    for path in (tmp_path / "missing", tmp_path, tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        assert error_of(command, path).startswith(f"{path} holds no study (no plan.json)")


def test_no_study_file(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        assert error_of("run", path, "--out", tmp_path / "out") == f"no study at {path}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no models"),
        (b"[[", "not TOML"),
        (b"\xff\xfe\x00", "not TOML"),
        (b"[train]\nfamilies = ['moe']", "train.families: family is 'moe'"),
        (b"[[models]]\npath = '/none'", "models[0].path: '/none' is no checkpoint"),
        (
            b"[data]\ncorpus = '/none'\n[train]\nsteps = 1",
            "data.corpus: corpus is '/none'",
        ),
        (b"[data]\ntokenizer = 'bp'\n[train]\nsteps = 1", "data.tokenizer: tokenizer is 'bp'"),
    ],
)
def test_study_files_with_mistakes(tmp_path, texts, environment, content, message):
    path = tmp_path / "s.toml"
    if b"tokenizer" in content:
        content = content.replace(b"[data]", f'[data]\ncorpus = "{texts}"'.encode())
    path.write_bytes(content)
    assert message in error_of("run", path, "--out", tmp_path / "out", "--no-progress")


def test_several_mistakes_are_a_line_each(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text("[data]\nlength = 0\nsplit = 'x'\n[train]\nsteps = 0\n")
    result = call("run", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 3
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be(small, tmp_path):
    path, out, _ = small
    file, model = tmp_path / "file", out / "models" / "cartesian-s0"
    file.write_text("x")
    for command in (
        ["run", path],
        ["run", path, "--dry-run"],
        ["export", out, "--format", "csv"],
        ["record", model, "--study", path, "--no-progress"],
        ["overlap", model],
    ):
        assert error_of(*command, "--out", file) == f"{file} is a file; name a directory"
        below = error_of(*command, "--out", file / "out")
        assert below == f"{file / 'out'} is below {file}, which is a file; name a directory"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_fewer_documents_than_asked_for(small, write_study, tmp_path, more):
    _, out, _ = small
    study = dict(
        train=None, models=[{"path": str(out / "models" / "cartesian-s0")}], conditions=[],
        data={"documents": 500},
    )  # fmt: skip
    path = write_study(tmp_path / "s.toml", **study)
    result = call("run", path, "--out", tmp_path / "out", "--no-progress", *more)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    said = r"has only (\d+) validation documents \(at most 500 were asked for\), and all of them .*"
    have = re.fullmatch(rf"warning: corpus 'texts\d*' {said}", line)[1]
    if not more:
        clean = pd.read_csv(tmp_path / "out" / "tables" / "clean.csv")
        assert clean.num_documents.item() == int(have)


def test_an_out_of_another_study(small, write_study, tmp_path):
    _, out, _ = small
    other = write_study(tmp_path / "s.toml", train={"families": ["cartesian"], "steps": 4})
    message = error_of("run", other, "--out", out, "--no-progress")
    assert "holds a run of another configuration (steps is 3 there, 4 asked for)" in message


@pytest.mark.parametrize("name", ["plan.json", "results.sqlite"])
def test_damaged_files(small, tmp_path, name):
    _, out, _ = small
    for file in ("plan.json", "results.sqlite"):
        (tmp_path / file).write_bytes((out / file).read_bytes())
    (tmp_path / name).write_bytes(b"{ damaged" * 100)
    message = error_of("summarize", tmp_path)
    assert message.startswith(str(tmp_path / name))


def test_a_full_disk(small, monkeypatch, tmp_path, write_study):
    """Whatever SQLite cannot do is a line too."""
    path, _, _ = small

    def full(*arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("analysis.study.store.Store.add", full)
    message = error_of("run", path, "--out", tmp_path / "out", "--no-progress")
    assert message == "database or disk is full"


# ---- Ctrl-C


@pytest.mark.parametrize("text", ["", "stopped after step 3"])
def test_interrupted(monkeypatch, tmp_path, text):
    def stop(*args):
        raise KeyboardInterrupt(*([text] if text else []))

    monkeypatch.setattr("analysis.study.Study.read", stop)
    result = call("run", "x", "--out", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.strip() == (text or "interrupted; the same command goes on from here")


def test_ctrl_c(write_study, tmp_path):
    """In the middle of training: a checkpoint is kept, and the same command goes on."""
    path, out = tmp_path / "s.toml", tmp_path / "out"
    write_study(path, train={"families": ["cartesian"], "steps": 2000}, conditions=[])
    command = [sys.executable, "-m", "analysis", "run", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--no-progress"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ,
    )  # fmt: skip
    metrics = out / "models" / "cartesian-s0" / "metrics.csv"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.strip().startswith("stopped after step")
    assert len(stderr.strip().splitlines()) == 1
    assert list((out / "models" / "cartesian-s0" / "checkpoints").glob("step-*"))


OWN = """
from dataclasses import dataclass
import analysis as an

@dataclass(frozen=True)
class Halve(an.Perturbation):
    expects = "weights"
    def __call__(self, logits_TE, ctx):
        return logits_TE / 2
"""


def test_the_installed_command_knows_modules_of_the_working_folder(tmp_path, write_study):
    """As `python -m analysis` does; also in other processes."""
    (tmp_path / "mine.py").write_text(OWN)
    path = write_study(tmp_path / "s.toml", conditions=[{"perturbation": "mine:Halve"}])
    command = [Path(sys.executable).with_name("cartmoe-study"), "run", path, "--out", "o"]
    done = subprocess.run(
        [*command, "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Halve" in done.stdout


# ---- mistakes are found before anything is trained, by a dry run too


DRY = pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])


@DRY
def test_mistakes_and_those_of_the_corpus_at_once(tmp_path, dry):
    path = tmp_path / "s.toml"
    path.write_text(
        "[data]\ncorpus = '/none'\ntokenizer = 'bp'\n[train]\nfamilies = ['moe']\n"
        "[measure]\nx = 1\n"
    )
    result = call("run", path, "--out", tmp_path / "out", *dry)
    assert result.exit_code == 2
    for part in ("measure.x: no such key", "families: family is 'moe'", "corpus is '/none'"):
        assert part in result.stderr
    assert "data.tokenizer: tokenizer is 'bp'" in result.stderr
    assert len(result.stderr.splitlines()) == 4
    assert not (tmp_path / "out").exists()


@DRY
def test_a_corpus_without_a_file_that_can_be_read(tmp_path, write_study, dry):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "picture.png").write_bytes(b"x")
    data = {"corpus": str(tmp_path / "empty")}
    path = write_study(tmp_path / "s.toml", data=data)
    said = error_of("run", path, "--out", tmp_path / "out", *dry)
    assert "data.corpus: corpus '" in said
    assert "has no .txt" in said


@DRY
def test_a_run_of_another_configuration_stands_in_the_way(small, write_study, tmp_path, dry):
    _, out, _ = small
    before = snapshot(out)
    path = write_study(tmp_path / "s.toml", train={"families": ["cartesian"], "learning_rate": 0.5})
    said = error_of("run", path, "--out", out, *dry)
    assert "model 'cartesian': " in said
    assert "holds a run of another configuration (learning_rate is " in said
    assert snapshot(out) == before


@DRY
def test_every_model_that_does_not_fit_is_named(write_study, checkpoint_of, tmp_path, dry):
    models = [
        {"path": str(checkpoint_of("smoe", vocab_size=n)), "name": f"m{n}"} for n in (64, 128)
    ]
    path = write_study(tmp_path / "s.toml", train=None, models=models, contrasts=None)
    result = call("run", path, "--out", tmp_path / "out", *dry)
    assert result.exit_code == 2
    for spec, n in zip(models, (64, 128), strict=True):
        assert f"models, path {spec['path']}: model 'm{n}' has a vocabulary of {n}" in result.stderr
    assert len(result.stderr.splitlines()) == 2


@DRY
def test_a_cluster_that_is_not_there(write_study, tmp_path, monkeypatch, dry):
    monkeypatch.setattr("analysis.study.executors.WAIT", 0.2)
    path = write_study(tmp_path / "s.toml")
    said = error_of("run", path, "--out", tmp_path / "out", "--dask", "tcp://127.0.0.1:9", *dry)
    assert said.startswith("no Dask workers at 'tcp://127.0.0.1:9'")
    assert not (tmp_path / "out" / "models").exists()


def test_a_dry_run_says_why_nothing_is_finished(small, tmp_path):
    path, out, _ = small
    result = call("run", path, "--out", out, "--dry-run", "--threads", 2)
    assert " 0 finished" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert "cells are kept there, and none of them is of this plan: threads 1 then, 2 now" in last


def test_a_condition_that_stands_twice(tmp_path, write_study):
    drop = {"perturbation": "DropTop", "m": 1}
    conditions = [drop, drop | {"models": ["cartesian"]}]
    path = write_study(tmp_path / "s.toml", conditions=conditions, contrasts=None)
    said = error_of("run", path, "--out", tmp_path / "out")
    assert said.endswith(
        "conditions[1]: DropTop stands twice, for all models and here for cartesian; "
        "write it once, with the models of both"
    )
