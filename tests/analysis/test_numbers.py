"""Numbers of NumPy and torch are numbers; wrong ones are refused by name, wherever they enter."""

import numpy as np
import pytest
import torch

import analysis as an
from cartmoe import ModelConfig
from cartmoe.config import check_whole
from cartmoe.factorial import Factorial

TWO = [np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)]

WRONG = [0, -1, 1.5, True, np.True_, torch.tensor(True), "2", None, 2**70, np.float64(2)]
WRONG += [torch.ones(2)]


def entrances(model, docs):
    """What takes a batch size, by name."""
    quiet = dict(progress=False)
    return {
        "sweep": lambda b: an.sweep(model, docs, an.Identity(), batch_size=b, **quiet),
        "compare": lambda b: an.compare(
            {"a": model, "b": model}, docs, an.Identity(), batch_size=b, **quiet
        ),
        "calibrate": lambda b: an.calibrate(model, docs, batch_size=b),
        "regret": lambda b: an.regret(model, docs, "layer 0", n=1, every=64, batch_size=b, **quiet),
        "flip_prediction": lambda b: an.flip_prediction(model, docs, np.float32(1), batch_size=b),
        "generation_agreement": lambda b: an.generation_agreement(
            model, docs, an.Identity(), prompt=2, new=1, batch_size=b, **quiet
        ),
        "measure_overlap": lambda b: an.measure_overlap(model, docs, "load", batch_size=b, **quiet),
    }


NAMES = [*entrances(None, None)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("two", TWO, ids=lambda v: type(v).__name__)
def test_two(model_of, shard, name, two):
    model = model_of("smoe_share")
    expected = entrances(model, shard[:4])[name](2)
    assert type(entrances(model, shard[:4])[name](two)) is type(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "wrong",
    [
        0,
        -1,
        1.5,
        True,
        np.True_,
        torch.tensor(True),
        "2",
        None,
        2**70,
        np.float64(2),
        torch.ones(2),
    ],
)
def test_no_batch_size(model_of, shard, name, wrong):
    with pytest.raises(ValueError, match="batch_size is "):
        entrances(model_of("smoe_share"), shard[:4])[name](wrong)


@pytest.mark.parametrize("two", TWO, ids=lambda v: type(v).__name__)
def test_whole(two):
    assert check_whole("x", two, 0) == 2
    assert type(check_whole("x", two, 0)) is int
    config = ModelConfig("smoe", 256, 32, 64, two, 2, num_experts=two, top_k=two)
    assert config == ModelConfig("smoe", 256, 32, 64, 2, 2, num_experts=2, top_k=2)
    assert an.DropTop(two) == an.DropTop(2)
    assert Factorial(documents=two).documents == 2


@pytest.mark.parametrize("huge", [2**63, 10**400])
def test_huge(huge):
    for make in (an.DropTop, an.Lag, lambda m: ModelConfig("smoe", m, 32, 64, 2, 2)):
        with pytest.raises(ValueError, match=r"it must be at most 9223372036854775807"):
            make(huge)


def test_no_float_is_as_large():
    for make in (an.GaussianNoise, an.Temperature):
        with pytest.raises(ValueError, match="it must be a finite number"):
            make(10**400)
    assert an.GaussianNoise(2**63).sigma == 2.0**63


def test_documents(texts, model_of):
    model = model_of("smoe_share")
    for name in ("limit", "length", "max_tokens_per_document"):
        with pytest.raises(ValueError, match=rf"{name} is 1\.5; it must be a whole number"):
            an.documents(texts, model, **{name: 1.5})
        assert len(an.documents(texts, model, **{name: np.int32(2)})) > 0


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True), 1.0, "2"], ids=repr)
def test_no_top_k(wrong):
    with pytest.raises(ValueError, match="top_k is "):
        ModelConfig("smoe", 256, 32, 64, 2, 2, top_k=wrong)
