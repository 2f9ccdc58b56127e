"""JupyterLab itself: the tour runs from top to bottom, and a slider of the explorer moves text and
picture. Screenshots lie in the test's directory, or in $SCREENSHOTS."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
APP = "window.jupyterapp"
CELLS = f"""
const cells = {APP}.shell.currentWidget.content.widgets.map(cell => cell.model);
return cells.filter(cell => cell.type === "code").map(cell => ({{
    count: cell.executionCount,
    errors: cell.outputs.toJSON().filter(out => out.output_type === "error").map(out => out.evalue),
}}));
"""


def until(what, seconds: float = 120.0):
    """What a function returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, what.__doc__ or "it took too long"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab of its own, on copies of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks")
    (folder / "studies").symlink_to(NOTEBOOKS.parent / "studies")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR"]
    own = {name: str(folder / name) for name in [*names, "JUPYTERLAB_WORKSPACES_DIR"]}
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder}"]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:

            def answers():
                """JupyterLab does not answer"""
                assert server.poll() is None, (folder / "log").read_text()
                try:
                    return urlopen(f"{address}/api", timeout=2).status == 200
                except (URLError, OSError):
                    return False

            until(answers)
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture
def run_all(lab, browse):
    """Opens a notebook in a browser and runs all of its cells."""

    def run(name: str, seconds: float = 300.0):
        browser = browse(1400, 1300, checked=False)  # JupyterLab itself is not held to it
        browser.open(f"{lab}/lab/tree/notebooks/{name}.ipynb?reset")

        def idle():
            """the kernel is busy"""
            return browser.driver.execute_script(
                f"const panel = {APP}?.shell.currentWidget;"
                "return panel?.sessionContext?.session?.kernel?.status === 'idle'"
            )

        def ran():
            """not all cells have run"""
            cells = browser.driver.execute_script(CELLS)
            assert [cell["errors"] for cell in cells if cell["errors"]] == []
            return all(cell["count"] for cell in cells) and idle()

        until(idle)
        browser.driver.execute_script(
            f"const cells = {APP}.shell.currentWidget.content.widgets;"
            "for (const cell of cells) cell.model.clearExecution?.();"
            f"{APP}.commands.execute('notebook:run-all-cells')"
        )
        until(ran, seconds)
        return browser

    return run


@pytest.fixture
def pictures(tmp_path):
    """Where screenshots go."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_tour_runs(run_all, pictures):
    browser = run_all("00_tour")
    counts = [cell["count"] for cell in browser.driver.execute_script(CELLS)]
    assert counts == sorted(counts)
    images = browser.js(
        f"return {APP}.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code')"
        ".flatMap(c => c.model.outputs.toJSON()).filter(out => out.data?.['image/png']).length"
    )
    assert images == 2
    assert browser.picture(pictures / "lab_00.png").stat().st_size > 10_000


def test_a_slider_of_the_explorer_moves_text_and_curve(run_all, pictures):
    browser = run_all("04_explorer")
    until(lambda: browser.all(".moe-explorer .tokens span"))
    browser.picture(pictures / "lab_04.png")

    def state():
        return browser.js(
            "const root = document.querySelector('.moe-explorer');"
            "return [root.querySelector('.summary').textContent,"
            " root.querySelector('.tokens').outerHTML, root.querySelector('.damage svg').outerHTML]"
        )

    before = state()
    browser.js(
        "const slider = document.querySelector('.moe-explorer input[type=range]');"
        "slider.value = Number(slider.value) > Number(slider.min) ? slider.min : slider.max;"
        "slider.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    until(lambda: all(a != b for a, b in zip(before, state(), strict=True)), 30)
    browser.picture(pictures / "lab_04_moved.png")
