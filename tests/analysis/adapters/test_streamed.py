"""Models of which a layer's weights are in memory at a time: the same numbers, to the last bit."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import analysis as an
from analysis.adapters.streamed import load_streamed
from analysis.measure import measure
from analysis.measure.calibrate import calibrate
from analysis.perturb import condition_from_text
from cartmoe.data import IGNORE, Sequences
from cartmoe.tokenizers import ByteTokenizer
from tests.analysis.adapters.families import FAMILIES, save_directory

# Of which layers cannot be called again; and one that the library itself loads from no directory.
LEFT_OUT = {"gemma4", "zaya", "mistral4"}
QUICK = {"olmoe", "gpt_oss", "deepseek_v3"}
CONDITIONS = [
    *("DropTop(1)", "DropTop(1), layer 1", "GaussianNoise(0.5)", "RandomRouting", "NoRouted"),
    *("ResidualNoise(of=DropTop(1))", "Lag(1)", "DropChosen(1)", "DropTop(1), replay"),
]


def documents(rows=6, length=12):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 250, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[1, 7:] = IGNORE
    names, sizes = [f"d{i}" for i in range(rows)], torch.full((rows,), length)
    return Sequences(tokens[:, :-1], targets, torch.arange(rows), names, ["x"] * rows, sizes)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(family): a tiny random model as it would be published."""
    made = {}

    def build(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("streamed") / family
            save_directory(folder, family)
            made[family] = folder
        return made[family]

    return build


def both(folder):
    whole = an.load(folder, tokenizer=ByteTokenizer())
    return whole, an.load(folder, tokenizer=ByteTokenizer(), stream=True)


def every():
    chosen = [family for family in FAMILIES if family not in LEFT_OUT]
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in chosen]


@pytest.mark.parametrize("family", every())
def test_the_same_cells(family, folder_of):
    whole, streamed = both(folder_of(family))
    conditions, docs = [condition_from_text(text) for text in CONDITIONS], documents()
    stats = [calibrate(model, docs) for model in (whole, streamed)]
    how = dict(batch_size=4, keep_tokens=True)
    expected = measure(whole, conditions, docs, calibration=stats[0], **how)
    before = streamed.shelf.reads
    found = measure(streamed, conditions, docs, calibration=stats[1], **how)
    assert streamed.shelf.reads - before <= 2 * len(streamed.shelf.layers)
    for one, other in zip(found, expected, strict=True):
        for name in ("losses", "routing", "tokens"):
            frames = getattr(one, name), getattr(other, name)
            pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize("family", ["gemma4", "zaya"])
def test_layers_that_cannot_be_called_again_are_refused(family, folder_of):
    with pytest.raises(ValueError, match="cannot be called again by themselves"):
        load_streamed(folder_of(family), ByteTokenizer())


def test_a_sweep_is_that_of_the_whole_model(folder_of):
    whole, streamed = both(folder_of("olmoe"))
    perturbations = [an.DropTop(1), an.GaussianNoise(0.5)]
    how = dict(batch_size=4, progress=False)
    found, expected = (
        an.sweep(model, documents(), perturbations, **how).damage(full=True)
        for model in (streamed, whole)
    )
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_two_layers_are_there_at_most(folder_of):
    _, streamed = both(folder_of("mixtral"))
    measure(streamed, [condition_from_text("DropTop(1)")], documents())
    layers = streamed.model.model.layers
    there = [not any(p.is_meta for p in layer.parameters()) for layer in layers]
    assert sum(there) <= 2


def test_identity_is_that_of_the_directory(folder_of):
    whole, streamed = both(folder_of("olmoe"))
    assert streamed.identity == whole.identity
    assert streamed.streamed
    assert streamed.sites() == whole.sites()


def test_what_is_searched_for_needs_the_whole_model(folder_of):
    _, streamed = both(folder_of("olmoe"))
    with pytest.raises(ValueError, match=r"Worst.*load it whole"):
        an.sweep(streamed, documents(), an.Worst(1), controls=False, progress=False)


def test_weights_that_are_missing(folder_of, tmp_path):
    folder = tmp_path / "olmoe"
    save_directory(folder, "olmoe")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "layers.1." in name and "q_proj" in name)]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"no weights for .*layers\.1"):
        load_streamed(folder, ByteTokenizer())


def test_what_cannot_be_streamed(folder_of):
    with pytest.raises(ValueError, match="stream is for models of the transformers library"):
        an.load("smoe", stream=True)
    with pytest.raises(ValueError, match="streamed runs on the CPU"):
        an.load(folder_of("olmoe"), stream=True, device="cuda")
