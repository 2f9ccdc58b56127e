"""Every command where nothing can be written, where the disk is full, and twice at the same time.

`pytest -m slow -s tests/faults`
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import analysis as an
from cartmoe.checkpoint import newest

pytestmark = pytest.mark.slow
COMMANDS = ("train", "run", "summarize", "plot", "report", "export", "record", "overlap")


@pytest.fixture
def command_of(finished, corpus):
    """command_of(name, out) -> its words; what it reads of a study is `out` itself, or finished."""
    toml, out_of_study = finished
    model = out_of_study / "models" / "smoe_share-s0"

    def build(name: str, out: Path) -> list[str]:
        analysis, quiet = [sys.executable, "-m", "analysis"], "--no-progress"
        shape = ["--preset", "nano", "--family", "smoe", "--batch-size", "2", "--length", "32"]
        words = {
            "train": [sys.executable, "-m", "cartmoe", "train", *shape, "--steps", "3",
                      "--corpus", str(corpus), "--precision", "fp32", quiet, "--out", str(out)],
            "run": [*analysis, "run", str(toml), quiet, "--out", str(out)],
            "summarize": [*analysis, "summarize", str(out)],
            "plot": [*analysis, "plot", str(out)],
            "report": [*analysis, "report", str(out_of_study), quiet, "--out",
                       str(out / "page.html")],
            "export": [*analysis, "export", str(out_of_study), "--format", "csv",
                       "--out", str(out)],
            "record": [*analysis, "record", str(model), "--study", str(toml), quiet,
                       "--out", str(out)],
            "overlap": [*analysis, "overlap", str(model), "--corpus", str(corpus), "--documents",
                        "4", "--length", "32", "--metric", "lift", quiet, "--out", str(out)],
        }  # fmt: skip
        return words[name]

    return build


def prepared(name: str, finished: tuple[Path, Path], out: Path) -> Path:
    """What the command finds: a study for those that read one, nothing for others."""
    if name in ("summarize", "plot"):
        shutil.copytree(finished[1], out, ignore=shutil.ignore_patterns("models", "tables"))
        shutil.rmtree(out / "figures")
        (out / "robustness.txt").unlink()
    return out


def ended(done: subprocess.CompletedProcess | subprocess.Popen, stderr: str) -> None:
    """With 0, or with 2 and a line or a few; never with a traceback."""
    assert done.returncode in (0, 2), (done.returncode, stderr)
    assert "Traceback" not in stderr, stderr
    assert done.returncode == 0 or "error: " in stderr


@pytest.mark.parametrize("size", [0, 1_500, 30_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(finished, command_of, tmp_path, name, size):
    """No file may grow beyond so many bytes: a line, and what was there is as it was; with room
    again the same command does what it is to do."""
    out = prepared(name, finished, tmp_path / "out")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    command, run = command_of(name, out), partial(subprocess.run, capture_output=True, text=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = run(command, preexec_fn=limit)
    ended(done, done.stderr)
    assert {path: path.read_bytes() for path in before} == before
    if (name, done.returncode) != ("record", 0):  # which had room, and overwrites nothing
        done = run(command)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_where_nobody_can_write(finished, command_of, tmp_path, name):
    place = tmp_path / "place"
    place.mkdir()
    out = prepared(name, finished, place / "out")
    done = without_writing(place, command_of(name, out))
    ended(done, done.stderr)
    assert done.returncode == 2
    assert str(place) in done.stderr


@pytest.mark.parametrize("name", ["summarize", "plot", "report", "export"])
def test_a_finished_study_is_read_from_there(finished, tmp_path, name):
    place = tmp_path / "place"
    shutil.copytree(finished[1], place)
    command = [sys.executable, "-m", "analysis", name, str(place)]
    here = tmp_path / "here" / ("page.html" if name == "report" else "")
    command += ["--to" if name in ("summarize", "plot") else "--out", str(here)]
    command += ["--format", "csv"] if name == "export" else []
    done = without_writing(place, command)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "here").rglob("*"))


def without_writing(place: Path, command: list[str]) -> subprocess.CompletedProcess:
    """Run it while nothing can be written there: the superuser needs a mount for that."""
    if os.geteuid() == 0:
        script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", script, str(place), *command]
        return subprocess.run(command, capture_output=True, text=True)
    folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        return subprocess.run(command, capture_output=True, text=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)


def of_training(out: Path) -> object:
    return {p.name: p.read_bytes() for p in newest(out).iterdir() if "safetensors" in p.name}


def of_a_study(out: Path) -> object:
    return an.read(out).losses.drop(columns=[]).to_csv()


def of_files(out: Path) -> object:
    files = (p for p in out.rglob("*") if p.is_file() and p.suffix in (".csv", ".png", ".i2"))
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


SEEN: dict[str, Callable[[Path], object]] = {"train": of_training, "run": of_a_study}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("apart", [0.0, 0.4])
def test_two_at_once(finished, command_of, tmp_path, name, apart):
    """One does it, the other waits or is refused in a line; what is there is whole."""
    alone, together = (prepared(name, finished, tmp_path / n / "out") for n in ("a", "b"))
    done = subprocess.run(command_of(name, alone), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both = []
    for _ in range(2):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        both.append(subprocess.Popen(command_of(name, together), **pipes))
        time.sleep(apart)
    for process in both:
        _, stderr = process.communicate(timeout=300)
        ended(process, stderr)
    assert 0 in [process.returncode for process in both]
    observe = SEEN.get(name, of_files)
    assert observe(together) == observe(alone)
    assert not list(together.rglob("*.tmp*"))
