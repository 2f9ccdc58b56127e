"""A corpus of a few kilobytes, and training runs that take a second."""

import dataclasses
import random

import pytest

from cartmoe import ModelConfig
from cartmoe.train import TrainConfig


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of eight documents, the words of each its own."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        rng = random.Random(i)
        words = [f"{rng.choice('abcdefgh')}{rng.choice('aeiou')}n" for _ in range(12)]
        text = " ".join(f"{rng.choice(words)}{rng.randrange(9)}" for _ in range(900))
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory):
    """Where prepared corpora lie, for this process and its children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process
        yield


@pytest.fixture(scope="session")
def tiny_run(texts, token_cache):
    """tiny_run(family, **changes) -> (ModelConfig, TrainConfig); a change goes to who knows it."""
    model_fields = {field.name for field in dataclasses.fields(ModelConfig)}
    shape = dict(d_model=32, ffn_width=64, num_layers=2, num_heads=2, num_experts=4, init_std=0.1)
    short = dict(corpus=str(texts), batch_size=4, length=32, steps=6, precision="fp32")

    def build(family="cartesian", **changes):
        model = {k: v for k, v in changes.items() if k in model_fields}
        training = {k: v for k, v in changes.items() if k not in model_fields}
        return ModelConfig.preset("nano", family, **shape | model), TrainConfig(**short | training)

    return build
