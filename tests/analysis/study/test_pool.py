"""Studies through executors: the same bits as in this process, whatever happens to workers."""

import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from analysis import report
from analysis.study import executors
from analysis.study import pool as execute
from analysis.study.executors import dask, deaths, processes
from analysis.study.folder import progress_of
from analysis.study.models import find
from analysis.study.plan import TASKS_A_WORKER, Plan
from analysis.study.pool import MAX_DEATHS
from analysis.study.run import run, threads_of
from analysis.study.store import Store
from analysis.study.study import Study

SHARDS = 3
FAMILIES = ("dense", "smoe_share", "cartesian")


@pytest.fixture
def study_of(study_dict_of, checkpoint_of, monkeypatch):
    """study_of(*conditions, **sections): over models that were never trained."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # workers inherit it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def build(*conditions, families=FAMILIES, **sections):
        models = [{"path": str(checkpoint_of(name)), "name": name} for name in families]
        more = {"conditions": list(conditions)} if conditions else {}
        return Study.from_dict(study_dict_of(train=None, models=models, **more, **sections))

    return build


def assert_same(got, expected):
    """Every bit of every table, tokens too."""
    for name in ("losses", "routing", "facts"):
        pd.testing.assert_frame_equal(getattr(got, name), getattr(expected, name), check_exact=True)
    columns = [c for c in expected.cells if c != "seconds"]
    pd.testing.assert_frame_equal(got.cells[columns], expected.cells[columns])
    if expected.tokens:
        for key in expected.cells[["model", "train_seed", "condition"]].itertuples(index=False):
            pd.testing.assert_frame_equal(got.tokens(*key), expected.tokens(*key))


def children() -> set[int]:
    """Processes that this one has started, other than Python's own helper."""
    return {
        p.pid
        for p in psutil.Process().children(recursive=True)
        if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(p.cmdline())
    }


@pytest.fixture
def no_process_left():
    """Such as there were not before."""
    before = children()
    yield
    assert children() <= before


# ---- the same bits


@pytest.mark.usefixtures("no_process_left")
def test_processes(study_of, tmp_path, monkeypatch):
    """One thread in workers whose environment says two; tokens kept."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    study = study_of(
        {"perturbation": ["DropTop", "GaussianNoise", "RandomRouting", "Identity"]},
        {"perturbation": "DropTop", "where": "stage 1"},
        families=["dense", "cartesian"],
        measure={"tokens": True},
    )
    serial = run(study, tmp_path / "a", progress=False)
    pool = run(study, tmp_path / "b", progress=False, executor=processes(2))
    assert serial.finished == serial.planned == pool.finished == SHARDS * 7
    assert_same(pool, serial)
    assert report.summarize(tmp_path / "a") == report.summarize(tmp_path / "b")
    assert torch.get_num_threads() == 1  # as it was


def test_any_executor(study_of, tmp_path):
    """Threads of one process share its model: they take turns."""
    study = study_of({"perturbation": "DropTop", "m": [1, 2]}, {"perturbation": "RandomRouting"})
    serial = run(study, tmp_path / "a", progress=False)
    threads = run(study, tmp_path / "b", False, lambda: ThreadPoolExecutor(3))
    assert_same(threads, serial)


def test_an_executor_is_asked_for_by_what_makes_it(study_of, tmp_path):
    """Before anything is trained."""
    with ThreadPoolExecutor(1) as made, pytest.raises(ValueError, match="give what makes one"):
        run(study_of({"perturbation": "DropTop"}), tmp_path / "a", False, made)
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def cluster(environment):
    """The address of a Dask scheduler with two workers, each a process of one thread."""
    import distributed  # with it come threads: only where it is needed
    from dask import config as dask_config

    # A local cluster (no other) gives up a worker that it finds restarting so long after a death.
    patient = dask_config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})
    with patient, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.syspath_prepend(str(Path(__file__).parent))
        # What its event loop leaves to be collected when it ends.
        warnings.simplefilter("ignore", ResourceWarning)
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster:
            yield cluster.scheduler_address


def test_dask(study_of, tmp_path, cluster):
    """Two threads in workers whose environment says one, as Dask's nanny has it."""
    conditions = {"perturbation": ["DropTop", "GaussianNoise", "RandomRouting"]}
    measure = {"tokens": True, "threads": 2}
    data = {"shard": 100}  # few tasks: two threads for each worker are many
    study = study_of(conditions, families=["cartesian"], measure=measure, data=data)
    serial = run(study, tmp_path / "a", progress=False)
    assert_same(run(study, tmp_path / "b", progress=False, executor=dask(cluster)), serial)


@pytest.mark.slow
def test_dask_worker_killed(study_of, tmp_path, cluster):
    """Dask itself tries again on other workers, and at last says that they were killed."""
    import distributed

    study = study_of(
        {"perturbation": "DropTop"}, {"perturbation": "killers:Kills"}, families=["smoe_share"]
    )
    results = run(study, tmp_path, progress=False, executor=dask(cluster))
    assert set(results.failed.perturbation) == {"Kills"}
    assert results.finished == results.planned - len(results.failed)
    assert deaths(distributed.KilledWorker("task", None, 3)) == 4


def test_a_cluster_that_lost_its_workers(environment, monkeypatch):
    """Dask would wait for others for ever."""
    import distributed

    monkeypatch.setattr(execute, "PATIENCE", 0.2)
    monkeypatch.setattr(executors, "LOST", 0.2)
    with (
        warnings.catch_warnings(),
        distributed.LocalCluster(
            n_workers=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        execute.Pool(dask(cluster.scheduler_address)) as pool,
    ):
        warnings.simplefilter("ignore", ResourceWarning)
        cluster.scale(0)
        with distributed.Client(cluster, set_as_default=False) as client:
            client.retire_workers(close_workers=True)
        never = Future()
        with pytest.raises(ConnectionError, match=r"no Dask workers at .* any more"):
            pool._wait([never])


def test_no_dask_cluster(environment):
    pytest.importorskip("distributed")
    with pytest.raises(ConnectionError, match="no Dask workers at 'nowhere'"):
        dask("nowhere")()


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"Dask is missing; install it: pip install 'cartmoe\[da"):
        dask("tcp://127.0.0.1:8786")


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (1, 0), ("2", 1)])
def test_numbers_of_processes(workers, threads):
    with pytest.raises(ValueError, match="it must be a"):
        processes(workers, threads)


def test_whose_threads(study_of):
    study = study_of()
    assert threads_of(study, None) is None
    assert threads_of(study, processes(2, threads=3)) == 3
    assert threads_of(study, processes(2), threads=4) == 4
    assert threads_of(study_of(measure={"threads": 5}), processes(2)) == 5


# ---- tasks


@pytest.mark.parametrize("workers", [1, 2, 5, 64])
def test_tasks(study_of, tmp_path, workers):
    """Every missing cell is in one task, of one shard; no worker is left without."""
    study = study_of()
    plan = Plan.of(study, 1)
    work = [plan.work(find(study, spec, plan.text(spec).corpus, tmp_path)) for spec in study.models]
    cells = [cell.key for w in work for cell in w.cells]
    missing = set(cells[5:])
    tasks = plan.tasks(work, missing, workers)
    assert sorted(cell.key for task in tasks for cell in task.cells) == sorted(missing)
    assert all(len({cell.shard for cell in task.cells}) == 1 for task in tasks)
    if workers == 1:
        places = {(w.described.family, c.shard) for w in work for c in w.cells if c.key in missing}
        assert len(tasks) == len(places) == 2 * SHARDS
    else:
        assert len(tasks) >= min(TASKS_A_WORKER * workers, len(missing) / 2)
    # Two names for one model are measured once.
    assert len(plan.tasks([*work, *work], missing, 1)) == len(plan.tasks(work, missing, 1))


def test_one_run_at_a_time(study_of, tmp_path, monkeypatch):
    """A second one, whatever its study, is refused before it does anything."""
    study = study_of({"perturbation": "DropTop"}, families=["smoe_share"])
    add, refused = Store.add, []

    def run_meanwhile(store, identity, cell):
        with pytest.raises(ValueError, match=r"is in use: process \d+ writes there") as error:
            run(study_of({"perturbation": "Identity"}), tmp_path, progress=False)
        refused.append(error)
        return add(store, identity, cell)

    monkeypatch.setattr(Store, "add", run_meanwhile)
    results = run(study, tmp_path, progress=False)
    assert results.finished == results.planned == len(refused) == 6


# ---- what goes wrong in workers


@pytest.mark.usefixtures("no_process_left")
def test_killed_workers(study_of, tmp_path):
    """A condition that always kills has failed after three times alone, one that kills once is
    measured, and so is everything else, with the same bits."""
    marker = tmp_path / "marker"
    fine = [{"perturbation": "DropTop"}, {"perturbation": "NoRouted"}]
    bad = [
        {"perturbation": "killers:Kills"},
        {"perturbation": "killers:Kills", "marker": str(marker)},
    ]
    data = {"shard": 100}
    study = study_of(*fine, *bad, families=["smoe_share"], data=data)
    out = tmp_path / "out"
    results = run(study, out, progress=False, executor=processes(1))
    assert marker.exists()
    (failed,) = results.failed.to_dict("records")
    assert (failed["perturbation"], failed["shard"]) == ("Kills", 0)
    assert failed["attempts"] == MAX_DEATHS == 3
    assert "worker process died" in failed["reason"]
    assert (results.finished, results.planned) == (4, 5)
    assert progress_of(out) == "4 of 5 cells are measured"
    text = report.summarize(out)
    assert "1 cells killed their workers" in text
    assert "smoe_share (seed 0): Kills, shard 0: the worker process died" in text
    serial = run(study_of(*fine, families=["smoe_share"], data=data), tmp_path / "a", False)
    kept = results.losses[~results.losses.perturbation.str.startswith("Kills")]
    pd.testing.assert_frame_equal(kept.reset_index(drop=True), serial.losses, check_exact=True)


def test_failed_cells_are_tried_again(study_of, tmp_path):
    """And forgotten once they are measured."""
    marker = tmp_path / "marker"
    marker.touch()
    study = study_of(
        {"perturbation": "killers:Kills", "marker": str(marker)}, families=["smoe_share"],
        data={"shard": 100},
    )  # fmt: skip
    plan = Plan.of(study, 1)
    (work,) = [
        plan.work(find(study, spec, plan.text(spec).corpus, tmp_path)) for spec in study.models
    ]
    with Store(tmp_path / "results.sqlite") as store:
        store.fail(work.cells[1].identity, "it died", 3)
    results = run(study, tmp_path, progress=False)
    assert results.failed.empty
    assert results.finished == 2
    with Store(tmp_path / "results.sqlite") as store:
        assert store.failures().empty


@pytest.mark.usefixtures("no_process_left")
def test_an_error_in_a_task(study_of, tmp_path):
    """It ends the run; finished cells are kept, and no process is left."""
    study = study_of({"perturbation": "killers:Fails"}, families=["dense", "smoe_share"])
    with pytest.raises(ValueError, match="this perturbation never works"):
        run(study, tmp_path, progress=False, executor=processes(1))
    with Store(tmp_path / "results.sqlite") as store:
        assert len(store.keys()) >= 1


def test_a_lost_task(study_of, tmp_path):
    class Losing(ThreadPoolExecutor):
        def submit(self, fn, *arguments):
            if not arguments:
                return super().submit(fn)
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(ConnectionError, match="the executor lost a task"):
        run(study_of(families=["dense"]), tmp_path, False, lambda: Losing(1))


def test_a_worker_that_would_compute_other_bits(study_of, tmp_path, monkeypatch):
    """It refuses, naming what differs."""
    planned = {"threads": 1, "matmul_precision": "highest", "torch": "1.0"}
    monkeypatch.setattr(Plan, "platform", lambda self, spec: planned)
    with pytest.raises(ValueError, match=r"torch is .*, not '1.0'"):
        run(study_of(families=["dense"]), tmp_path, progress=False)


@pytest.mark.slow
def test_workers_that_cannot_start(study_of, tmp_path):
    """A script without a guard: every worker runs it again."""
    study = study_of(families=["dense"])
    path = Path(study.models[0].path)
    script = tmp_path / "script.py"
    script.write_text(
        "import analysis as an\n"
        f"study = an.Study.from_dict({{'models': [{{'path': {str(path)!r}}}], 'data': "
        f"{{'corpus': {study.data.corpus!r}, 'length': 64}}}})\n"
        f"an.run(study, {str(tmp_path / 'out')!r}, False, an.processes(1))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "a script needs `if __name__ == '__main__':`" in done.stderr


# ---- what happens to the parent


def start(path, out, *more) -> subprocess.Popen:
    command = [sys.executable, "-m", "analysis", "run", str(path), "--out", str(out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def long_study(write_study, checkpoint_of, tmp_path):
    """A file of a study of minutes, whose first cells take a second."""
    models = [{"path": str(checkpoint_of("cartesian")), "name": "cartesian"}]
    conditions = [{"perturbation": "GaussianNoise", "eval_seed": list(range(200))}]
    return write_study(tmp_path / "s.toml", train=None, models=models, conditions=conditions,
                       data={"documents": 4, "max_tokens": 2000, "shard": 1})  # fmt: skip


def cells_in(out) -> int:
    if not (out / "plan.json").exists():
        return 0
    with Store(out / "results.sqlite") as store:
        return len(store.keys())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl_c"])
def test_the_end_of_the_parent(long_study, tmp_path, end):
    """Workers do not live on, and what is finished is kept."""
    process = start(long_study, tmp_path / "out", "--workers", "1", "--no-progress")
    deadline = time.monotonic() + 120
    while not cells_in(tmp_path / "out") and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does
    else:
        process.send_signal(end)
    _, stderr = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in stderr
    assert cells_in(tmp_path / "out") > 0
