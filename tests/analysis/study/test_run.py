"""Studies from end to end: once, again, after kills, unfinished, with odd models."""

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
import torch

import analysis
from analysis import report
from analysis.measure.sweep import sweep
from analysis.perturb.base import Identity
from analysis.perturb.compound import Compose, Custom
from analysis.perturb.condition import Condition
from analysis.perturb.decisions import UniformWeights
from analysis.perturb.logits import GaussianNoise, RandomRouting
from analysis.perturb.masks import DropTop
from analysis.report.figures import FIGURES
from analysis.report.text import describe
from analysis.study.estimate import dry_run
from analysis.study.folder import _paired, read
from analysis.study.run import run
from analysis.study.store import Store
from analysis.study.study import Study
from cartmoe import LanguageModel, ModelConfig
from cartmoe.checkpoint import save
from cartmoe.data import prepare, sequences

SHARDS = 3
# The clean runs, and conditions; one is only of cartesian, which has a stage 1.
CELLS = SHARDS * (1 + (1 + 9) + (1 + 10))


def finish(study: Study, out, plot=True):
    results = run(study, out, progress=False)
    report.summarize(out)
    if plot:
        report.plot(out)
    return results


def snapshot(out) -> dict[str, tuple]:
    """Of every file: when it was written, and its bytes."""
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def tables(out) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((out / "tables").glob("*.csv"))}


def finished_cells(out) -> int:
    path = out / "results.sqlite"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as db:
        try:
            return db.execute("SELECT count(*) FROM cells").fetchone()[0]
        except sqlite3.OperationalError:  # not made yet, or being made
            return 0


def start(path, out, *more) -> subprocess.Popen:
    command = [sys.executable, "-m", "analysis", "run", str(path), "--out", str(out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


@pytest.fixture(scope="module")
def tiny(study_dict_of):
    return Study.from_dict(study_dict_of())


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """The directory of the finished study; tests leave it as it is."""
    out = tmp_path_factory.mktemp("done") / "out"
    finish(tiny, out)
    return out


# ---- end to end


def test_what_a_study_leaves(done, tiny):
    results = read(done)
    assert (results.finished, results.planned) == (CELLS, CELLS)
    assert results.has_conditions
    damage = results.damage(full=True)
    assert set(damage.model) == {"smoe_share", "cartesian"}
    assert results.clean().model.tolist() == ["dense", "smoe_share", "cartesian"]
    labels = damage.groupby("model").label.agg(set)
    assert labels["cartesian"] - labels["smoe_share"] == {"DropTop(1), stage 1, scores"}
    identity = damage[damage.perturbation == "Identity"]
    assert (identity[["delta_nats", "low", "high", "kl"]] == 0).all(axis=None)
    assert damage.delta_nats.notna().all()
    names = ("clean", "sites", "damage", "robustness", "per_dose", "by_domain")
    assert tables(done).keys() == {f"{name}.csv" for name in names}
    figures = {path.name for path in (done / "figures").glob("[!.]*")}
    drawn = ("droptop_strength", "droptop_mass", "noise_strength", "noise_mass", "noise_doses",
             "controls", "stages", "catalogue")  # fmt: skip
    assert figures == {f"{name}.{kind}" for name in drawn for kind in ("pdf", "png", "svg", "txt")}
    text = report.summarize(done)
    assert text == (done / "robustness.txt").read_text()
    assert "UNFINISHED" not in text
    assert "Positive control" in text
    plan = json.loads((done / "plan.json").read_text())
    assert plan["study"]["name"] == tiny.name
    assert plan["manifest"]["versions"]["torch"] == torch.__version__
    assert len({cell["key"] for cell in plan["cells"]}) == CELLS


def test_results_are_those_of_measure(done, tiny):
    """The study's numbers against a sweep over the same model and documents."""
    model = analysis.load(done / "models" / "cartesian-s0")
    assert model.name == "cartesian"
    assert (model.family, model.train_seed) == ("cartesian", 0)
    corpus = prepare(tiny.data.corpus)
    docs = sequences(corpus, 64, limit=4, max_tokens_per_document=128)
    calibration = sequences(corpus, 64, split="train", limit=2, max_tokens_per_document=128)
    conditions = [Condition(DropTop(2)), Condition(RandomRouting())]
    mine = sweep(
        model, docs, conditions, controls=False, calibration=calibration, batch_size=2,
        progress=False,
    )  # fmt: skip
    theirs = read(done).damage(full=True)
    theirs = theirs[theirs.model == "cartesian"].set_index("label")
    for label, row in mine.damage(full=True).set_index("label").iterrows():
        for column in ("nats", "clean_nats", "kl", "mass_moved", "flips"):
            assert row[column] == pytest.approx(theirs.loc[label, column], abs=1e-6)


def test_again_does_nothing(done, tiny):
    before = snapshot(done)
    results = finish(tiny, done)
    assert results.finished == CELLS
    after = snapshot(done)
    assert before.keys() == after.keys()
    written = {name for name in before if before[name] != after[name]}
    assert written <= {"plan.json", *(name for name in before if name.endswith("lock"))}
    assert after["plan.json"][1] == before["plan.json"][1]


@pytest.fixture
def two_figures(monkeypatch):
    """A figure takes half a second."""
    chosen = {name: FIGURES[name] for name in ("controls", "noise_mass")}
    monkeypatch.setattr("analysis.report.figures.FIGURES", chosen)


@pytest.mark.usefixtures("two_figures")
def test_more_conditions_measure_only_those(study_dict_of, tmp_path):
    small = study_dict_of(train={"families": ["smoe_share"]})
    small["conditions"] = [{"perturbation": "DropTop", "m": [1, 2]}]
    out = tmp_path / "out"
    finish(Study.from_dict(small), out)
    assert not (out / "figures" / "noise_mass.png").exists()
    before = snapshot(out)
    assert finished_cells(out) == SHARDS * 3
    small["conditions"].append({"perturbation": "GaussianNoise", "sigma": 1.0})
    finish(Study.from_dict(small), out)
    assert finished_cells(out) == SHARDS * 4
    assert (out / "figures" / "noise_mass.png").exists()
    after = snapshot(out)
    models = [name for name in before if name.startswith("models") and "lock" not in name]
    assert all(before[name] == after[name] for name in models)
    small["conditions"] = [{"perturbation": "GaussianNoise", "sigma": 1.0}]
    finish(Study.from_dict(small), out)
    assert finished_cells(out) == SHARDS * 4
    assert not (out / "figures" / "controls.png").exists()  # of conditions it does not have now


def test_a_deleted_figure_comes_back(done):
    figure = done / "figures" / "controls.png"
    content = figure.read_bytes()
    figure.unlink()
    assert figure in report.plot(done)
    assert figure.read_bytes() == content


# ---- unusual studies


@pytest.mark.parametrize("conditions", [None, [{"perturbation": "DropTop"}]], ids=["none", "one"])
def test_dense_only(study_dict_of, tmp_path, conditions):
    study = study_dict_of(train={"families": ["dense"]}, conditions=conditions)
    results = finish(Study.from_dict(study), tmp_path)
    assert not results.has_conditions
    assert (results.finished, results.planned) == (SHARDS, SHARDS)
    assert results.sites().empty
    assert tables(tmp_path).keys() == {"clean.csv", "sites.csv"}
    assert "dense" in report.summarize(tmp_path)
    assert report.plot(tmp_path) == []


@pytest.mark.parametrize(
    ("condition", "figures"),
    [
        ({"perturbation": "DropTop", "m": 2}, ["droptop_strength", "droptop_mass"]),
        ({"perturbation": "DropTop", "where": "stage 1"}, ["stages"]),
        ({"perturbation": "DropTop", "ratio": 0.25}, []),
        ({"perturbation": "GaussianNoise", "scale": "absolute"}, []),
        ({"perturbation": "RandomRouting", "downstream": "replay"}, []),
        ({"perturbation": "DropTop", "effect": ["selection", "weights", "no_refill"]}, []),
    ],
    ids=str,
)
def test_only_figures_that_can_be_drawn(study_dict_of, tmp_path, done, condition, figures):
    study = study_dict_of(
        train=None, models=[{"path": str(done / "models" / "cartesian-s0")}], conditions=[condition]
    )
    finish(Study.from_dict(study), tmp_path)
    assert {path.stem for path in report.plot(tmp_path)} == {*figures, "catalogue"}


def test_models_by_path(study_dict_of, checkpoint_of, tmp_path):
    """One of them under two names: both are in the tables, and measured once."""
    moe, dense = checkpoint_of("smoe"), checkpoint_of("dense")
    models = [
        {"path": str(moe), "name": "a"},
        {"path": str(moe), "name": "b", "train_seed": 3},
        {"path": str(dense), "name": "c"},
    ]
    study = study_dict_of(train=None, models=models)
    results = finish(Study.from_dict(study), tmp_path, plot=False)
    assert results.clean()[["model", "family", "train_seed"]].to_numpy().tolist() == [
        ["a", "smoe", 0],
        ["b", "smoe", 3],
        ["c", "dense", 0],
    ]
    a, b = (results.damage(full=True)[results.damage(full=True).model == name] for name in "ab")
    assert a.delta_nats.tolist() == b.delta_nats.tolist()
    assert finished_cells(tmp_path) == SHARDS * (1 + 9 + 1)
    assert results.finished == results.planned


def test_train_seed_of_a_checkpoint(checkpoint_of):
    assert analysis.load(checkpoint_of("dense")).train_seed == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokenizer=None, vocab_size=100), "'m' has a vocabulary of 100; .* needs 256"),
        (dict(damage=True), "model.safetensors"),
    ],
    ids=["vocabulary", "damaged"],
)
def test_models_that_cannot_be_measured(study_dict_of, checkpoint_of, tmp_path, changes, message):
    """They are refused before another one is trained."""
    damage = changes.pop("damage", False)
    path = checkpoint_of("smoe", **changes)
    if damage:
        (path / "model.safetensors").write_bytes(b"x")
    study = study_dict_of(models=[{"path": str(path), "name": "m"}])
    with pytest.raises(ValueError, match=message):
        run(Study.from_dict(study), tmp_path, progress=False)
    assert not (tmp_path / "models").exists()


def test_another_tokenizer(study_dict_of, checkpoint_of, texts, tmp_path):
    pytest.importorskip("tokenizers")
    bpe = prepare(texts, "bpe:300").tokenizer
    torch.manual_seed(0)
    shape = dict(d_model=32, ffn_width=64, num_layers=2, num_heads=2, vocab_size=bpe.vocab_size)
    model = LanguageModel(ModelConfig.preset("nano", "smoe", **shape))
    save(model, tmp_path / "m", {"tokenizer": "bpe:300"}, tokenizer_json=bpe.json)
    study = study_dict_of(models=[{"path": str(tmp_path / "m")}])
    message = "model 'm' reads tokens of 'bpe:300'; those of the study are of 'bytes'"
    with pytest.raises(ValueError, match=message):
        run(Study.from_dict(study), tmp_path / "out", progress=False)


def test_bf16(study_dict_of, done, tmp_path):
    study = study_dict_of(
        train=None,
        models=[{"path": str(done / "models" / "cartesian-s0"), "name": "cartesian"}],
        measure={"precision": "bf16"},
    )
    damage = finish(Study.from_dict(study), tmp_path, plot=False).damage(full=True)
    assert (damage[damage.perturbation == "Identity"].delta_nats == 0).all()
    exact = read(done).clean().set_index("model").nats["cartesian"]
    assert damage.clean_nats.iloc[0] == pytest.approx(exact, rel=0.01)


# ---- unfinished studies


def stop_after(study, out, cells, monkeypatch):
    """Run until that many cells are stored."""

    class Stopping(Store):
        def add(self, *args):
            if finished_cells(out) == cells:
                raise KeyboardInterrupt
            return super().add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["analysis.study.run"], "Store", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(study, out, progress=False)


def models_of(out) -> list[dict]:
    """The models that a study has trained, for another one."""
    families = ("dense", "smoe_share", "cartesian")
    return [{"path": str(out / "models" / f"{name}-s0"), "name": name} for name in families]


@pytest.mark.usefixtures("two_figures")
@pytest.mark.parametrize("cells", [1, 14, 25])
def test_half_finished(study_dict_of, done, tmp_path, monkeypatch, cells):
    """It can be summarized and drawn at any point; the end is that of a run without a stop."""
    study = Study.from_dict(study_dict_of(train=None, models=models_of(done)))
    stop_after(study, tmp_path, cells, monkeypatch)
    assert f"UNFINISHED: {cells} of {CELLS} cells" in report.summarize(tmp_path)
    if cells == 14:
        report.plot(tmp_path)
    finish(study, tmp_path, plot=False)
    assert tables(tmp_path) == tables(done)


def test_nothing_measured(tiny, tmp_path, done):
    (tmp_path / "plan.json").write_bytes((done / "plan.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"there are no results at .*results\.sqlite"):
        report.summarize(tmp_path)
    Store(tmp_path / "results.sqlite").close()
    with pytest.raises(ValueError, match=rf"0 of {CELLS} cells are measured"):
        report.summarize(tmp_path)


def cells_of(text: str) -> pd.DataFrame:
    """Finished cells, "clean:012 a:01" naming the shards of each condition."""
    pairs = [part.split(":") for part in text.split()]
    rows = [(name, int(shard)) for name, shards in pairs for shard in shards]
    return pd.DataFrame(rows, columns=["condition", "shard"])


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        ("clean:012 a:012 b:012", "clean:012 a:012 b:012"),
        ("clean:0123 a:0123 b:012", "clean:012 a:012 b:012"),  # stopped in the last shard
        ("clean:012 a:012 b:012 c:0", "clean:012 a:012 b:012"),  # c was added later
        ("clean:0 a:0", "clean:0 a:0"),
        ("clean:0", "clean:0"),
        ("clean:01 a:0", "clean:01"),
        ("a:01 b:0", ""),
    ],
)
def test_what_can_be_paired(there, kept):
    got = _paired(cells_of(there)).reset_index(drop=True)
    pd.testing.assert_frame_equal(got, cells_of(kept).astype(got.dtypes))


# ---- kills, and two at a time


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_and_run_again(write_study, done, tmp_path):
    path, out = tmp_path / "s.toml", tmp_path / "out"
    write_study(path, train=None, models=models_of(done))
    process = start(path, out)
    wait_for(lambda: finished_cells(out) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= finished_cells(out) < CELLS
    finish(Study.read(path), out, plot=False)
    assert tables(out) == tables(done)


@pytest.mark.slow
def test_killed_many_times(tiny, write_study, done, tmp_path):
    """At random moments of training and measuring."""
    path, out = write_study(tmp_path / "s.toml"), tmp_path / "out"
    draw = np.random.default_rng(0)
    kills = 0
    for _ in range(12):
        process = start(path, out)
        try:
            process.communicate(timeout=draw.uniform(4, 9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    print(f"{kills} kills")
    finish(tiny, out)
    assert tables(out) == tables(done)


KILLS = 50


@pytest.mark.slow
def test_fifty_kills_while_measuring(write_study, checkpoint_of, tmp_path, capsys):
    """At random moments after a process has stored its first cell: nothing is lost, nothing is
    there twice, and the tables are those of a run that was not stopped, byte by byte."""
    families = ("smoe_share", "cartesian")
    conditions = [
        {"perturbation": "DropTop", "m": [1, 2, 3], "point": ["logits", "scores"]},
        {"perturbation": "GaussianNoise", "sigma": [0.5, 1.0], "eval_seed": list(range(10))},
    ]
    path = write_study(
        tmp_path / "s.toml",
        train=None,
        models=[{"path": str(checkpoint_of(name)), "name": name} for name in families],
        conditions=conditions,
        data={"documents": 4, "max_tokens": 2000, "shard": 1},
        measure={"tokens": True},
    )
    study, out = Study.read(path), tmp_path / "out"
    draw = np.random.default_rng(0)
    acknowledged: set[str] = set()
    for kill in range(KILLS):
        before, process = finished_cells(out), start(path, out)
        wait_for(lambda before=before: finished_cells(out) > before, process)
        time.sleep(draw.uniform(0, 0.15))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"finished before kill {kill}"
        with Store(out / "results.sqlite") as store:
            there = store.keys()
        assert acknowledged <= there
        acknowledged = there
    results = run(study, out, progress=False)
    whole = run(study, tmp_path / "whole", progress=False)
    lost = results.planned - results.finished + len(acknowledged - there)
    with closing(sqlite3.connect(out / "results.sqlite")) as db:
        rows = "SELECT count(*), count(DISTINCT cell || ' ' || sequence_id) FROM "
        counts = [db.execute(rows + table).fetchone() for table in ("losses", "tokens")]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    duplicated = sum(all_rows - different for all_rows, different in counts)
    same = [
        table_of(r).to_csv(index=False).encode()
        for r in (results, whole)
        for table_of in (
            lambda r: r.losses,
            lambda r: r.routing,
            lambda r: r.cells.drop(columns="seconds"),
            lambda r: r.damage(full=True),
        )
    ]
    with capsys.disabled():
        print(
            f"\n{KILLS} kills while measuring {results.planned} cells, {len(acknowledged)} of them "
            f"before the last one: {lost} lost, {duplicated} duplicated"
        )
    assert (lost, duplicated) == (0, 0)
    assert same[:4] == same[4:]


@pytest.mark.slow
def test_two_at_once(tiny, write_study, done, tmp_path):
    """The store stays whole; who cannot train because the other does says so in a line."""
    path, out = write_study(tmp_path / "s.toml"), tmp_path / "out"
    processes = [start(path, out), start(path, out)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode in (0, 2), stderr
        if process.returncode:
            (line,) = stderr.strip().splitlines()[-1:]
            assert line.startswith("error: ")
            assert "Traceback" not in stderr
    finish(tiny, out)
    assert tables(out) == tables(done)
    with closing(sqlite3.connect(out / "results.sqlite")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# ---- sweep


def test_sweep(model_of, shard):
    model = model_of("cartesian")
    results = sweep(model, shard, [DropTop(1), DropTop(1), GaussianNoise(1.0)], progress=False)
    damage = results.damage(full=True)
    controls = ["Identity", "DropChosen(1)", "DropUnchosen(1)", "RandomRouting(1)", "NoRouted"]
    controls.append("ResidualNoise(1, of=DropTop)")
    assert damage.label.tolist() == ["DropTop(1)", "GaussianNoise(1)", *controls]
    assert (damage.set_index("label").loc["Identity", ["delta_nats", "low", "high"]] == 0).all()
    assert len(results.table()) == 1
    assert not results.sites().value.isna().all()


def test_sweep_takes_a_plain_model_and_conditions(tiny_model, shard):
    results = sweep(
        tiny_model("smoe_share"),
        shard,
        [Condition(DropTop(1), "layer 2", "scores"), Identity()],
        controls=False,
        progress=False,
    )
    assert results.damage(full=True).label.tolist() == ["DropTop(1), layer 2, scores", "Identity"]


def test_sweep_of_a_dense_model(model_of, shard):
    with pytest.raises(ValueError, match="no router: it is dense"):
        sweep(model_of("dense"), shard, [DropTop(1)], progress=False)
    with pytest.raises(ValueError, match=r"docs is a str; give what analysis\.documents returns"):
        sweep(model_of("smoe"), "stdlib", [DropTop(1)], progress=False)
    of_others = dataclasses.replace(shard, tokens_SL=shard.tokens_SL + 13)
    with pytest.raises(ValueError, match="and smoe a vocabulary of 13: take"):
        sweep(model_of("smoe"), of_others, [DropTop(1)], progress=False)


def test_sweep_takes_one_perturbation_and_refuses_a_nameless_function(model_of, shard):
    model = model_of("smoe_share")
    results = sweep(model, shard, DropTop(1), controls=False, progress=False)
    assert results.damage(full=True).label.tolist() == ["DropTop(1)"]
    with pytest.raises(ValueError, match="which tables cannot name"):
        sweep(model, shard, [lambda logits_TE, ctx: logits_TE], progress=False)
    for asked in (DropTop, "DropTop", lambda logits_TE, ctx: logits_TE, None):
        with pytest.raises(ValueError, match=r"perturbations is .*; give an object"):
            sweep(model, shard, asked, progress=False)


def test_sweep_refuses_two_functions_of_one_name(model_of, shard):
    model = model_of("smoe_share")
    flip = Custom(lambda logits_TE, ctx: -logits_TE, "mine")
    other = Custom(lambda logits_TE, ctx: logits_TE * 2, "mine")
    with pytest.raises(ValueError, match="has 2 that tables call 'mine'"):
        sweep(model, shard, [flip, other], progress=False)
    with pytest.raises(ValueError, match="has 2 that tables call 'mine'"):
        sweep(model, shard, [flip, Custom(flip.function, "mine", version=1)], progress=False)
    twice = sweep(model, shard, [flip, flip], controls=False, progress=False)
    assert twice.damage(full=True).label.tolist() == ["mine"]


# ---- verdicts


@pytest.mark.parametrize(
    ("label", "column", "verdict"),
    [
        (None, None, "Identity control: hooks alone change nothing, to the last bit: passed"),
        ("Identity", "delta_nats", "Identity control FAILED"),
        ("Identity", "kl", "Identity control FAILED"),
        ("DropTop(1)", "changed", "FAILED, changed nothing: cartesian (seed 0): DropTop(1)"),
    ],
)
def test_verdicts(model_of, shard, label, column, verdict):
    results = sweep(model_of("cartesian"), shard, [DropTop(1)], progress=False)
    damage = results.damage(full=True)
    if label:
        damage.loc[damage.label == label, column] = 0.0 if column == "changed" else 1e-9
        vars(results)["_damage"] = damage
    assert verdict in describe(results)


def test_strengths_that_do_not_fit_are_found_before_training(study_dict_of, tmp_path):
    """All of them, each with the model that it does not fit."""
    study = study_dict_of(
        conditions=[
            {"perturbation": "DropTop", "m": 99},
            {"perturbation": "TopK", "k": [2, 64]},
            {"perturbation": "Compose", "parts": [{"name": "SwapRanks", "r": 1, "s": 77}]},
        ]
    )
    with pytest.raises(ValueError, match="m is 99") as caught:
        run(Study.from_dict(study), tmp_path, progress=False)
    text = str(caught.value)
    assert "k is 64" in text
    assert "s is 77" in text
    assert "model 'smoe_share'" in text
    assert "model 'cartesian'" in text
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("do", [run, dry_run])
def test_a_vocabulary_that_is_too_small_is_found_before_training(study_dict_of, tmp_path, do):
    """With the other mistakes, and by a dry run too."""
    study = study_dict_of(data={"tokenizer": "bpe:300"})
    study["conditions"] = [{"perturbation": "DropTop", "m": 99}]
    with pytest.raises(ValueError, match=r"vocab_size is 256; .* 'bpe:300' needs 300") as error:
        do(Study.from_dict(study), tmp_path / "out")
    assert "m is 99" in str(error.value)
    assert not (tmp_path / "out" / "models").exists()


def test_a_layer_that_no_model_has_is_found_before_training(study_dict_of, tmp_path):
    """A stage that only some have is none."""
    places = ["layer 1", "layer 0 stage 1", "stage 1", "layer 99 stage 0"]
    study = study_dict_of(conditions=[{"perturbation": "DropTop", "where": places}])
    with pytest.raises(ValueError, match="layer") as caught:
        run(Study.from_dict(study), tmp_path, progress=False)
    lines = [line.partition("conditions: ")[2] for line in str(caught.value).splitlines()]
    have = "layers with a router are 0"
    assert lines == [f"where is '{place}'; {have}" for place in ("layer 1", "layer 99 stage 0")]
    assert not (tmp_path / "models").exists()


def test_a_part_of_a_compose_is_let_through(model_of, shard):
    """Weights that a later part has moved are no less weights than those that logits have moved."""
    p = Compose((GaussianNoise(1e-4), UniformWeights(1.0)))
    conditions = [Condition(p, effect=e) for e in ("full", "weights", "part weights")]
    result = sweep(model_of("cartesian"), shard, conditions, controls=False, progress=False)
    moved = result.damage(full=True).mass_moved
    assert moved.min() > 0.9 * moved.max() > 0
