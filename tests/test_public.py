"""studies/public: each is run on a tiny model of its family, and says what the real one needs."""

import json
import tomllib
from pathlib import Path

import pytest

import analysis as an
from analysis.adapters import shape_of
from analysis.study import dry_run
from tests.analysis.adapters.families import save_directory
from tests.analysis.adapters.test_streamed import packed
from tests.tiny import write_corpus

STUDIES = sorted((Path(__file__).parents[1] / "studies" / "public").glob("*.toml"))
# Bytes of their weights, in memory and in files, in GB: what the public checkpoints have.
SIZES = {
    "olmoe-1b-7b": (13.8, 13.8),
    "qwen3-30b-a3b": (61.1, 61.1),
    "gpt-oss-20b": (41.8, 13.8),
    "deepseek-v2-lite": (31.4, 31.4),
    "mixtral-8x7b": (93.4, 93.4),
    "glm-4.7-flash": (59.9, 59.9),
}


def table_of(path):
    return tomllib.loads(path.read_text())


def published(path):
    (model,) = table_of(path)["models"]
    return model["published"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("texts"), 90)


def shrunk(path, texts):
    """The study on few short texts, and on a layer that a tiny model has."""
    table = table_of(path)
    table["data"] |= dict(corpus=str(texts), length=24, max_tokens=24, documents=5, shard=3)
    table["measure"] |= dict(batch_size=2, calibration=2)
    for condition in table["conditions"]:
        if "where" in condition:
            condition["where"] = ["all", "layer 1"]
    return table


def test_there_is_one_for_each():
    assert [path.stem for path in STUDIES] == sorted(SIZES)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_on_a_tiny_model_of_its_family(path, texts, tmp_path):
    """With weights on the disk and in memory: the same numbers; what breaks nothing breaks
    nothing."""
    folder, family = tmp_path / "mine", published(path)["model_type"]
    if family == "gpt_oss":
        packed(folder, "bfloat16")
    else:
        save_directory(folder, family)
    table = shrunk(path, texts)
    assert table["models"][0]["stream"]
    table["models"][0]["published"] = {"model_type": family}  # other sizes are warned of
    study = an.Study.from_dict(table, model=folder)
    streamed = an.run(study, tmp_path / "streamed", progress=False, threads=1)
    table["models"][0]["stream"] = False
    whole = an.run(
        an.Study.from_dict(table, model=folder), tmp_path / "whole", progress=False, threads=1
    )
    assert streamed.losses.equals(whole.losses)
    damage = streamed.damage(full=True).set_index("label").delta_nats
    assert damage["Identity"] == 0
    assert damage.filter(like="RandomRouting").all(), damage
    assert len(damage) >= 12
    assert streamed.models.model.tolist() == [table["models"][0]["name"]]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_size_of_the_real_one(path):
    shape = shape_of(published(path))
    total, stored = SIZES[path.stem]
    assert shape.total / 1e9 == pytest.approx(total, abs=0.1)
    assert shape.stored / 1e9 == pytest.approx(stored, abs=0.1)
    study = an.Study.read(path)
    asked = {c.where.layer for c in study.conditions} - {None}
    assert asked <= set(shape.routed)
    assert max(asked) == shape.depth - 1


def test_what_it_needs_is_said_beforehand(texts, tmp_path):
    """Of a tiny model, with the directory and without."""
    folder = tmp_path / "mine"
    save_directory(folder, "glm4_moe_lite")
    (path,) = (path for path in STUDIES if path.stem == "glm-4.7-flash")
    config = json.loads((folder / "config.json").read_text())
    table = shrunk(path, texts)
    table["models"][0]["published"] = config
    said = {
        model: dry_run(an.Study.from_dict(table, model=model), tmp_path / "out")
        for model in (None, folder)
    }
    for text in said.values():
        assert "cells, 0 finished" in text
        assert "memory: about" in text
        assert "of hidden states" in text
    assert "at most" in said[None]
    assert "without the time of reading" in said[None]
    assert "without the time of reading" not in said[folder]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_real_olmoe_needs(tmp_path):
    """From two shallow models of the real size: 5 GB of memory, half a minute."""
    (path,) = (path for path in STUDIES if path.stem == "olmoe-1b-7b")
    said = dry_run(an.Study.read(path), tmp_path / "out")
    assert "16 layers, 16 with experts; 14 GB of weights" in said
    assert "about 6.1 GB, of which a layer has 839 MB" in said
