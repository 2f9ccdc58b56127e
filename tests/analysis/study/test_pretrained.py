"""Studies of pretrained models."""

import json
import signal
import subprocess
import sys
from functools import partial

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import analysis as an
from analysis.__main__ import app
from analysis.study import dry_run, processes
from analysis.study.machine import cores
from analysis.study.plan import Plan
from tests.analysis.adapters.families import save_directory
from tests.analysis.conftest import to_toml

COVERED = "3 of 3 MoE layers; 100 % of the parameters of experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    save_directory(folder, "olmoe")
    return folder


@pytest.fixture
def study(folder, texts, environment):
    return {
        "name": "mine",
        "data": {"corpus": str(texts), "length": 32, "max_tokens": 64, "documents": None},
        "models": [{"hf": str(folder)}],
        "conditions": [{"perturbation": ["Identity", "DropTop", "RandomRouting"]}],
    }


def run(study, out, **how):
    return an.run(an.Study.from_dict(study), out, progress=False, **how)


def test_beside_a_compact_one(study, checkpoint_of, tmp_path):
    """Each reads the same documents in tokens of its own."""
    study["models"].append({"path": str(checkpoint_of("smoe")), "name": "smoe"})
    found = run(study, tmp_path / "out")
    damage = found.damage(full=True).set_index(["model", "label"]).delta_nats
    assert damage["tiny", "Identity"] == damage["smoe", "Identity"] == 0
    assert damage["tiny", "DropTop(1)"] * damage["smoe", "DropTop(1)"] != 0
    assert dict(found.models[["model", "coverage"]].values) == {"tiny": COVERED, "smoe": ""}
    clean = found.losses[found.losses.condition == "clean"]
    sizes = clean.groupby(["model", "document_id"])[["num_tokens"]].sum().unstack("model")
    assert sizes.notna().all(axis=None)
    assert set(found.facts.model) == {"tiny", "smoe"}
    assert found.models.equals(an.read(tmp_path / "out").models)


def test_as_a_sweep_of_the_same(study, folder, tmp_path):
    found = run(study, tmp_path / "out").damage(full=True)
    model = an.load(folder)
    docs = an.documents(
        study["data"]["corpus"], model, length=32, max_tokens_per_document=64, split="validation"
    )
    swept = an.sweep(model, docs, [an.DropTop(1)], batch_size=16, progress=False)
    both = [f.set_index("label").delta_nats["DropTop(1)"] for f in (found, swept.damage(full=True))]
    assert both[0] == pytest.approx(both[1], rel=1e-9)
    assert swept.models.coverage.tolist() == [COVERED]


def test_in_processes_the_same(study, tmp_path):
    here, there = run(study, tmp_path / "a"), run(study, tmp_path / "b", executor=processes(2))
    assert here.losses.equals(there.losses)


def test_only_other_weights_are_measured_again(study, folder, tmp_path, monkeypatch):
    first = run(study, tmp_path / "out")
    monkeypatch.setattr("analysis.study.worker.measure", None)  # nothing is left to measure
    assert run(study, tmp_path / "out").losses.equals(first.losses)
    monkeypatch.undo()
    other = tmp_path / "tiny"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    study["models"] = [{"hf": str(other)}]
    assert not run(study, tmp_path / "out").losses.equals(first.losses)


def test_what_it_would_take(study, tmp_path):
    said = dry_run(an.Study.from_dict(study), tmp_path / "out")
    assert "tiny (seed 0)" in said
    assert "4 missing" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"hf": "/nowhere"}, "is no model directory; nothing is fetched from a hub"),
        ({"hf": "SMOE"}, "holds no model of the transformers library; write path"),
        ({"path": "TINY"}, "holds a model of the transformers library; write hf"),
        ({"hf": "TINY", "path": "SMOE"}, "give one of path, hf"),
        ({}, "give one of path, hf"),
    ],
)
def test_what_is_wrong_with_it(study, folder, checkpoint_of, models, message):
    places = {"SMOE": str(checkpoint_of("smoe")), "TINY": str(folder)}
    study["models"] = [{kind: places.get(text, text) for kind, text in models.items()}]
    with pytest.raises(ValueError, match=message):
        an.Study.from_dict(study)


def test_no_contrasts_of_other_tokens(study, checkpoint_of, tmp_path):
    study["models"].append({"path": str(checkpoint_of("smoe")), "name": "smoe"})
    study["contrasts"] = {"reference": "smoe"}
    with pytest.raises(ValueError, match="read other tokens"):
        run(study, tmp_path / "out")


def test_a_directory_without_weights(study, folder, tmp_path):
    (tmp_path / "tiny").mkdir()
    for path in folder.glob("*.json"):
        (tmp_path / "tiny" / path.name).write_bytes(path.read_bytes())
    study["models"] = [{"hf": str(tmp_path / "tiny")}]
    with pytest.raises(ValueError, match="has no weights"):
        run(study, tmp_path / "out")


def test_streamed_the_same(study, tmp_path):
    whole = run(study, tmp_path / "whole")
    study["models"][0]["stream"] = True
    for streams in ("disk", "memory"):
        study["measure"] = {"streams": streams}
        found = run(study, tmp_path / streams, threads=1)
        assert found.losses.equals(whole.losses)
        assert found.routing.equals(whole.routing)
        assert not (tmp_path / streams / "streams").exists()
    # Its cells are those of the whole model.
    assert run(study, tmp_path / "whole", threads=1).losses.equals(whole.losses)


def test_streamed_in_processes_the_same(study, tmp_path):
    here = run(study, tmp_path / "here")
    study["models"][0]["stream"] = True
    there = run(study, tmp_path / "there", executor=processes(2))
    assert here.losses.equals(there.losses)


def test_killed_it_goes_on_behind_the_last_layer(study, tmp_path):
    """kill -9 in the middle of a shard: what was read of the layers before is not read again."""
    study["models"][0]["stream"] = True
    study["measure"] = {"batch_size": 64}
    out = tmp_path / "out"
    whole = run(study, tmp_path / "whole", threads=1)
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study))
    reads = []
    for _ in range(20):
        done = subprocess.run(
            [sys.executable, "-m", "tests.analysis.study.stopped", str(path), str(out)],
            capture_output=True,
            text=True,
        )
        reads.append(int(done.stdout.split()[-1]))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [*out.glob("streams/*/*")]
    assert len(reads) > 2
    assert max(reads) <= 3  # of the two layers of four files, and the next one
    assert an.read(out).losses.equals(whole.losses)


def test_what_a_larger_one_would_take(study, folder, tmp_path):
    """Told from its configuration; also of one that nobody has brought."""
    study["models"][0]["stream"] = True
    said = dry_run(an.Study.from_dict(study), tmp_path / "out")
    assert "4 cells, 0 finished" in said
    assert "of hidden states" in said
    config = json.loads((folder / "config.json").read_text())
    study["models"] = [{"name": "mine", "published": config}]
    absent = an.Study.from_dict(study)
    assert "mine: at most" in dry_run(absent, tmp_path / "out")
    with pytest.raises(ValueError, match=r"its user brings it: .*--model DIR"):
        an.run(absent, tmp_path / "out", progress=False)
    brought = an.Study.from_dict(study, model=folder)
    assert brought.models[0].hf == str(folder)
    found = an.run(brought, tmp_path / "out", progress=False)
    assert found.losses.model.unique().tolist() == ["mine"]


@pytest.mark.parametrize(
    ("models", "brought", "message"),
    [
        ([{"hf": "TINY"}], "TINY", "has no place for it"),
        ([{"name": "a", "published": {}}], None, "give at least model_type"),
        ([{"name": "a", "published": {"model_type": "mixtral"}}], "TINY", "of type 'olmoe'"),
        ([{"name": "a", "published": {"model_type": "olmoe"}}], "/nowhere", "is no model dir"),
        ([{"name": "a", "published": {"model_type": "olmoe"}, "hf": "TINY"}], None, "give one of"),
        ([{"published": {"model_type": "olmoe"}}], "TINY", "name"),
        ([{"name": n, "published": {"model_type": "olmoe"}} for n in "ab"], "TINY", "brings one"),
        ([{"path": "SMOE", "stream": True}], None, "models of the transformers library"),
    ],
)
def test_what_is_wrong_with_one_that_is_brought(
    study, folder, checkpoint_of, models, brought, message
):
    places = {"SMOE": str(checkpoint_of("smoe")), "TINY": str(folder)}
    swapped = [{k: places.get(str(v), v) for k, v in model.items()} for model in models]
    study["models"] = swapped
    with pytest.raises(ValueError, match=message):
        an.Study.from_dict(study, model=places.get(str(brought), brought))


def test_layers_that_a_larger_one_does_not_have(study, tmp_path):
    study["models"][0]["stream"] = True
    study["conditions"] = [{"perturbation": "DropTop", "where": "layer 40"}]
    with pytest.raises(ValueError, match=r"'layer 40'; layers with a router are those of 0 to 2"):
        dry_run(an.Study.from_dict(study), tmp_path / "out")


def test_a_study_is_finished_either_way(study, checkpoint_of, tmp_path):
    """At one number of threads; a compact model's cells never depend on how others are run."""
    study["models"].append({"path": str(checkpoint_of("smoe")), "name": "smoe"})
    plans = []
    for stream in (False, True):
        study["models"][0]["stream"] = stream
        plan = Plan.of(an.Study.from_dict(study), None)
        threads = [plan.platform(spec)["threads"] for spec in plan.study.models]
        plans.append(threads)
    assert plans == [[1, 1], [cores(), 1]]


def test_what_is_told_in_time(study, folder, tmp_path):
    """Of a streamed model: before anything is estimated or measured."""
    study["models"][0]["stream"] = True
    study["conditions"] = [{"perturbation": "Worst", "flips": 1}]
    for ask in (dry_run, partial(an.run, progress=False)):
        with pytest.raises(ValueError, match="Worst needs the whole model at once"):
            ask(an.Study.from_dict(study), tmp_path / "out")


def test_sizes_that_are_not_those_of_the_published_one(study, folder):
    config = json.loads((folder / "config.json").read_text())
    study["models"] = [{"name": "large", "published": config | {"num_hidden_layers": 48}}]
    with pytest.warns(UserWarning, match="called 'large'.*num_hidden_layers 3 in place of 48"):
        an.Study.from_dict(study, model=folder)
    study["models"] = [{"name": "x", "published": {"model_type": "olmo_moe"}}]
    with pytest.raises(ValueError, match="'olmo_moe', which there is not; near it: olmoe"):
        dry_run(an.Study.from_dict(study), folder / "out")


def test_before_the_weights_are_there(study, folder, tmp_path):
    """A directory with its configuration and tokenizer alone; and memory for all of it."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "mine").mkdir()
    for path in folder.glob("*.json"):
        (tmp_path / "mine" / path.name).write_bytes(path.read_bytes())
    for stream in (True, False):
        study["data"]["documents"] = 4
        study["models"] = [{"name": "mine", "published": config, "stream": stream}]
        file = tmp_path / "study.toml"
        file.write_text(to_toml(study))
        for more in (["--model", str(tmp_path / "mine")], []):
            command = ["run", str(file), "--out", str(tmp_path / "out"), "--dry-run", *more]
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.stderr
            assert "without the time of reading" in result.stdout
