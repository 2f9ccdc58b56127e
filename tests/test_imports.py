"""What is imported when: heavy packages only when something of theirs is first used."""

import subprocess
import sys

import pytest

import analysis
import cartmoe

HEAVY = (
    *("torch", "pandas", "matplotlib", "scipy", "numpy", "pydantic", "transformers", "dask"),
    *("scipy.optimize", "scipy.stats", "torch._dynamo"),
)
HELP = (
    "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('analysis', None, '__main__')"
)


def heavy_after(code):
    """Which heavy packages a new Python has imported when the code has run."""
    tell = f"import sys; print(*(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)"
    code = f"try:\n    {code}\nexcept SystemExit:\n    pass\n{tell}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


@pytest.mark.parametrize("code", ["import cartmoe", "import analysis", HELP])
def test_nothing_heavy(code):
    assert heavy_after(code) == []


def test_a_worker_does_without():
    """It begins when torch and pandas are there."""
    heavy = heavy_after("import analysis.study.worker")
    assert "torch" in heavy
    others = {"scipy.optimize", "scipy.stats", "matplotlib", "torch._dynamo", "transformers"}
    assert others.isdisjoint(heavy)


EXTRAS = ("transformers", "tokenizers", "accelerate", "lm_eval", "datasets", "anywidget", "dask")
ROOMS = ("adapters", "measure", "overlap", "study", "tasks", "report", "explorer", "plots", "stats")


def test_rooms_do_without_the_extras():
    """As with the core install, which `make study` makes."""
    absent = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"  # None: there is none
    for room in ROOMS:
        code = f"{absent}; import analysis.{room} as room; [getattr(room, n) for n in dir(room)]"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_it_would_be_seen():
    assert "torch" in heavy_after("from cartmoe import LanguageModel")
    assert "pandas" in heavy_after("from analysis import stats; stats.damage")


@pytest.mark.parametrize("package", [analysis, cartmoe, analysis.stats, analysis.plots])
def test_every_name_is_there(package):
    assert package.__all__
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_threads_spin_a_little_only():
    """It must be said before torch loads OpenMP, and what the user says holds."""
    code = "import os, cartmoe; print(os.environ['GOMP_SPINCOUNT'])"
    for said, found in [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7")]:
        done = subprocess.run(
            [sys.executable, "-c", code], env=said, capture_output=True, text=True
        )
        assert done.stdout.strip() == found
