"""A run that was stopped in any way ends as one that was not: every bit of weights, optimizer and
metrics, but the times."""

import multiprocessing
import os
import random
import signal
import threading
import time
import warnings

import pandas as pd
import pytest

from cartmoe.checkpoint import run_checkpoints, step_folder
from cartmoe.folders import read_manifest
from cartmoe.train import train

NOISY = dict(router_noise=0.5, score="sigmoid", z_loss=0.01, accumulate=2)


def assert_same_run(out, expected):
    """Both finished. Manifests have the SHA-256 of every file, which are all of a checkpoint."""
    last, expected_last = run_checkpoints(out)[-1], run_checkpoints(expected)[-1]
    assert last.name == expected_last.name
    assert read_manifest(last) == read_manifest(expected_last)
    tables = [pd.read_csv(run / "metrics.csv", dtype=str) for run in (out, expected)]
    a, b = (table.drop(columns="tokens_per_second") for table in tables)
    pd.testing.assert_frame_equal(a, b)
    leftovers = [path.name for path in (out / "checkpoints").iterdir() if ".partial" in path.name]
    assert leftovers == []


def num_rows(out):
    path = out / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


@pytest.fixture(scope="module")
def expected(tiny_run, tmp_path_factory):
    """The run of `NOISY` that nothing stopped."""
    return train(*tiny_run(**NOISY), tmp_path_factory.mktemp("expected"), progress=False)


def signal_after(rows, out, number):
    """A thread that sends this process a signal when `out` has so many rows of metrics."""

    def send():
        while num_rows(out) < rows:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number, tiny_run, expected, tmp_path):
    out = tmp_path / "run"
    thread = signal_after(2, out, number)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d of 6, which is saved in"):
        # Long checkpoints, so that the signal comes long before the end.
        train(*tiny_run(**NOISY, checkpoint_every=1), out, progress=False)
    thread.join()
    train(*tiny_run(**NOISY), out, progress=False)
    assert_same_run(out, expected)


def test_a_damaged_newest_checkpoint(tiny_run, expected, tmp_path, monkeypatch):
    out, settings = tmp_path / "run", tiny_run(**NOISY, checkpoint_every=2, keep=3)
    with monkeypatch.context() as patch:
        patch.setattr("cartmoe.train._Trainer.take_step", fail_at(6))
        with pytest.raises(ZeroDivisionError):
            train(*settings, out, progress=False)
    assert [path.name[-1] for path in run_checkpoints(out)] == ["2", "4"]
    path = step_folder(out, 4) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000002 is used instead"):
        train(*settings, out, progress=False)
    assert_same_run(out, expected)
    with warnings.catch_warnings(action="error"):
        assert [path.name[-1] for path in run_checkpoints(out)] == ["2", "4", "6"]


def fail_at(step):
    from cartmoe.train import _Trainer

    take_step = _Trainer.take_step

    def failing(self):
        if self.step + 1 == step:
            raise ZeroDivisionError
        return take_step(self)

    return failing


def test_rows_of_metrics_after_the_checkpoint_are_replaced(
    tiny_run, expected, tmp_path, monkeypatch
):
    """Also one that was cut off in the middle."""
    out, settings = tmp_path / "run", tiny_run(**NOISY, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("cartmoe.train._Trainer.take_step", fail_at(4))
        with pytest.raises(ZeroDivisionError):
            train(*settings, out, progress=False)
    assert num_rows(out) == 3
    with (out / "metrics.csv").open("a") as file:
        file.write("4,5.1")
    train(*settings, out, progress=False)
    assert_same_run(out, expected)


# kill -9 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children(token_cache):
    """Starts processes; torch is imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cartmoe.train", "torch._dynamo"])  # AdamW imports that
    return context


def start(children, settings, out):
    child = children.Process(target=train, args=(*settings, out), kwargs=dict(progress=False))
    child.start()
    return child


def run_to_the_end(children, settings, out):
    child = start(children, settings, out)
    child.join()
    assert child.exitcode == 0


def kill_once(children, settings, out, rng):
    """Start, kill at some moment of the run; whether it was killed before it had ended."""
    rows = num_rows(out) + rng.randrange(1, 7)
    child = start(children, settings, out)
    while child.is_alive() and num_rows(out) < rows:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


# A checkpoint after every step takes longer than the step: most kills interrupt one.
KILLED = dict(steps=20, checkpoint_every=1, **NOISY)


def test_kill(children, tiny_run, tmp_path):
    settings, rng = tiny_run(**KILLED), random.Random(0)
    run_to_the_end(children, settings, tmp_path / "expected")
    killed = sum(kill_once(children, settings, tmp_path / "run", rng) for _ in range(2))
    assert killed >= 1
    run_to_the_end(children, settings, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "expected")


@pytest.mark.slow
def test_twenty_kills(children, tiny_run, tmp_path):
    settings, rng = tiny_run(**KILLED), random.Random(1)
    run_to_the_end(children, settings, tmp_path / "expected")
    killed = resumed = 0
    for i in range(20):
        out = tmp_path / str(i)
        while not kill_once(children, settings, out, rng):
            pass
        killed += 1
        run_to_the_end(children, settings, out)
        assert_same_run(out, tmp_path / "expected")
        resumed += 1
    print(f"\n{resumed}/{killed} killed runs ended as the one that was not killed")
