"""A folder `analysis` of the user's is named where it hides ours, and only there."""

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from cartmoe.shadow import warn_if_shadowed

ROOT = Path(__file__).parents[2]


def import_in(folder):
    """stderr of a Python that is started in the folder and finds this project on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import cartmoe"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_package_of_the_users(tmp_path):
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "__init__.py").touch()
    stderr = import_in(tmp_path)
    assert stderr.count("UserWarning") == 1
    assert f"'import analysis' finds {tmp_path}/analysis/__init__.py, which shadows" in stderr


def test_a_folder_that_does_not_hide_ours(tmp_path):
    """Python prefers a package further down its path to a folder without __init__.py."""
    (tmp_path / "analysis").mkdir()
    assert import_in(tmp_path) == ""


@pytest.fixture
def found_in(monkeypatch):
    """found_in(folders): `import analysis` looks there."""

    def patch(*folders):
        path = [str(folder) for folder in folders]
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, path)
        )

    return patch


@pytest.mark.parametrize("name", ["analysis.py", "analysis/__init__.py", "analysis/notes.txt"])
def test_what_is_found_first_is_named(tmp_path, found_in, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    found_in(tmp_path)
    named = path.parent if path.suffix == ".txt" else path
    with pytest.warns(UserWarning, match=f"finds {named}, which shadows"):
        warn_if_shadowed()


def test_no_warning(tmp_path, found_in):
    warn_if_shadowed()
    found_in(ROOT, tmp_path)  # behind ours nothing is hidden
    warn_if_shadowed()
    found_in()  # without our second package
    warn_if_shadowed()
