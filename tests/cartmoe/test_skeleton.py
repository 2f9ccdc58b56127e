"""Models without weights."""

import subprocess
import sys

import pytest
import torch

from cartmoe import FAMILIES, LanguageModel
from cartmoe.skeleton import skeleton


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_model(tiny_config, family):
    config = tiny_config(family)
    before = torch.get_rng_state()
    got = skeleton(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert got.config == config
    assert all(tensor.is_meta for tensor in got.parameters())
    shapes = {name: (t.shape, t.dtype) for name, t in got.state_dict().items()}
    assert shapes == {n: (t.shape, t.dtype) for n, t in LanguageModel(config).state_dict().items()}


def test_the_compiler_is_not_imported():
    """It would take longer than to load a small model."""
    code = (
        "import sys; from cartmoe import ModelConfig; from cartmoe.skeleton import skeleton; "
        "skeleton(ModelConfig.preset('nano')); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
