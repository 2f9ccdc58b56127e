"""Models under study from checkpoints, and the documents that they are measured on."""

import json
import random
import shutil
import warnings

import pytest

from analysis.adapters.corpus import documents
from analysis.adapters.load import load
from cartmoe.config import ModelConfig
from cartmoe.data import prepare
from cartmoe.train import TrainConfig, train


def test_the_identity_follows_the_tensors(checkpoint_of):
    """An expert is pruned by hand, also past autograd's eyes, and comes back."""
    path = checkpoint_of("smoe_share")
    model, loaded = load(path), load(path).identity
    assert model.identity == loaded
    row = model.model.trunk.blocks[0].ffn.stages[0].router.gate.weight.data[2]
    kept = row.clone()
    row.zero_()
    assert model.identity not in (loaded, load(path).identity)
    row.copy_(kept)
    assert model.identity == loaded


# ---- documents that a model was trained on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve documents, the words of each its own."""
    folder = tmp_path_factory.mktemp("own")
    for i in range(12):
        rng = random.Random(i)
        (folder / f"{i}.txt").write_text(" ".join(f"w{rng.randrange(10**6)}" for _ in range(90)))
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory, environment):
    """A model that was trained on them."""
    shape = dict(d_model=32, ffn_width=64, num_layers=1, num_heads=2, num_experts=4)
    config = TrainConfig(corpus=str(folder), batch_size=2, length=32, steps=2, precision="fp32")
    out = tmp_path_factory.mktemp("run") / "m"
    train(ModelConfig.preset("nano", "smoe", **shape), config, out, progress=False)
    return load(out)


def ids(docs):
    return set(docs.document_id)


def split_of(folder, split):
    rows = prepare(folder).documents
    return set(rows.document_id[rows.split == split])


def test_a_model_is_measured_on_what_it_was_not_trained_on(folder, trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held_out = documents(folder, trained, length=64)
        assert ids(held_out) == split_of(folder, "validation")
        assert ids(documents(folder, trained, split="validation")) == ids(held_out)
    assert 0 < len(ids(held_out)) < 12


@pytest.mark.parametrize("split", ["all", "train"])
def test_unless_one_says_so_and_then_with_a_word(folder, trained, split):
    with pytest.warns(UserWarning, match=f"smoe was trained on documents of .*split='{split}'"):
        docs = documents(folder, trained, split=split)
    everything = split_of(folder, "train") | split_of(folder, "validation")
    assert ids(docs) == (everything if split == "all" else split_of(folder, "train"))


def test_the_text_is_known_where_it_is_moved_to(folder, trained, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert ids(documents(moved, trained)) == split_of(folder, "validation")
    for name in ids(documents(folder, trained)):
        (moved / name).unlink()
    (moved / "new.txt").write_text("another text. " * 20)
    assert ids(documents(moved, trained)) == {"new.txt"}


def test_a_part_of_the_text_is_known(folder, trained, tmp_path):
    """And a single file of it."""
    (seen, *_), (unseen, *_) = (sorted(split_of(folder, s)) for s in ("train", "validation"))
    for part in (folder / seen, folder / unseen):
        shutil.copy(part, tmp_path)
    assert ids(documents(tmp_path, trained)) == {unseen}
    with pytest.warns(UserWarning, match="was trained on documents of"):
        documents(folder / seen, trained, split="all")
    with pytest.raises(ValueError, match="has no validation documents"):
        documents(folder / seen, trained)


def test_the_place_is_known_where_no_groups_are_listed(folder, trained, tmp_path, monkeypatch):
    """As of a corpus of very many. A file more: the others stand where they stood."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "0.txt").write_text("another text. " * 20)
    meta = {name: of for name, of in trained.trained_on.items() if name != "groups"}
    monkeypatch.setattr(trained, "trained_on", meta | {"corpus": str(changed)})
    assert ids(documents(changed, trained)) == split_of(changed, "validation")


def test_another_python_moves_no_group(folder, trained, monkeypatch):
    """The standard library's are its packages: those that were trained on are withheld."""
    table = prepare("stdlib").documents
    moved = table[table.split == "validation"].group.iloc[0]
    groups = [*table[table.split == "train"].group.unique(), moved]
    monkeypatch.setattr(trained, "trained_on", {"groups": groups})
    held_out = ids(documents("stdlib", trained, length=64, max_tokens_per_document=64))
    assert held_out == set(table.group) - set(groups)


def test_a_folder_that_no_model_saw(folder, checkpoint_of):
    assert len(ids(documents(folder))) == 12
    model = load(checkpoint_of("smoe"))
    assert len(ids(documents(folder, model))) == 12
    assert ids(documents(folder, model, split="train")) == split_of(folder, "train")


def test_texts_in_memory_are_a_document_each(trained):
    texts = {"one": "a text of one's own", "two": "another text, longer than the first one"}
    docs = documents(texts, trained, length=16)
    assert ids(docs) == set(texts)
    assert set(docs.domain) == {"text"}
    assert docs.num_tokens == sum(map(len, texts.values())) == docs.num_bytes_S.sum()
    with pytest.raises(ValueError, match="corpus has a str and a list where it must have a name"):
        documents({"one": ["words"]}, trained)
    for wrong, message in (
        ({}, "corpus is empty; give at least one text by its name"),
        ({"one": " "}, "corpus 'texts given' is empty"),
        (["text"], "corpus is a list; give a path, or texts by name"),
    ):
        with pytest.raises(ValueError, match=message):
            documents(wrong, trained)


def test_texts_that_a_model_was_trained_on_are_found_again(folder, trained):
    """By their content, whatever they are called."""
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    held_out = documents(texts, trained)
    assert ids(held_out) == split_of(folder, "validation")
    with pytest.warns(UserWarning, match="was trained on documents of 'the texts given'"):
        documents(texts, trained, split="all")


@pytest.mark.parametrize("corpus", [None, "factorial:documents=40"])
def test_splits_that_there_are_not(folder, corpus):
    with pytest.raises(ValueError, match="split is 'nonsense'; choose one of 'train', 'valid"):
        documents(corpus or folder, split="nonsense")


def test_one_document_has_no_validation(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one text"}))
    assert len(ids(documents(tmp_path / "a.jsonl"))) == 1
    with pytest.raises(ValueError, match="has no validation documents: it takes at least two"):
        documents(tmp_path / "a.jsonl", split="validation")
