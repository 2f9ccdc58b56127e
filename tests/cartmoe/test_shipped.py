"""The trained models that come with the project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import analysis as an
from analysis.measure import measure
from analysis.measure.results import join
from cartmoe.checkpoint import CheckpointError, load, newest, read_meta
from cartmoe.corpora import Document
from cartmoe.data import sequences_from
from cartmoe.shipped import CHECK, MODELS, checked_nats, named_by, shipped, shipped_names
from cartmoe.tokenizers import ByteTokenizer

ROOT = Path(__file__).parents[2]
NAMES = [
    *("dense", "smoe", "smoe_share", "hash", "fine_grained", "top_p"),
    *("cartesian", "parallel", "unshared"),
]
MEGABYTES = 40


def test_all_are_here():
    assert {f"{name}-s0" for name in NAMES} <= set(shipped_names())
    assert sum(f.stat().st_size for f in MODELS.rglob("*") if f.is_file()) < MEGABYTES * 1e6


@pytest.mark.parametrize("name", shipped_names())
def test_each_computes_what_it_did(name):
    text = (MODELS / CHECK).read_text(encoding="utf-8")
    docs = sequences_from([Document("check", "check", "check", text)], ByteTokenizer(), 256)
    model = an.load(name)
    clean = join([(model, measure(model, [], docs))]).clean()
    assert clean.nats.item() == pytest.approx(checked_nats()[name], abs=1e-3)
    assert {p.dtype.itemsize for p in model.model.parameters()} == {4}  # fp32
    assert {p.dtype.itemsize for p in load(name).parameters()} == {2}  # kept in bf16


@pytest.mark.parametrize("name", shipped_names())
def test_what_it_says_of_itself(name):
    meta, found = read_meta(name), an.load(name)
    assert (found.name, found.train_seed) == (meta["model"], meta["train_seed"])
    assert named_by(MODELS / name) == {"name": found.name, "train_seed": found.train_seed}
    assert meta["tokens"] >= 10_000_000
    assert meta["found"]["threads"] == 1
    assert meta["train"]["precision"] == "fp32"
    assert meta["command"] == "make models"
    assert len(meta["groups"]) > 100
    assert (MODELS / name / "curve.csv").stat().st_size < 20_000


@pytest.mark.parametrize("name", shipped_names())
def test_what_is_said_of_it_is_json(name):
    """NaN is none: other readers than Python's refuse it."""
    text = (MODELS / name / "meta.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word))["model"]


def test_all_were_trained_alike():
    """For equally many tokens of one corpus, on machines of one capability."""
    metas = [read_meta(name) for name in shipped_names()]
    for key in ("tokens", "corpus_sha256", "length", "steps"):
        assert len({meta[key] for meta in metas}) == 1, key
    assert len({meta["found"]["cpu_capability"] for meta in metas}) == 1


def test_they_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped("cartesian") == shipped("cartesian-s0") == MODELS / "cartesian-s0"
    assert newest("cartesian") == MODELS / "cartesian-s0"
    assert an.load("dense").identity == an.load("dense-s0").identity
    for wrong in ("cartesian-s99", "../models/dense-s0", "models.csv", "cartesian/"):
        assert shipped(wrong) is None
    with pytest.raises(FileNotFoundError, match=r"cartesain is no directory.*; .*cartesian-s0"):
        an.load("cartesain")
    (tmp_path / "cartesian").mkdir()
    with pytest.raises(CheckpointError, match="cartesian holds no checkpoint of this project"):
        an.load("cartesian")  # a path of one's own goes first


def test_the_list():
    table = an.models()
    assert table["name"].tolist() == shipped_names()
    routed = table[table.family != "dense"]
    assert routed[["random_routing", "drop_top"]].notna().all(axis=None)
    command = [sys.executable, "-m", "analysis", "models"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert all(name in said for name in shipped_names())
    assert "gzip -9" in said
    assert "another training run is not in them" in said


def test_documents_that_it_was_trained_on_are_withheld():
    model = an.load("cartesian")
    docs = an.documents("stdlib", model, length=64, limit=40, max_tokens_per_document=64)
    assert not set(docs.document_id) & set(read_meta("cartesian")["groups"])
    with pytest.warns(UserWarning, match="cartesian was trained on documents of 'stdlib'"):
        an.documents("stdlib", model, length=64, limit=4, split="train")


def test_in_a_study():
    table = {
        "models": [{"path": "cartesian"}, {"path": "dense-s0", "name": "mine"}],
        "conditions": [{"perturbation": "DropTop"}],
    }
    models = an.Study.from_dict(table).models
    assert [(m.name, m.train_seed) for m in models] == [("cartesian", 0), ("mine", 0)]


def test_from_a_wheel(tmp_path):
    """As package data, where nothing of the checkout is."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", place, built], check=True)
    script = (
        "import cartmoe, analysis as an\n"
        f"assert cartmoe.__file__.startswith({str(place)!r}), cartmoe.__file__\n"
        "print(an.load('cartesian').name, an.load('olmoe').name, len(an.models()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(place), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["cartesian", "olmoe", str(len(shipped_names()))], done.stderr
