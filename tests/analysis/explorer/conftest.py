"""What the explorer's tests share: a tiny model of bytes, and a short text."""

import pytest

from analysis.adapters.load import adapt
from analysis.explorer.session import Session
from cartmoe.tokenizers import ByteTokenizer

TEXT = "def queue(size):\n\treturn [0] * size  # naïve, 漢字\n" * 2


@pytest.fixture(scope="session")
def model(tiny_model):
    """A Cartesian one that knows every byte."""
    return adapt(tiny_model("cartesian", vocab_size=256), ByteTokenizer())


@pytest.fixture
def session(model):
    """`TEXT`, in windows of 32 tokens."""
    return Session(model, TEXT, length=32)
