"""Every kind of file that is kept and read again: a damaged one is refused by name, made anew, or
has no effect on any number, label or picture.

`pytest -m slow -s tests/faults`; FAULT_SEED=7 tries others.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import analysis as an
from analysis import report
from analysis.adapters.cartmoe import tensors_sha256
from analysis.study import documents_of
from analysis.study.models import Checkpoint, check_bytes
from analysis.study.study import Study
from cartmoe import LanguageModel, ModelConfig, load, save
from cartmoe.checkpoint import newest, read_meta, read_tokenizer
from cartmoe.data import prepare
from cartmoe.run import read_run
from cartmoe.train import TrainConfig, train

from .campaign import damage
from .conftest import SHAPE

pytestmark = pytest.mark.slow


def every(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def model(home):
    torch.manual_seed(0)
    config = ModelConfig("cartesian", 256, 32, 64, 2, 2, num_experts=4, init_std=0.3)
    return an.adapt(LanguageModel(config).eval())


@pytest.fixture
def docs(corpus, model):
    return an.documents(corpus, model, length=32, limit=6, max_tokens_per_document=32)


def test_checkpoints(model, corpus, home, tmp_path):
    bpe = prepare(corpus, "bpe:300").tokenizer
    config = ModelConfig("smoe", bpe.vocab_size, 16, 16, 1, 2, num_experts=4)
    save(
        LanguageModel(config),
        tmp_path / "kept",
        {"tokenizer": "bpe:300"},
        tokenizer_json=bpe.json,
    )

    def observe(folder):
        tokens = read_tokenizer(folder).encode("text 7 of these").tolist()
        return tensors_sha256(load(folder)), read_meta(folder), tokens, an.load(folder).identity

    damage("checkpoints", tmp_path / "kept", every, observe)


def test_runs(corpus, home, tmp_path):
    """A run of which a checkpoint is damaged goes back to the one before, or says so."""
    config = TrainConfig(
        corpus=str(corpus), batch_size=2, length=32, steps=4, checkpoint_every=1, precision="fp32"
    )
    shape = ModelConfig.preset("nano", "smoe", **SHAPE)
    train(shape, config, tmp_path / "kept", progress=False)
    trained = {
        folder.name: tensors_sha256(load(folder))
        for folder in (tmp_path / "kept" / "checkpoints").iterdir()
    }

    def observe(folder):
        found = newest(folder)
        assert tensors_sha256(load(found)) == trained[found.name]
        return read_run(folder)["asked"], read_run(folder)["found"]

    damage("runs: run.json, checkpoints", tmp_path / "kept", every, observe)


def test_metrics_of_a_run(corpus, home, tmp_path):
    """Training goes on, or says what is wrong; the log is that of an undisturbed run."""
    shape = ModelConfig.preset("nano", "smoe", **SHAPE)

    config = TrainConfig(
        corpus=str(corpus), batch_size=2, length=32, steps=3, checkpoint_every=1, keep=3,
        precision="fp32",
    )  # fmt: skip
    train(shape, config, tmp_path / "kept", progress=False)
    shutil.rmtree(newest(tmp_path / "kept"))  # as one that was stopped before its last step

    def observe(folder):
        train(shape, config, folder, progress=False)
        lines = (folder / "metrics.csv").read_text().splitlines()
        losses = [line.split(",")[:3] for line in lines]  # without the times
        return tensors_sha256(load(newest(folder))), losses

    damage(
        "metrics of a run", tmp_path / "kept",
        lambda folder: list(folder.glob("metrics.*")), observe,
    )  # fmt: skip


def test_stores_and_plans(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "kept", ignore=shutil.ignore_patterns("models"))

    def observe(folder):
        results = an.read(folder)
        tables = [getattr(results, name) for name in ("losses", "routing", "facts", "failed")]
        tokens = results.tokens("smoe_share", 0, "clean")
        cells = results.cells.drop(columns="seconds")
        texts = [table.to_csv() for table in (*tables, cells, results.damage(full=True), tokens)]
        return texts, results.finished, results.planned

    def files(folder):
        return [folder / "results.sqlite", folder / "plan.json"]

    damage("results.sqlite, plan.json", tmp_path / "kept", files, observe)


def test_tables(finished, tmp_path):
    shutil.copytree(
        finished[1], tmp_path / "kept", ignore=shutil.ignore_patterns("models", "figures")
    )

    def observe(folder):
        text = report.summarize(folder)
        return text, {p.name: p.read_bytes() for p in (folder / "tables").glob("*.csv")}

    def files(folder):
        return [*every(folder / "tables"), folder / "robustness.txt"]

    damage("tables", tmp_path / "kept", files, observe)


def test_pictures(finished, tmp_path, monkeypatch):
    """One of them: a damaged one is drawn anew with all others, which takes seconds."""
    figures = {"catalogue": report.figures.FIGURES["catalogue"]}
    monkeypatch.setattr(report.figures, "FIGURES", figures)
    shutil.copytree(
        finished[1], tmp_path / "kept", ignore=shutil.ignore_patterns("models", "figures")
    )

    def observe(folder):
        return {path.name: path.read_bytes() for path in report.plot(folder)}

    observe(tmp_path / "kept")

    damage("pictures", tmp_path / "kept", lambda folder: every(folder / "figures"), observe)


def test_overlap(finished, home, tmp_path):
    """What says that a measurement is finished, and what it is of."""
    model = an.load(newest(finished[1] / "models" / "smoe_share-s0"))
    _, docs = documents_of(Study.read(finished[0]))
    overlap = an.measure_overlap(model, docs, ["lift", "load"], progress=False)
    asked = {"models": {"smoe_share-s0": model.identity}, "metrics": ["lift", "load"]}
    written = report.write_overlap(overlap, tmp_path / "kept", asked)
    before = {path.name: path.read_bytes() for path in written}

    def observe(folder):
        files = report.finished(folder, asked)
        if files is not None:  # else it is measured anew
            assert {path.name: path.read_bytes() for path in files} == before
        return True

    damage("overlap", tmp_path / "kept", every, observe)


def test_traces(model, docs, tmp_path):
    an.Trace.record(model, docs, tmp_path / "kept", logits=True, progress=False)

    def observe(folder):
        trace = an.Trace.load(folder)
        sites = [trace.routing(site) for site in trace.places]
        arrays = [array.tobytes() for recorded in sites for array in recorded]
        return arrays, trace.sha256, trace.sites, trace.uncaptured, len(trace), trace.origin

    damage("traces", tmp_path / "kept", every, observe)


def test_results(model, docs, tmp_path):
    an.sweep(model, docs, an.DropTop(1), tokens=True, progress=False).save(tmp_path / "kept")

    def observe(folder):
        results = an.read(folder)
        tables = (results.losses, results.routing, results.facts, results.cells)
        texts = [table.to_csv() for table in (*tables, results.tokens("cartesian", 0, "clean"))]
        return texts, results.finished, results.planned

    damage("results of a sweep", tmp_path / "kept", every, observe)


def test_prepared_corpora(corpus, tmp_path):
    """Made anew from the text."""

    def observe(folder):
        found = prepare(corpus, "bpe:300", cache_dir=folder)
        tokens = found.tokens[:].tobytes()
        return tokens, found.documents.to_csv(), found.sha256, found.tokenizer.json

    prepare(corpus, "bpe:300", cache_dir=tmp_path / "kept")
    damage("prepared corpora", tmp_path / "kept", every, observe)


def test_checkpoints_of_a_study(finished, tmp_path):
    """Those that it trained, before it measures them."""
    path, out = finished
    shutil.copytree(out / "models" / "smoe_share-s0", tmp_path / "kept")
    study = Study.read(path)
    (spec,) = study.models
    trained = {
        folder.name: tensors_sha256(load(folder))
        for folder in (tmp_path / "kept" / "checkpoints").iterdir()
    }

    def observe(folder):
        (last,) = [newest(folder)]
        found = check_bytes(study, Checkpoint(spec, last, ""))
        return tensors_sha256(load(found.path)) == trained[found.path.name]

    def files(folder):
        return every(folder / "checkpoints")

    damage("checkpoints of a study", tmp_path / "kept", files, observe)
