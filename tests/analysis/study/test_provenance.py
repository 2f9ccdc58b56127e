"""What a cell's identity holds: whatever can change a bit of it, so that no cell is taken for
another one's."""

import importlib
import importlib.util
import linecache
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.adapters.load import load
from analysis.perturb.trace import Trace
from analysis.study import provenance as identity
from analysis.study.models import find
from analysis.study.plan import Plan
from analysis.study.study import Study
from cartmoe.checkpoint import load as load_checkpoint
from cartmoe.checkpoint import read_meta, save
from cartmoe.data import prepare, sequences

OWN = """
from dataclasses import dataclass
from analysis.perturb import Perturbation

@dataclass(frozen=True)
class Own(Perturbation):
    def __call__(self, logits_TE, ctx):
        return logits_TE{change}
"""
CONDITIONS = [
    {"perturbation": "DropTop", "m": 1},
    {"perturbation": "GaussianNoise", "sigma": 0.5},
    {"perturbation": "own_perturbation:Own"},
]


class World:
    """A study of one model, and all that it is made of, to be changed."""

    def __init__(self, folder: Path, checkpoint: Path, texts: Path):
        self.folder, self.model, self.texts = folder, folder / "model", folder / "texts"
        shutil.copytree(checkpoint, self.model)
        shutil.copytree(texts, self.texts)
        self.threads, self.edit = 1, lambda plan: None
        self.write_own("")
        self.record("a")
        self.sections = {
            "data": {"length": 32, "documents": 4, "max_tokens": 64, "shard": 3,
                     "corpus": str(self.texts)},
            "models": [{"path": str(self.model), "name": "m"}],
            "measure": {"batch_size": 2, "calibration": 2},
            "conditions": [*CONDITIONS, {"perturbation": "Replay", "trace": str(folder / "trace")},
                           {"perturbation": "GateSwap", "checkpoint": str(self.model)}],
        }  # fmt: skip

    def write_own(self, change: str) -> None:
        (self.folder / "own_perturbation.py").write_text(OWN.format(change=change))
        linecache.clearcache()
        sys.modules.pop("own_perturbation", None)
        importlib.invalidate_caches()

    def record(self, name: str, change: float = 0.0) -> None:
        """Another recording in the trace's place."""
        model: Any = load(self.model)
        with torch.no_grad():
            for site in model.sites():
                model.router(site).gate.weight[0] += change
        docs = sequences(prepare(self.texts), 32, limit=4, max_tokens_per_document=64)
        shutil.rmtree(self.folder / "trace", ignore_errors=True)
        Trace.record(model, docs, self.folder / "trace", progress=False)

    def rewrite_model(self) -> None:
        """One weight of the checkpoint in its last bit."""
        model, meta = load_checkpoint(self.model), read_meta(self.model)
        with torch.no_grad():
            weight = model.head.weight
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        shutil.rmtree(self.model)
        save(model, self.model, meta)

    def cells(self) -> dict:
        """(shard, condition without its own identity) -> (key, identity)."""
        study = Study.from_dict(self.sections)
        plan = Plan.of(study, self.threads)
        self.edit(plan)
        (checkpoint,) = [
            find(study, spec, plan.text(spec).corpus, self.folder) for spec in study.models
        ]
        return {
            (cell.shard, cell.condition.perturbation.label): cell
            for cell in plan.work(checkpoint).cells
        }


@pytest.fixture
def world(tmp_path, checkpoint_of, texts, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield World(tmp_path, checkpoint_of("smoe_share"), texts)
    sys.modules.pop("own_perturbation", None)


# What is changed -> (how, fields of the identity that differ then, which conditions it spares).
PERTURBED = {"DropTop", "GaussianNoise", "Own", "Replay(trace)", "GateSwap(model)"}


def section(name, **changes):
    def change(world, patch):
        world.sections[name] |= changes

    return change


def condition(number, **changes):
    def change(world, patch):
        world.sections["conditions"][number] |= changes

    return change


def edit(sequences_of):
    """One token of the first of the sequences that the plan has."""

    def change(world, patch):
        world.edit = lambda plan: sequences_of(plan).tokens_SL[0, 3].add_(1)

    return change


def more_conditions(world, patch):
    """So many that begin at one site that their outputs are reused."""
    more = {"perturbation": "DropTop", "where": "layer 0", "eval_seed": list(range(1, 40))}
    world.sections["conditions"].append(more)
    world.sections["conditions"].append({"perturbation": "GaussianNoise", "sigma": 0.7})


CHANGES = {
    "threads": (lambda w, p: setattr(w, "threads", 2), {"threads"}, set()),
    "batch size": (section("measure", batch_size=3), {"batch_size", "calibration"}, set()),
    "precision": (section("measure", precision="bf16"), {"precision"}, set()),
    "tokens kept": (section("measure", tokens=True), {"keep_tokens"}, set()),
    "calibration": (section("measure", calibration=3), {"calibration"}, {"clean"}),
    "length": (section("data", length=33), {"data", "calibration"}, set()),
    "tokens a document": (section("data", max_tokens=63), {"data", "calibration"}, set()),
    "calibration document": (
        edit(lambda plan: plan.texts[None].calibration),
        {"calibration"},
        {"clean"},
    ),
    "weight": (lambda w, p: w.rewrite_model(), {"model", "condition"}, set()),
    "torch": (lambda w, p: p.setattr(torch, "__version__", "9.9"), {"torch"}, set()),
    "capability": (
        lambda w, p: p.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9"),
        {"cpu_capability"},
        set(),
    ),
    "device": (
        lambda w, p: (
            p.setattr("analysis.study.plan.default_device", lambda: "cuda"),
            p.setattr(torch.cuda, "get_device_name", lambda device: "H100"),
        ),
        {"device", "threads", "cpu_capability"},
        set(),
    ),
    "products": (
        lambda w, p: p.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
        {"matmul_precision"},
        set(),
    ),
    "source": (
        lambda w, p: p.setattr(identity, "source_sha256", lambda: "0" * 64),
        {"source"},
        set(),
    ),
    "m": (condition(0, m=2), {"condition"}, {"clean"} | PERTURBED - {"DropTop"}),
    "where": (condition(0, where="layer 0"), {"condition"}, {"clean"} | PERTURBED - {"DropTop"}),
    "point": (condition(0, point="scores"), {"condition"}, {"clean"} | PERTURBED - {"DropTop"}),
    "effect": (
        condition(0, effect="selection"),
        {"condition"},
        {"clean"} | PERTURBED - {"DropTop"},
    ),
    "downstream": (
        condition(0, downstream="replay"),
        {"condition"},
        {"clean"} | PERTURBED - {"DropTop"},
    ),
    "sigma": (
        condition(1, sigma=0.5000000001),
        {"condition"},
        {"clean"} | PERTURBED - {"GaussianNoise"},
    ),
    "seed": (condition(1, eval_seed=1), {"condition"}, {"clean"} | PERTURBED - {"GaussianNoise"}),
    "own source": (
        lambda w, p: w.write_own(" + 0"),
        {"condition"},
        {"clean"} | PERTURBED - {"Own"},
    ),
    "trace": (
        lambda w, p: w.record("b", change=0.5),
        {"condition"},
        {"clean"} | PERTURBED - {"Replay(trace)"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_wrong_hit(world, name, monkeypatch):
    """After a change no finished cell is taken for one that it touches; what it does not touch
    keeps its key."""
    change, fields, spared = CHANGES[name]
    before = world.cells()
    assert before == world.cells()
    change(world, monkeypatch)
    after = world.cells()
    assert after.keys() == before.keys()
    finished = {cell.key for cell in before.values()}
    for (shard, label), cell in after.items():
        assert (cell.key in finished) == (label in spared), (shard, label)
        old = before[shard, label].identity
        differing = {field for field in old if old[field] != cell.identity[field]}
        assert differing <= fields
        assert bool(differing) == (label not in spared)


def test_every_field_was_changed(world):
    """But the tokenizer, which no change leaves the data as they are."""
    cells = world.cells().values()
    fields = {field for cell in cells for field in cell.identity}
    changed = set().union(*(fields for _, fields, _ in CHANGES.values()))
    assert fields == changed | {"tokenizer", "reuses"}


def test_an_edited_document(world, monkeypatch):
    """Only its own shard is measured again."""
    before = world.cells()
    edit(lambda plan: plan.texts[None].shards[1])(world, monkeypatch)
    for place, cell in world.cells().items():
        assert (cell.key == before[place].key) == (place[0] != 1)


def test_another_shard_size(world):
    """The last shard may be the same by chance: here it has two sequences, with both sizes."""
    before = {cell.key for cell in world.cells().values()}
    world.sections["data"]["shard"] = 2
    after = world.cells()
    assert max(shard for shard, _ in after) == 3
    assert all((cell.key in before) == (shard == 3) for (shard, _), cell in after.items())


def test_the_tokenizer(world, monkeypatch):
    """Of the same tokens, but other kinds of them."""
    before = {cell.key for cell in world.cells().values()}
    monkeypatch.setattr("cartmoe.tokenizers.ByteTokenizer.identity", "other")
    monkeypatch.setattr("analysis.study.models._check_tokens", lambda *arguments: None)
    assert not before & {cell.key for cell in world.cells().values()}


def test_a_table_of_experts(world):
    """Whether a condition has one depends on the others of the study: then it is another cell."""
    before = world.cells()
    more_conditions(world, None)
    after = world.cells()
    touched = {label for (_, label), cell in after.items() if cell.reuses}
    assert touched & {label for _, label in before}
    for place, cell in before.items():
        assert (after[place].key == cell.key) == (after[place].reuses == cell.reuses)


# ---- the source files


def test_every_source_file_counts(tmp_path, monkeypatch):
    for package in ("cartmoe", "analysis"):
        shutil.copytree(identity.ROOT / package, tmp_path / package)
    monkeypatch.setattr(identity, "ROOT", tmp_path)

    def sha256():
        identity.source_sha256.cache_clear()
        return identity.source_sha256()

    try:
        seen = [sha256()]
        for name in identity.COMPUTES:
            place = tmp_path / name
            for path in sorted(place.glob("*.py")) or [place.with_suffix(".py")]:
                path.write_bytes(path.read_bytes() + b"\n")
                seen.append(sha256())
        assert len(set(seen)) == len(seen) > 30
        (tmp_path / "analysis" / "report" / "text.py").write_text("# another")
        assert sha256() == seen[-1]
    finally:
        identity.source_sha256.cache_clear()


# Modules that what computes a cell imports, and that change no bit of it: what reads weights and
# documents that are checked by their hashes, what checks values, what plans, what names, what
# hands over.
NOT_COMPUTING = {
    "cartmoe.cards",
    "analysis.stats.bootstrap",
    "analysis.stats.columns",
    "analysis.stats.pairs",
    "analysis.study.provenance",
    "cartmoe.checkpoint",
    "cartmoe.corpora",
    "cartmoe.factorial",
    "cartmoe.fields",
    "cartmoe.data",
    "cartmoe.duplicates",
    "cartmoe.files",
    "cartmoe.folders",
    "cartmoe.sealed",
    "cartmoe.foreign",
    "cartmoe.text_files",
    "cartmoe.interrupt",
    "cartmoe.reference",
    "cartmoe.shipped",
    "cartmoe.skeleton",
    "cartmoe.tokenized",
}


def test_what_computes_is_known():
    """By the import graph: a new module must be put into `COMPUTES`, or among those that do not."""
    path = Path(__file__).parents[2] / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", path)
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    graph = architecture.import_graph(architecture.ROOT)
    reached, queue = set(), ["analysis.study.worker"]
    while queue:
        module = queue.pop()
        ours = module.split(".")[0] in ("analysis", "cartmoe") and "." in module
        if ours and module in graph and module not in reached:
            reached.add(module)
            queue += graph[module]
    computing = {name.replace("/", ".") for name in identity.COMPUTES}
    others = {m for m in reached if not any(architecture.within(m, c) for c in computing)}
    assert others <= NOT_COMPUTING
