"""The house and its arrows, read from the source, not by importing.

An import counts wherever it stands, also inside a function or for a type checker alone, and through
whatever modules it goes. A name that a package's __init__ only hands on counts as an import of the
module that defines it: a package's __init__ may gather all of it.
"""

import ast
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cartmoe", "analysis")

# A room imports only rooms that stand before it.
ROOMS = ["stats", "plots", "adapters", "perturb", "measure", "overlap.metrics", "overlap", "study"]
ROOMS += ["tasks", "report", "explorer"]
APART = {("overlap", "study"), ("adapters", "plots"), ("perturb", "plots"), ("measure", "plots")}
APART |= {("overlap", "plots"), ("overlap.metrics", "plots"), ("study", "plots")}
LONGEST = 250  # lines of a file

# What must not be reached from a module or package, by any way.
NEVER = {
    "cartmoe": ["analysis"],
    # The model must not know that it is observed.
    "cartmoe.routing": ["cartmoe.hooks"],
    "cartmoe.experts": ["cartmoe.hooks"],
    "cartmoe.ffn": ["cartmoe.hooks"],
    "cartmoe.model": ["cartmoe.hooks"],
    # Tables in, tables or pictures out.
    "analysis.plots": ["torch", "cartmoe"],
    "analysis.stats": ["torch", "cartmoe"],
    # Metrics see adapters' protocol and tensors, never a model class.
    "analysis.overlap.metrics": [
        "cartmoe.model",
        "cartmoe.hf",
        "analysis.adapters.cartmoe",
        "analysis.adapters.transformers",
    ],
    "analysis.perturb": ["analysis.study"],
}
# Who may import what comes with an extra.
ONLY = {
    "transformers": {
        *(f"cartmoe.hf{name}" for name in ("", ".config", ".model", ".export")),
        *("analysis.adapters.pretrained", "analysis.adapters.shelf", "analysis.adapters.shape"),
    },
    "anywidget": {"analysis.explorer.widget"},
    "lm_eval": {"analysis.tasks.harness", "analysis.tasks.loaded"},
}


class Import(NamedTuple):
    """`from base import name`, or `import base`, in the source of a module."""

    module: str
    base: str
    name: str | None


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def files_of(root: Path) -> dict[str, list[Path]]:
    """Module -> its files: of a package that imports when asked, the stub with its names too."""
    files: dict[str, list[Path]] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py*")):
            if path.suffix in (".py", ".pyi"):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                files.setdefault(name, []).append(path)
    return files


def imports_of(root: Path) -> list[Import]:
    """Every import of the source tree."""
    found = []
    for module, paths in files_of(root).items():
        for path in paths:
            package = module if path.stem == "__init__" else module.rpartition(".")[0]
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found += [Import(module, alias.name, None) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    name = "." * node.level + (node.module or "")
                    base = importlib.util.resolve_name(name, package)
                    found += [Import(module, base, alias.name) for alias in node.names]
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module of the source tree -> the modules that it imports from, of the tree or not."""
    modules, imports = set(files_of(root)), imports_of(root)
    given = {(i.module, i.name): i.base for i in imports if i.name}

    def defines(base: str, name: Any) -> str:
        """The module of the tree that a name comes from, through those that hand it on."""
        seen: set[str] = set()
        while base not in seen:
            seen.add(base)
            if name and f"{base}.{name}" in modules:
                return f"{base}.{name}"
            if given.get((base, name)) in modules:
                base = given[base, name]
        return base

    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, base, name in imports:
        graph[module].add(defines(base, name))
    return graph


def room_of(module: str) -> str | None:
    """Of a module of analysis, "" of the root; None elsewhere."""
    if not within(module, "analysis"):
        return None
    inside = module.removeprefix("analysis").removeprefix(".")
    return next((room for room in ROOMS if within(inside, room)), "")


def forbidden(graph: dict[str, set[str]]) -> list[str]:
    """Arrows that must never exist, each as the way that it takes."""
    found = []
    for source, targets in NEVER.items():
        for start in (module for module in graph if within(module, source)):
            ways = {start: start}
            queue = [start]
            for module in queue:  # grows while it is read
                for name in sorted(graph.get(module, ())):
                    if name not in ways:
                        ways[name] = f"{ways[module]} -> {name}"
                        queue.append(name)
            found += [ways[m] for m in ways if any(within(m, target) for target in targets)]
    for target, importers in ONLY.items():
        found += [
            f"{module} -> {name}"
            for module, names in graph.items()
            for name in sorted(names)
            if within(name, target) and module not in importers
        ]
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Arrows from a room to one that does not stand below it, and to the root."""
    order = {room: number for number, room in enumerate((*ROOMS, ""))}
    found = []
    for module, names in graph.items():
        for name in sorted(names):
            a, b = room_of(module), room_of(name)
            if a is None or b is None or a == b:
                continue
            if order[b] > order[a] or (a, b) in APART or (b, a) in APART:
                found.append(f"{module} -> {name}")
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other, by whatever way: those from which one comes back."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, queue = set(), list(graph[start])
        while queue:
            module = queue.pop()
            if module not in seen:
                seen.add(module)
                queue += graph.get(module, ())
        reached[start] = seen
    return sorted(module for module, seen in reached.items() if module in seen)


def through_walls(root: Path) -> list[str]:
    """What is imported from another room past what its __init__ names."""
    imports = imports_of(root)
    named = {(i.module, i.name) for i in imports}
    found = []
    for module, base, name in imports:
        room, other = room_of(module), room_of(base)
        if other in (None, "", room):
            continue
        if name is None or base != f"analysis.{other}" or (base, name) not in named:
            found.append(f"{module} -> {base}.{name}" if name else f"{module} -> {base}")
    return found


def at_the_door(root: Path) -> list[str]:
    """What stands at the root of analysis beside its entrances."""
    files = (root / "analysis").glob("*.py*")
    return sorted(path.name for path in files if path.stem not in ("__init__", "__main__"))


def too_long(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: {lines} lines"
        for path in sorted((root / "analysis").rglob("*.py"))
        if (lines := len(path.read_text().splitlines())) > LONGEST
    ]


def violations(root: Path) -> list[str]:
    graph = import_graph(root)
    found = [*forbidden(graph), *upward(graph), *(f"circle: {m}" for m in circles(graph))]
    found += [f"past its door: {way}" for way in through_walls(root)]
    return found + [f"at the root: {name}" for name in at_the_door(root)] + too_long(root)


def test_the_house_stands():
    graph = import_graph(ROOT)
    assert "cartmoe.routing" in graph["cartmoe.hooks"]  # the graph is not empty by mistake
    assert "analysis.perturb.masks" in graph["analysis.measure.sweep"]  # through the room's door
    assert violations(ROOT) == []


def test_tests_mirror_the_rooms():
    """A folder of tests a room, and no file of a room's name among those of another."""
    tests = ROOT / "tests" / "analysis"
    folders = {path.relative_to(tests).as_posix().replace("/", ".") for path in tests.rglob("*/")}
    other = ("__pycache__", "baseline")  # pictures to hold others against
    folders = {name for name in folders if name != "." and not name.endswith(other)}
    assert folders == set(ROOMS)


GOOD = {
    "cartmoe/__init__.py": "from cartmoe.model import LanguageModel",
    "cartmoe/routing.py": "import torch",
    "cartmoe/model.py": "from cartmoe.routing import Router",
    "cartmoe/hooks.py": "from cartmoe import model",
    "cartmoe/hf.py": "import transformers",
    "analysis/__init__.py": "import lazy_loader",
    "analysis/__init__.pyi": "from . import plots\nfrom .study import Study",
    "analysis/__main__.py": "from analysis.study import Study",
    "analysis/stats/__init__.py": "from analysis.stats.pairs import pair",
    "analysis/stats/pairs.py": "import pandas",
    "analysis/plots/__init__.py": "from analysis.plots.damage import damage_curve",
    "analysis/plots/damage.py": "import matplotlib.pyplot\nfrom analysis.stats import pair",
    "analysis/adapters/__init__.py": "from analysis.adapters.base import Adapter\n"
    "from analysis.adapters.cartmoe import adapt",
    "analysis/adapters/base.py": "import torch",
    "analysis/adapters/cartmoe.py": "from cartmoe import LanguageModel",
    "analysis/adapters/pretrained.py": "from transformers import AutoModel",
    "analysis/perturb/__init__.py": "from analysis.perturb.masks import DropTop",
    "analysis/perturb/masks.py": "from cartmoe.hooks import hook_routers\n"
    "from analysis.adapters import Adapter",
    "analysis/measure/__init__.py": "from analysis.measure.shard import measure",
    "analysis/measure/shard.py": "from analysis import stats\nfrom analysis.perturb import DropTop",
    "analysis/overlap/__init__.py": "",
    "analysis/overlap/metrics/__init__.py": "from analysis.overlap.metrics import usage",
    "analysis/overlap/metrics/usage.py": "from cartmoe.routing import Routing\n"
    "from analysis.adapters import Adapter",
    "analysis/study/__init__.py": "from analysis.study.study import Study",
    "analysis/study/study.py": "import torch\nfrom analysis.measure import measure",
    "analysis/report/__init__.py": "",
    "analysis/report/text.py": "from analysis import plots",
}


def write_tree(root: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    return root


def test_what_is_allowed_is_allowed(tmp_path):
    assert violations(write_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("file", "source", "way"),
    [
        ("cartmoe/routing.py", "import analysis", "cartmoe.routing -> analysis"),
        (
            "cartmoe/data.py",
            "from analysis.study.study import run",
            "cartmoe.data -> analysis.study.study",
        ),
        (
            "cartmoe/routing.py",
            "from .hooks import hook_routers",
            "cartmoe.routing -> cartmoe.hooks",
        ),
        ("cartmoe/model.py", "from . import hooks", "cartmoe.model -> cartmoe.hooks"),
        ("cartmoe/ffn.py", "def f():\n    import cartmoe.hooks", "cartmoe.ffn -> cartmoe.hooks"),
        ("analysis/plots/damage.py", "import torch.nn as nn", "analysis.plots.damage -> torch.nn"),
        (
            "analysis/plots/damage.py",
            "from ..study.study import Results",
            "analysis.plots.damage -> analysis.study.study -> torch",
        ),
        (
            "analysis/plots/damage.py",  # through the door of its room
            "from ..study import Study",
            "analysis.plots.damage -> analysis.study.study -> torch",
        ),
        (
            "analysis/stats/pairs.py",
            "try:\n    from cartmoe import ModelConfig\nexcept ImportError:\n    pass",
            "analysis.stats.pairs -> cartmoe",
        ),
        (
            "analysis/overlap/metrics/usage.py",
            "from cartmoe import LanguageModel",
            "analysis.overlap.metrics.usage -> cartmoe.model",
        ),
        (
            "analysis/overlap/metrics/usage.py",
            "from analysis.adapters import adapt",
            "analysis.overlap.metrics.usage -> analysis.adapters.cartmoe",
        ),
        (
            "analysis/perturb/masks.py",
            "from analysis.study import Study",
            "analysis.perturb.masks -> analysis.study.study",
        ),
        ("analysis/study/study.py", "import transformers", "analysis.study.study -> transformers"),
        (
            "cartmoe/data.py",
            "from transformers.models import olmoe",
            "cartmoe.data -> transformers.models",
        ),
        (  # up, for a type checker alone
            "analysis/perturb/masks.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    from analysis.measure import measure",
            "analysis.perturb.masks -> analysis.measure.shard",
        ),
        (
            "analysis/study/study.py",
            "from analysis import plots",
            "analysis.study.study -> analysis.plots",
        ),
        ("analysis/study/study.py", "import analysis", "analysis.study.study -> analysis"),
        (
            "analysis/perturb/masks.py",
            "def f():\n    from analysis.perturb import DropTop",
            "circle: analysis.perturb.masks",
        ),
        (
            "analysis/measure/shard.py",
            "from analysis.perturb.masks import DropTop",
            "past its door: analysis.measure.shard -> analysis.perturb.masks.DropTop",
        ),
        (
            "analysis/measure/shard.py",
            "import analysis.perturb.masks",
            "past its door: analysis.measure.shard -> analysis.perturb.masks",
        ),
        (
            "analysis/measure/shard.py",
            "from analysis.perturb import hidden",
            "past its door: analysis.measure.shard -> analysis.perturb.hidden",
        ),
        (
            "analysis/__init__.pyi",
            "from .study.study import Study",
            "past its door: analysis -> analysis.study.study.Study",
        ),
        ("analysis/tools.py", "", "at the root: tools.py"),
        ("analysis/stats/pairs.py", "x = 1\n" * 251, "analysis/stats/pairs.py: 252 lines"),
    ],
)
def test_each_fault_is_found(tmp_path, file, source, way):
    found = violations(write_tree(tmp_path, GOOD | {file: source}))
    assert way in found


def test_a_circle_of_two_files_is_found(tmp_path):
    sources = {
        "analysis/stats/a.py": "from analysis.stats.b import x",
        "analysis/stats/b.py": "def f():\n    from analysis.stats import a",
    }
    found = violations(write_tree(tmp_path, GOOD | sources))
    assert found == ["circle: analysis.stats.a", "circle: analysis.stats.b"]
