"""What every test runs under, and the tiny models that most of them use."""

import os
import signal
import sys

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy too, and of processes that are started
os.environ.setdefault("DOCUMENTS", "4")  # that notebooks read; `make notebooks` reads more

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from cartmoe import FAMILIES, LanguageModel, ModelConfig

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
# Also where the tests were started in the background, for which shells have Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

TINY = dict(vocab_size=13, d_model=16, ffn_width=32, num_layers=3, num_heads=2, num_experts=6)


def pytest_xdist_auto_num_workers(config):
    """As many processes as there are cores that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
        return LanguageModel(tiny_config(family, **changes)).eval()

    return build


@st.composite
def _configs(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    cartesian, softmax = family == "cartesian", family in ("hash", "top_p") or draw(st.booleans())
    stages = draw(st.integers(1, 3)) if cartesian else 1
    grain, num_experts = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    return ModelConfig(
        family=family,
        vocab_size=7,
        d_model=8,
        ffn_width=4 * grain * stages,
        num_layers=draw(st.integers(1, 3)),
        num_heads=draw(st.sampled_from([1, 2])),
        num_experts=num_experts,
        top_k=draw(st.tuples(*[st.integers(1, num_experts)] * stages)),
        grain=grain,
        shared_experts=draw(st.none() | st.booleans()),
        num_stages=stages,
        composition="parallel" if cartesian and draw(st.booleans()) else "sequential",
        moe_interval=draw(st.integers(1, 2)),
        first_moe_layer=draw(st.integers(0, 1)),
        top_p=draw(st.none() | st.floats(0.1, 0.95)) if softmax else None,
        score="softmax" if softmax else "sigmoid",
        renormalize=draw(st.none() | st.booleans()),
        rope_base=draw(st.sampled_from([10.0, 10000.0])),
        init_std=0.3,
    )


@pytest.fixture(scope="session")
def any_config():
    """A strategy: tiny configurations of every family with every option that it allows."""
    return _configs()
