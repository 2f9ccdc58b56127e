"""The arrows of the import graph that must never exist, read from the source, not by importing.

An import counts wherever it stands (also inside a function) and through whatever modules it goes,
except under `if TYPE_CHECKING:`. That importing a.b also runs a/__init__.py does not count: a
package's __init__ may gather all of it.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cartmoe", "analysis")

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
    # Overlap sees adapters' protocol and tensors, never a model class.
    "analysis.overlap": [
        "cartmoe.model",
        "cartmoe.hf",
        "analysis.adapters.cartmoe",
        "analysis.adapters.transformers",
    ],
    "analysis.perturb": ["analysis.study"],
}
# Who may import transformers.
ONLY = {"transformers": {"cartmoe.hf", "analysis.adapters.transformers"}}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def runtime_nodes(tree: ast.AST):
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes = node.orelse
        else:
            nodes = [node]
        for kept in nodes:
            yield kept
            yield from runtime_nodes(kept)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module of the source tree -> the modules that it names in imports, of the tree or not."""
    files = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = found = set()
        for node in runtime_nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                name = "." * node.level + (node.module or "")
                base = importlib.util.resolve_name(name, package)
                for alias in node.names:  # a submodule, or something that the module defines
                    submodule = f"{base}.{alias.name}"
                    found.add(submodule if submodule in files else base)
    return graph


def violations(graph: dict[str, set[str]]) -> list[str]:
    """The forbidden arrows, each as the way that it takes."""
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


def test_forbidden_arrows_do_not_exist():
    graph = import_graph(ROOT)
    assert "cartmoe.routing" in graph["cartmoe.hooks"]  # the graph is not empty by mistake
    assert violations(graph) == []


GOOD = {
    "cartmoe/__init__.py": "from cartmoe.model import LanguageModel",
    "cartmoe/routing.py": "import torch",
    "cartmoe/model.py": "from cartmoe.routing import Router",
    "cartmoe/hooks.py": "from cartmoe import model",
    "cartmoe/hf.py": "import transformers",
    "analysis/__init__.py": "from analysis import plots, study",
    "analysis/plots/__init__.py": "from analysis.plots.damage import damage_curve",
    "analysis/plots/damage.py": "from typing import TYPE_CHECKING\nimport matplotlib.pyplot\n"
    "if TYPE_CHECKING:\n    from analysis.study import Results",
    "analysis/study.py": "import torch\nfrom analysis.perturb import DropTop",
    "analysis/perturb.py": "from cartmoe.hooks import hook_routers",
    "analysis/overlap/usage.py": "from cartmoe.routing import Routing",
    "analysis/adapters/transformers.py": "from transformers import AutoModel",
}


def write_tree(root: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    return root


def test_what_is_allowed_is_allowed(tmp_path):
    assert violations(import_graph(write_tree(tmp_path, GOOD))) == []


@pytest.mark.parametrize(
    ("file", "source", "way"),
    [
        ("cartmoe/routing.py", "import analysis", "cartmoe.routing -> analysis"),
        ("cartmoe/data.py", "from analysis.study import run", "cartmoe.data -> analysis.study"),
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
            "from ..study import Results",
            "analysis.plots.damage -> analysis.study -> torch",
        ),
        (
            "analysis/stats.py",
            "try:\n    from cartmoe import ModelConfig\nexcept ImportError:\n    pass",
            "analysis.stats -> cartmoe",
        ),
        (
            "analysis/overlap/usage.py",
            "from cartmoe import Routing",
            "analysis.overlap.usage -> cartmoe -> cartmoe.model",
        ),
        (
            "analysis/overlap/usage.py",
            "from analysis.adapters.transformers import adapt",
            "analysis.overlap.usage -> analysis.adapters.transformers",
        ),
        ("analysis/perturb.py", "from analysis import study", "analysis.perturb -> analysis.study"),
        ("analysis/study.py", "import transformers", "analysis.study -> transformers"),
        (
            "cartmoe/data.py",
            "from transformers.models import olmoe",
            "cartmoe.data -> transformers.models",
        ),
    ],
)
def test_each_forbidden_arrow_is_found(tmp_path, file, source, way):
    graph = import_graph(write_tree(tmp_path, GOOD | {file: source}))
    assert way in violations(graph)
