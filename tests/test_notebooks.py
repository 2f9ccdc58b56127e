"""Notebooks tell stories: little logic, no internals, stored with their pictures and without error.

That they run is tested by nbmake, which collects them, on a few documents (`DOCUMENTS`).
"""

import ast
import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from analysis import plots

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {name for name in dir(plots) if name.islower()} - {"paper_style", "save"}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if "outputs" in cell]


def faults(source):
    """What a cell should not have."""
    found = []
    for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*$", "", source))):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 6:
            found.append(f"{node.name} is longer than six lines")
        names = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        parts = [part for name in names for part in name.split(".")]
        found += [f"{part} is internal" for part in parts if re.match(r"_(?!_)", part)]
    return found


def assert_executed(cells):
    """All cells from top to bottom, in one go, without error or warning, each picture shown."""
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        outputs = cell["outputs"]
        problems = [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
        assert problems == [], cell["source"]
        drawn = re.findall(r"\.plots\.(\w+)\(", cell["source"])
        shown = [o for o in outputs if "image/png" in o.get("data", {})]
        assert len(shown) == sum(name in PICTURES for name in drawn), cell["source"]


def test_there_are_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) == 6


@every_notebook
def test_no_logic_and_no_internals(path):
    assert [fault for cell in code_cells(path) for fault in faults(cell["source"])] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n" + "    x = 1\n" * 5, []),
        ("def f():\n" + "    x = 1\n" * 6, ["f is longer than six lines"]),
        ("from analysis.run import _paired", ["_paired is internal"]),
        ("import analysis._x as x", ["_x is internal"]),
        ("%time 1\nresults._x()", ["_x is internal"]),
        ("an.__version__\n_ = 1", []),
    ],
)
def test_faults_are_found(source, found):
    assert faults(source) == found


@every_notebook
def test_it_is_stored_as_executed(path):
    assert_executed(code_cells(path))


@every_notebook
def test_it_is_small(path):
    assert path.stat().st_size < 1.5e6


ONCE = """
import pandas as pd, analysis as an
rows = [
    dict(model="smoe", family="smoe", train_seed=0, name="GaussianNoise", strength=s, where="all",
         perturbation="GaussianNoise", point="logits", effect="full", downstream="reroute",
         label=f"GaussianNoise({s})", delta_nats=s, low=s - .1, high=s + .1, mass_moved=s, flips=s,
         output_change=s, num_documents=30)
    for s in (.1, .2, .4)
]
damage = pd.DataFrame(rows)
---
an.plots.damage_curve(damage, "GaussianNoise")
---
an.plots.dose_panels(damage, "GaussianNoise")
---
figure = an.plots.dose_panels(damage, "GaussianNoise")
---
figure
---
for _ in range(2):
    an.plots.dose_panels(damage, "GaussianNoise")
---
an.plots.dose_panels(damage, "GaussianNoise")
None
---
ax = an.plots.damage_curve(damage, "GaussianNoise")
ax
"""


def test_pictures_are_shown_once(monkeypatch):
    """Where they are a cell's last line, where they are not, and where they are asked for again."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has its own
    cells = [nbformat.v4.new_code_cell(source) for source in ONCE.split("---\n")]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    shown = [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in book.cells]
    assert shown == [0, 1, 1, 1, 1, 2, 1, 1]
    assert not any(
        "Axes" in str(o.get("data", {}).get("text/plain")) for c in book.cells for o in c.outputs
    )
