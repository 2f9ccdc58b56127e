"""What every test runs under, and the tiny models that most of them use."""

import os
import sys

os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import pytest
import torch

from cartmoe import LanguageModel, ModelConfig

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

TINY = dict(vocab_size=13, d_model=16, ffn_width=32, num_layers=3, num_heads=2, num_experts=6)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(family, **changes) -> ModelConfig with weights large enough to route by."""

    def build(family: str = "cartesian", **changes) -> ModelConfig:
        return ModelConfig(family=family, **(TINY | dict(init_std=0.3) | changes))

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """tiny_model(family, seed=0, **changes) -> LanguageModel, the same for the same arguments."""

    def build(family: str = "cartesian", seed: int = 0, **changes) -> LanguageModel:
        torch.manual_seed(seed)
        return LanguageModel(tiny_config(family, **changes))

    return build
