"""studies/olmoe.py: the models of the transformers library that come with the project."""

import json

import pytest
import torch

import analysis as an
from cartmoe.checkpoint import read_meta
from cartmoe.corpora import Document
from cartmoe.data import sequences_from
from cartmoe.folders import damage
from cartmoe.shipped import CHECK, MODELS, PRETRAINED
from studies import olmoe

NAMES = ["olmoe", "olmoe_tuned"]


@pytest.fixture(scope="module")
def text():
    return (MODELS / CHECK).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_whole(name):
    assert damage(PRETRAINED / name) is None
    meta = read_meta(PRETRAINED / name)
    assert meta["tokens"] == {"olmoe": 24_576_000, "olmoe_tuned": 2_457_600}[name]
    config = json.loads((PRETRAINED / name / "config.json").read_text())
    assert {key: config[key] for key in olmoe.SHAPE} == olmoe.SHAPE


@pytest.mark.parametrize("name", NAMES)
def test_it_is_as_good_as_the_compact_models(name, text):
    def bits_per_byte(path):
        model = an.load(path)
        docs = sequences_from([Document("d", "d", "d", text)], model.tokenizer, 256)
        return an.sweep(model, docs, [], progress=False).clean().bits_per_byte.item()

    assert bits_per_byte(name) < 1.05 * bits_per_byte("smoe")


@pytest.mark.slow
def test_experts_rounded_to_8_bits():
    """As notebook 03 does it: all change, a little, and decisions drift."""
    model, rounded = an.load("olmoe"), an.load("olmoe", name="int8")
    for site in rounded.sites():
        pairs = zip(
            model.seats[site].experts.parameters(),
            rounded.seats[site].experts.parameters(),
            strict=True,
        )
        for own, weight in pairs:
            scale = weight.data.abs().amax(-1, keepdim=True) / 127
            weight.data.copy_((weight.data / scale).round() * scale)
            assert not torch.equal(own, weight)
            assert (own - weight).abs().max() < 0.51 * scale.max()
    assert rounded.identity != model.identity
    docs = an.documents("stdlib", model, length=64, limit=6, max_tokens_per_document=64)
    found = an.compare({"olmoe": model, "int8": rounded}, docs, [an.DropTop(1)], progress=False)
    drift = found.drift().set_index("where").loc["all"]
    assert 0 < drift.js < 1e-3
    assert drift.experts == "as numbered"


@pytest.mark.slow
def test_it_is_trained_and_resumed(tmp_path, monkeypatch):
    """A few steps, stopped and gone on with: the same weights, and the directory that is kept."""
    monkeypatch.setattr(olmoe, "PRETRAINED", tmp_path / "kept")
    recipe = olmoe.Recipe("small", steps=4, learning_rate=1e-3, seed=0, batch_size=2, length=32)
    whole = olmoe.train(recipe, tmp_path / "whole", None)
    monkeypatch.setattr(olmoe, "EVERY", 2)
    first = olmoe.train(recipe, tmp_path / "parts", None)
    for folder in sorted((tmp_path / "parts" / "checkpoints").iterdir())[1:]:
        folder.rename(tmp_path / "away")
    again = olmoe.train(recipe, tmp_path / "parts", None)
    for name in ("model.safetensors",):
        assert (whole / name).read_bytes() == (first / name).read_bytes()
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    olmoe.ship(recipe, again)
    assert an.load(tmp_path / "kept" / "small").trained_on["tokens"] == 4 * 2 * 32
