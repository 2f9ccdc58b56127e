"""`python -m analysis overlap`: tables, manifest, figures; mistakes are one line."""

import json
import shutil

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis import measure_overlap
from analysis.__main__ import app
from analysis.adapters.corpus import documents
from analysis.adapters.load import load
from analysis.overlap.metrics.catalogue import METRICS
from analysis.overlap.tables import Overlap
from analysis.report import overlap as overlap_report

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture(scope="module")
def models(checkpoint_of):
    return [str(checkpoint_of(name, num_experts=6)) for name in ("smoe_share", "cartesian")]


def overlap(*words):
    return CliRunner().invoke(app, ["overlap", *map(str, words), "--no-progress"])


def test_everything_of_a_model(models, texts, tmp_path):
    out = tmp_path / "deep" / "out"
    done = overlap(models[1], "--corpus", texts, "--documents", 4, "--length", 32, "--out", out)
    assert done.exit_code == 0, done.output
    tables = {name: pd.read_csv(out / f"{name}.csv") for name in ("experts", "sites", "pairs")}
    assert "composite_a" in set(tables["sites"].metric)
    assert "substitution" not in set(tables["pairs"].metric)  # damage, only where it is named
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["models"]) == ["cartesian-s5"]
    assert "torch" in manifest["versions"]
    named = set(done.stdout.split())
    assert str(out / "figures" / "cartesian-s5-usage.pdf") in named
    assert {str(path) for path in out.rglob("*.*")} == named


def test_two_models(models, texts, tmp_path):
    options = ["--corpus", texts, "--documents", 4, "--length", 32, "--metric", "lift"]
    done = overlap(*models, *options, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert set(pd.read_csv(tmp_path / "pairs.csv").model) == {"smoe_share", "cartesian"}
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert figures == {"lift", "smoe_share-s5-lift", "cartesian-s5-lift"}


def test_one_metric(models, texts, tmp_path):
    options = ["--corpus", texts, "--documents", 4, "--length", 32, "--metric", "substitution"]
    done = overlap(models[0], *options, "--sites", "layer 0", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "pairs.csv")
    assert set(table.metric) == {"substitution"}
    assert not (tmp_path / "sites.csv").exists()
    assert (tmp_path / "figures" / "smoe_share-s5-substitution.png").is_file()


COMPOSITES = [name for name, m in METRICS.items() if (m.kind, m.table) == ("composite", "sites")]


@pytest.mark.parametrize(
    ("sites", "metrics", "figures"),
    [
        ("stage 1", ["lift"], {"lift", "cartesian-s5-lift"}),
        ("stage 1", ["substitution", "domain_specialization"],
         {"substitution", "cartesian-s5-substitution", "cartesian-s5-domains"}),
        ("layer 1", ["domain_specialization"], {"cartesian-s5-domains"}),
        ("layer 1", ["transition", *COMPOSITES], {"cartesian-s5-usage"}),
        ("layer 1", ["transition", "composite_a"], set()),
        ("layer 1", ["composite_cka"], {"composite_cka", "cartesian-s5-composite_cka"}),
        ("stage 0", ["transition", *COMPOSITES], set()),  # of the layer before alone
    ],
)  # fmt: skip
def test_figures_are_of_what_was_measured(checkpoint_of, texts, tmp_path, sites, metrics, figures):
    model = checkpoint_of("cartesian", moe_interval=1)
    options = ["--corpus", texts, "--documents", 4, "--length", 32, "--sites", sites]
    options += [word for name in metrics for word in ("--metric", name)]
    done = overlap(model, *options, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert {path.stem for path in tmp_path.glob("figures/*")} == figures


def test_a_metric_that_one_of_the_models_lacks(models, checkpoint_of, texts, tmp_path):
    found = []
    for path, metric in (models[0], "router_cosine"), (checkpoint_of("hash"), "flat_cosine"):
        model = load(path)
        docs = documents(str(texts), model, length=32, limit=4)
        found.append(measure_overlap(model, docs, metric, progress=False))
    files = overlap_report.write_overlap(Overlap.join(found), tmp_path, {})
    assert {path.stem for path in files if path.suffix == ".png"} == {
        *("router_cosine", "smoe_share-s5-router_cosine"),
        *("flat_cosine", "hash-s5-flat_cosine"),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "cosine"], "metric is 'cosine'; choose one of"),
        (["--probe", "no"], "probe is 'no'; choose one of"),
        (["--sites", "layer 9"], "sites is 'layer 9'"),
        (["--corpus", "nowhere"], "corpus is 'nowhere', which is no file or folder"),
        (["--corpus", "factorial:topics=0"], "topics is 0"),
    ],
)
def test_mistakes(models, texts, tmp_path, words, message):
    options = [] if "--corpus" in words else ["--corpus", texts]
    done = overlap(models[0], *options, *words, "--length", 32, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_model(tmp_path):
    done = overlap(tmp_path / "nothing", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1


def test_the_same_again_is_finished_and_nothing_is_lost(models, texts, tmp_path):
    words = [models[0], "--corpus", texts, "--documents", 4, "--length", 32, "--sites", "layer 0"]
    first = overlap(*words, "--metric", "lift", "--out", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    again = overlap(*words, "--metric", "lift", "--out", tmp_path)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[0] == f"{tmp_path} is finished"
    assert set(again.stdout.splitlines()[1:]) == set(first.stdout.splitlines())
    other = overlap(*words, "--metric", "load", "--out", tmp_path)
    assert other.exit_code == 2
    assert "which holds other results (metrics); choose another" in other.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


LIFT = ["--length", 32, "--sites", "layer 0", "--metric", "lift", "--metric", "load"]


def test_metrics_in_another_order_are_the_same(models, texts, tmp_path):
    words = [models[0], "--corpus", texts, "--documents", 4, *LIFT, "--out", tmp_path]
    overlap(*words)
    again = overlap(*words[:-6], "--metric", "load", "--metric", "lift", *words[-2:])
    assert again.stdout.splitlines()[0] == f"{tmp_path} is finished"


def test_other_text_by_the_same_path_is_not_finished(models, texts, tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(texts, corpus)
    words = [models[0], "--corpus", corpus, *LIFT, "--out", out]
    assert overlap(*words).exit_code == 0
    for path in corpus.iterdir():
        path.write_text(path.read_text().swapcase())
    other = overlap(*words)
    assert other.exit_code == 2
    assert "which holds other results (data); choose another" in other.stderr


def test_what_is_gone_is_measured_again(models, texts, tmp_path):
    words = [models[0], "--corpus", texts, *LIFT, "--out", tmp_path]
    overlap(*words)
    table = tmp_path / "experts.csv"
    before = table.read_bytes()
    table.unlink()
    assert str(table) in overlap(*words).stdout.splitlines()
    assert table.read_bytes() == before


@pytest.mark.parametrize("manifest", ["[]", "3", "[3]", '{"models": ', "\x00", "{}", None])
def test_a_folder_of_something_else(models, texts, tmp_path, manifest):
    mine = tmp_path / ("notes.txt" if manifest is None else "manifest.json")
    mine.write_text(manifest or "mine")
    done = overlap(models[0], "--corpus", texts, *LIFT, "--out", tmp_path)
    assert done.exit_code == 2
    assert "which holds other results (models, data, corpus" in done.stderr
    assert list(tmp_path.iterdir()) == [mine]


def test_stopped_before_the_end(models, texts, tmp_path, monkeypatch):
    words = [models[0], "--corpus", texts, *LIFT, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(overlap_report.plots, "save", lambda *_: 1 / 0)
        overlap(*words)
    assert (tmp_path / "experts.csv").is_file()
    assert json.loads((tmp_path / "manifest.json").read_text())["files"] == {}
    done = overlap(*words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "figures" / "lift.pdf").is_file()


def test_two_of_one_family_and_seed(models, checkpoint_of, texts, tmp_path):
    other = str(checkpoint_of("cartesian", num_experts=4))
    options = ["--corpus", texts, "--documents", 4, "--length", 32, "--metric", "lift"]
    done = overlap(models[1], other, *options, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    names = {path.rpartition("/")[2] for path in (models[1], other)}
    assert set(pd.read_csv(tmp_path / "pairs.csv").model) == names
    twice = overlap(models[1], models[1], *options, "--out", tmp_path / "twice")
    assert twice.exit_code == 2
    assert "MODEL has 2 called" in twice.stderr


def test_one_document(models, tmp_path):
    (tmp_path / "only.txt").write_text("A few words, and that is all.")
    done = overlap(models[1], "--corpus", tmp_path / "only.txt", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "has one document; intervals need several" in done.stderr
