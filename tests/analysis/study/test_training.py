"""Models of a study trained side by side: the same weights, whatever happens to processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from analysis.study import machine
from analysis.study.executors import processes
from analysis.study.machine import cores, free_memory, free_workers
from analysis.study.models import run_folder
from analysis.study.run import run
from analysis.study.specs import ModelSpec
from analysis.study.study import Study
from analysis.study.training import train_models
from cartmoe.checkpoint import checkpoint_sha256, newest, run_checkpoints, step_of
from cartmoe.config import ModelConfig
from cartmoe.run import read_run

TRAIN = {"families": ["dense", "smoe_share", "cartesian"], "checkpoint_every": 2}


@pytest.fixture
def study_of(study_dict_of):
    return lambda **train: Study.from_dict(study_dict_of(train=TRAIN | train))


def weights(study, out):
    return [checkpoint_sha256(newest(run_folder(out, spec))) for spec in study.models]


@pytest.fixture(scope="module")
def alone(study_dict_of, tmp_path_factory):
    """Trained one after the other in this process."""
    study, out = Study.from_dict(study_dict_of(train=TRAIN)), tmp_path_factory.mktemp("alone")
    train_models(study.models, out, 1, 1, progress=False)
    return weights(study, out)


def test_the_same_weights(study_of, alone, tmp_path):
    study = study_of()
    train_models(study.models, tmp_path, 2, 1, progress=False)
    assert weights(study, tmp_path) == alone
    asked = [read_run(run_folder(tmp_path, spec)) for spec in study.models]
    assert {each["found"]["threads"] for each in asked} == {1}


def test_a_study_does_so_and_measures_the_same(study_of, tmp_path):
    study = study_of(families=["smoe_share", "cartesian"])
    side = run(study, tmp_path / "a", progress=False, executor=processes(2))
    serial = run(study, tmp_path / "b", progress=False)
    assert side.losses.equals(serial.losses)
    assert side.routing.equals(serial.routing)


def test_what_is_said_meanwhile(study_of, tmp_path, capfd):
    study = study_of(families=["dense", "smoe_share"])
    train_models(study.models, tmp_path, 2, 1, progress=True)
    said = capfd.readouterr().err
    assert "training 2 models: 100%" in said
    assert all(f"{spec.name}, seed 0" in said for spec in study.models)
    assert "tokens/s" in said


def test_the_others_stop_when_one_fails(study_of, tmp_path):
    """What it failed of is what is raised."""
    study = study_of(families=["smoe_share", "cartesian"], steps=100_000)
    stood = run_folder(tmp_path, study.models[1])
    stood.mkdir(parents=True)
    (stood / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json"):
        train_models(study.models, tmp_path, 2, 1, progress=False)
    assert not children()


def children():
    own = psutil.Process().children(recursive=True)
    return [p for p in own if "spawn_main" in " ".join(p.cmdline()) and p.is_running()]


def test_a_process_that_is_killed(study_of, tmp_path):
    study = study_of(families=["smoe_share", "cartesian"], steps=100_000)

    def kill():
        deadline = time.monotonic() + 60
        while len(children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        children()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ChildProcessError, match=r"the process that trained .* died: killed"):
        train_models(study.models, tmp_path, 2, 1, progress=False)
    killer.join()
    assert not children()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl_c", "kill"])
def test_it_goes_on_exactly_after_any_end(write_study, tmp_path, end):
    """With all its processes gone; the same again has the weights of one that nobody stopped."""
    families = ["smoe_share", "cartesian"]
    # Seldom enough for what it writes on a Ctrl-C to be told from what it had anyway.
    train = TRAIN | {"steps": 150, "families": families, "checkpoint_every": 40}
    path = write_study(tmp_path / "s.toml", train=train)
    study, out = Study.read(path), tmp_path / "out"
    command = [sys.executable, "-m", "analysis", "run", path, "--out", out, "--workers", "2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, process_group=0
    )
    deadline = time.monotonic() + 120
    while not all(run_checkpoints(run_folder(out, spec)) for spec in study.models[:2]):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, end) if end == signal.SIGINT else process.send_signal(end)
    _, said = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    assert "Traceback" not in said
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    reached = [step_of(newest(run_folder(out, spec))) for spec in study.models]
    assert all(0 < step < 150 for step in reached)
    if end == signal.SIGINT:
        assert all(step % 40 for step in reached)
    train_models(study.models, out, 2, 1, progress=False)
    train_models(study.models, tmp_path / "alone", 1, 1, progress=False)
    assert weights(study, out) == weights(study, tmp_path / "alone")


def test_free_workers():
    tiny = ModelSpec(
        "tiny", config=ModelConfig.preset("nano", d_model=32, ffn_width=64, num_heads=2)
    )
    huge = ModelSpec("huge", config=ModelConfig.preset("large", num_experts=512))
    assert 1 <= free_workers([tiny]) <= cores() <= (os.cpu_count() or 1)
    assert free_workers([tiny, huge]) == 1
    assert free_workers([ModelSpec("gone", path="/nowhere")]) >= 1
    assert free_memory() > 2**28


def test_workers_share_the_cores(monkeypatch):
    tiny = [ModelSpec("tiny", config=ModelConfig.preset("micro"))]
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "free_memory", lambda: 2**40)
    assert [free_workers(tiny, threads) for threads in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setattr(machine, "default_device", lambda: "cuda")
    assert free_workers(tiny) == 1


def test_files_that_were_read_are_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name, text in {
        "max": "2000",
        "current": "1500",
        "stat": "anon 500\ninactive_file 900",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory() == 1400
