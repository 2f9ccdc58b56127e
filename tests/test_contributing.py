"""CONTRIBUTING.md: each of its diffs applies to the tree, and what it adds works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .tiny import MODEL, tiny_study, write_corpus

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## An? (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
BEGIN = f"""
import sys
import analysis as an
import cartmoe

assert an.__file__.startswith(sys.argv[1]) and cartmoe.__file__.startswith(sys.argv[1])
config = cartmoe.ModelConfig.preset("nano", "smoe", **{MODEL}, num_experts=4, init_std=0.2)
cartmoe.save(cartmoe.LanguageModel(config), "model", {{"tokenizer": "bytes", "train_seed": 0}})
model = an.load("model")
docs = an.documents("corpus", model, length=32, limit=4, max_tokens_per_document=32)
"""
USES = {
    "perturbation": """
from analysis.perturb import perturbation_class
Boost = perturbation_class("Boost")
damage = an.sweep(model, docs, [Boost(0.5), Boost(4.0)], progress=False).damage(full=True)
assert (damage.delta_nats[damage.perturbation == "Boost"] != 0).all()
study = an.Study.read("study.toml")
assert Boost(0.5) in {condition.perturbation for condition in study.conditions}
""",
    "metric": """
overlap = an.measure_overlap(model, docs, ["gate_cosine"], progress=False)
assert set(overlap.pairs.metric) == {"gate_cosine"} and len(overlap.pairs)
an.plots.save(an.plots.overlap_heatmap(overlap, "gate_cosine"), "heatmap")
""",
    "family": """
from cartmoe.__main__ import app
words = "train --family finer_grained --corpus corpus --steps 1 --batch-size 2 --length 32"
settings = [f"--set={name}={value}" for name, value in {}.items()]
app([*words.split(), "--out=run", *settings], standalone_mode=False)
assert an.load("run").model.config.num_experts == 64
""".replace("{}", str(MODEL)),
    "picture": """
results = an.sweep(model, docs, [an.DropTop(1), an.DropTop(2)], progress=False)
ax = an.plots.damage_histogram(results)
assert ax.get_xlabel() and an.plots.save(ax, "histogram")
assert an.plots.damage_histogram(results.damage(full=True), ax) is ax
""",
    "adapter": """
from analysis.adapters import Tempered
losses = [
    an.sweep(m, docs, an.DropTop(1), controls=False, progress=False).clean().nats.item()
    for m in (model, Tempered(model.model, 1.0), Tempered(model.model, 3.0))
]
assert losses[0] == losses[1] != losses[2]
""",
}


@pytest.fixture
def tree(tmp_path):
    """A copy of the packages, with a corpus and a study beside them."""
    for package in ("analysis", "cartmoe"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    own = '\n[[conditions]]\nperturbation = "Boost"\nboost = [0.5, 1.0]\n'
    (tmp_path / "study.toml").write_text(tiny_study(corpus=write_corpus(tmp_path / "corpus")) + own)
    return tmp_path


def in_tree(tree, *command, **options):
    """Run it there; the tree comes first on Python's path, and no repository stands around it."""
    own = dict(PYTHONPATH=str(tree), GIT_CEILING_DIRECTORIES=str(tree.parent))
    own |= dict(CARTMOE_CACHE=str(tree / "cache"))
    options |= dict(cwd=tree, env=os.environ | own, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    return done


def test_every_section_is_used():
    assert list(USES) == list(SECTIONS)


@pytest.mark.parametrize("name", USES)
def test_what_a_diff_adds_works(name, tree):
    (diff,) = re.findall(r"^```diff\n(.*?)^```", SECTIONS[name], re.DOTALL | re.MULTILINE)
    in_tree(tree, "git", "apply", "-", input=diff)
    in_tree(tree, sys.executable, "-W", "error", "-c", BEGIN + USES[name], str(tree))


def test_without_the_diff_it_does_not(tree):
    """What a use needs is not there yet."""
    with pytest.raises(AssertionError, match="damage_histogram"):
        in_tree(tree, sys.executable, "-c", BEGIN + USES["picture"], str(tree))
