"""README.md and docs/: what they name is there, and what they tell users to type works.

Their commands are run in order in an empty directory, where quick.toml is a tiny study and "stdlib"
a tiny corpus; training is cut short by options behind its own.
"""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import analysis
import cartmoe.hf
from analysis.__main__ import app as analysis_app
from cartmoe import FAMILIES, PRESETS, ModelConfig
from cartmoe.__main__ import app as cartmoe_app
from cartmoe.corpora import CORPORA, open_source

from .tiny import MODEL, tiny_study, write_corpus

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# In the order in which code goes on from what stands before.
PAGES = ["studies", "tasks", "pretrained", "larger", "perturbations", "overlap", "families"]
PAGES += ["numbers", "faq"]
DOCS = {page: (ROOT / "docs" / f"{page}.md").read_text() for page in PAGES}
TEXT = "\n".join([README, *DOCS.values()])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
SPANS = re.findall(r"`([^`]+)`", PROSE)
APPS = {"cartmoe": cartmoe_app, "analysis": analysis_app}
SHORT = [
    "--steps=2",
    "--batch-size=2",
    "--length=32",
    *(f"--set={k}={v}" for k, v in MODEL.items()),
]


def load_script(path):
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands():
    """Every `python -m ...` of ours, in order, as words, also those in comments."""
    lines = [line for _, block in BLOCKS for line in block.splitlines()]
    shown = [part for line in lines for part in re.split(r"\s#|: ", line)]
    ours = [part for part in shown if part.startswith("python -m ")]
    return [shlex.split(part.partition(" > ")[0])[2:] for part in ours]


def first_column(page):
    """Names in a page's table."""
    return re.findall(r"^\| (`.*?`) \|", DOCS[page], re.MULTILINE)


# What is named is there, and what is there is named ----------------------------------------------


def test_every_page_is_linked_and_read():
    assert sorted(PAGES) == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    assert [page for page in PAGES if f"(docs/{page}.md)" not in README] == []
    linked = re.findall(r"\]\((\w+\.md)\)", "".join(DOCS.values()))
    assert [page for page in linked if not (ROOT / "docs" / page).exists()] == []


def test_families_and_presets():
    assert first_column("families") == [f"`{family}`" for family in FAMILIES]
    presets = re.search(r"^Presets (.*?);", DOCS["families"], re.MULTILINE)[1]
    assert presets == ", ".join(f"`{preset}`" for preset in PRESETS)


def test_tables_say_what_the_dicts_say():
    tables = load_script(ROOT / "docs" / "tables.py")
    found = [
        name for page in tables.PAGES for _, name, _ in tables.MARKED.findall(page.read_text())
    ]
    assert sorted(found) == sorted(tables.TABLES)
    for page in tables.PAGES:
        assert tables.filled(page.read_text()) == page.read_text(), "python docs/tables.py"
    for name in (*analysis.PERTURBATIONS, *analysis.METRICS):
        assert f"| `{name}` |" in README
    emptied = tables.MARKED.sub(r"\1\3", README)
    assert tables.filled(emptied) == README != emptied


@pytest.mark.parametrize("package", APPS)
def test_every_command_is_shown(package):
    shown = {words[1] for words in commands() if words[0] == package}
    there = APPS[package].registered_commands
    assert shown == {command.name or command.callback.__name__ for command in there}


def test_make_targets():
    code = [*SPANS, *(block for _, block in BLOCKS)]
    named = {target for text in code for target in re.findall(r"\bmake ([a-z][\w-]*)", text)}
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"study", "test", "bench", "lab"} <= named <= targets


def test_the_tree_exists():
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    (tree,) = [block for block in blocks if "cartmoe/ " in block]
    folders, paths = [ROOT], []  # the last one of each depth
    for line in tree.splitlines():
        names = re.findall(r"(?<![\w/.])[\w-]+(?:\.py|/)(?=[\s,]|$)", line)
        depth = (len(line) - len(line.lstrip())) // 2
        paths += [folders[depth] / name for name in names]
        folders[depth + 1 :] = [folders[depth] / names[0]]
    assert len(paths) > 90
    assert [path for path in paths if not path.exists()] == []


def test_files_in_the_text_exist():
    words = [word for span in SPANS for word in span.split()]
    named = [word for word in words if re.fullmatch(r"\w[\w/.-]*\.(toml|md|ipynb|yml|py)", word)]
    assert "studies/paper.toml" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_pictures_exist_and_are_told():
    assert len(re.findall(r'<img [^>]*alt="[^"]{30,}', README)) == README.count("<img ")
    pictures = re.findall(r'<img src="([^"]+)"', README)
    assert sorted(pictures) == sorted(f"gallery/{p.name}" for p in (ROOT / "gallery").iterdir())


def test_names_of_the_packages_exist():
    for span in SPANS:
        package, *names = span.split(".")
        if package in ("an", "cartmoe") and all(name.isidentifier() for name in names):
            found = {"an": analysis, "cartmoe": cartmoe}[package]
            for name in names:
                found = getattr(found, name)
        elif span.startswith("ModelConfig."):
            assert isinstance(eval(span, {"ModelConfig": ModelConfig}), ModelConfig)


def test_the_other_name_of_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "`cartmoe-study`" in DOCS["studies"]
    assert scripts["cartmoe-study"] == "analysis.__main__:app"


# What is shown works -----------------------------------------------------------------------------


def write_reference(folder):
    """What the authors' code saves."""
    folder.mkdir()
    with safe_open(ROOT / "tests/goldens/cartesian_shared.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("w.")]  # noqa: SIM118
        weights = {name.removeprefix("w."): file.get_tensor(name) for name in names}
        (folder / "config.json").write_text(file.metadata()["config"])
    save_file(weights, folder / "model.safetensors")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The reader's, with what the commands need."""
    directory = tmp_path_factory.mktemp("readme")
    corpus = write_corpus(directory / "corpus")
    (directory / "studies").mkdir()
    families = ["dense", "smoe_share", "cartesian"]
    (directory / "studies" / "quick.toml").write_text(tiny_study(families=families))
    write_reference(directory / "AUTHORS_DIR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTMOE_CACHE", str(directory / "cache"))
        patch.setitem(CORPORA, "stdlib", lambda: open_source(corpus))
        patch.chdir(directory)
        task = next(block for _, block in BLOCKS if "tasks/lines.yaml" in block)
        exec(task.partition("answers =")[0], {})  # the files that a command reads
        yield directory


@pytest.fixture(scope="module")
def printed(directory):
    """What each command printed; they go on from each other."""
    printed = {}
    for package, *words in commands():
        more = SHORT if words[0] == "train" else []
        result = CliRunner().invoke(APPS[package], [*words, *more])
        assert result.exit_code == 0, f"{words}: {result.stderr}"
        printed[" ".join(words)] = result.stdout
    return printed


def test_commands(printed, directory):
    assert len(printed) == 15
    assert "DropTop(1)" in next(text for words, text in printed.items() if words[:4] == "eval")
    assert re.search(r"^step +2$", printed["info runs/mine"], re.MULTILINE)
    assert "cartesian" in printed["import AUTHORS_DIR --out DIR"]
    dry, run = (text for words, text in printed.items() if words.startswith("run "))
    assert "cells" in dry
    assert "Routing robustness" in run
    assert "Everything is in runs/quick" in run
    assert printed["summarize runs/quick"].strip() in run
    assert all((directory / line.strip()).is_file() for line in re.findall(r"^  .*\.p\w\w$", run))


def test_the_same_command_again_is_finished(printed):
    words = next(words for words in commands() if "train" in words)
    result = CliRunner().invoke(cartmoe_app, [*words[1:], *SHORT])
    assert result.exit_code == 0
    assert "is finished" in result.stdout


def test_python(printed, directory):
    scope = {}
    before = torch.get_rng_state()
    snippets = [block for kind, block in BLOCKS if kind == "python"]
    first, *_ = snippets
    exec(compile(first, "README.md", "exec"), scope)
    assert torch.equal(torch.get_rng_state(), before)  # no global seed
    assert len(scope["results"].table()) > 0
    assert {"DropTop(1)", "DropTop(2)", "DropTop(3)"} <= set(
        scope["results"].damage(full=True).label
    )
    assert (directory / "damage.pdf").is_file()
    for snippet in snippets[1:]:
        exec(compile(snippet, "README.md", "exec"), scope)
    assert len(scope["comparison"].damage_difference()) > 0


def test_commands_are_found():
    """As they are written today, so that a change of form does not lose one."""
    assert [" ".join(words[:2]) for words in commands()] == [
        "cartmoe train",
        "cartmoe info",
        "cartmoe info",
        "cartmoe import",
        "analysis run",
        "analysis run",
        "analysis summarize",
        "analysis plot",
        "analysis report",
        "analysis export",
        "analysis record",
        "analysis overlap",
        "analysis models",
        "analysis schema",
        "analysis eval",
    ]
