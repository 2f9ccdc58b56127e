"""Kinds of tokens, and conditions that act on some alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis.adapters.base import as_adapter
from analysis.adapters.load import adapt
from analysis.measure.intervene import perturbed
from analysis.measure.shard import measure
from analysis.perturb.condition import Condition
from analysis.perturb.logits import GaussianNoise
from analysis.perturb.masks import DropTop
from analysis.perturb.where import KINDS, Where, kind_of, token_kinds
from cartmoe.data import Sequences
from cartmoe.hooks import capture_routing
from cartmoe.tokenizers import ByteTokenizer


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *(("a", "letter"), (" the", "letter"), ("É", "letter"), ("中文", "letter")),
        ("e\u0301", "letter"),
        *(("7", "digit"), (" 12ab", "digit"), ("½", "digit")),
        *((".", "punctuation"), ("_x", "punctuation"), (" (+", "punctuation")),
        *((" ", "space"), ("\n\t", "space"), ("\u00a0", "space")),
        *(("", "other"), ("\N{REPLACEMENT CHARACTER}", "other"), ("\x01", "other")),
    ],
)  # fmt: skip
def test_kind_of(text, kind):
    assert kind_of(text) == kind


def kinds_of(tokenizer):
    return token_kinds(SimpleNamespace(tokenizer=tokenizer), [Where(), Where(tokens="digit")])


def test_kinds_of_bytes():
    kinds = [KINDS[k] for k in kinds_of(ByteTokenizer())]
    assert len(kinds) == 256
    assert kinds[ord("x")] == "letter"
    assert kinds[ord("0")] == "digit"
    assert kinds[ord(" ")] == kinds[ord("\n")] == "space"
    assert kinds[ord("(")] == kinds[ord("_")] == "punctuation"
    assert kinds[0] == "other"  # bos
    assert set(kinds[128:]) == {"other"}  # parts of characters
    assert kinds.count("letter") == 52
    assert kinds.count("digit") == 10


def test_kinds_of_another_tokenizer():
    class Words:
        vocab_size = 4

        def decode(self, ids):
            return "".join(["<s>", " of", "3", "\n"][i] for i in ids)

    assert [KINDS[k] for k in kinds_of(Words())] == ["punctuation", "letter", "digit", "space"]


def test_kinds_are_found_out_only_where_they_are_asked_for():
    model = SimpleNamespace(tokenizer=ByteTokenizer())
    assert token_kinds(model, [Where(), Where(positions=(0, 4))]) is None
    assert token_kinds(SimpleNamespace(tokenizer=None), [Where(tokens="digit")]) is None


# ---- conditions


@pytest.fixture(scope="module")
def model(tiny_model):
    return adapt(tiny_model("smoe_share", vocab_size=256), ByteTokenizer())


TEXT = b"ab 12, c3\n"
TOKENS_BL = torch.tensor([list(TEXT), list(TEXT[::-1])])


@pytest.mark.parametrize("kind", ["letter", "digit", "punctuation", "space"])
def test_only_those_tokens_are_perturbed(model, kind):
    with (
        torch.no_grad(),
        perturbed(model, DropTop(1), f"layer 0 tokens {kind}"),
        capture_routing(model.model) as seen,
    ):
        model.model(TOKENS_BL)
    masked_T = next(iter(seen.values()))[0].logits_TE.isinf().any(-1)
    kinds_V = kinds_of(model.tokenizer)
    assert masked_T.equal(kinds_V[TOKENS_BL.flatten()] == KINDS.index(kind))
    assert masked_T.any()
    assert not masked_T.all()


def test_measured_as_perturbed(model):
    """`measure` and `perturbed` agree on which tokens are meant."""
    targets_SL = TOKENS_BL.roll(-1, 1)
    shard = Sequences(
        TOKENS_BL, targets_SL, torch.tensor([3, 4]), ["a", "b"], ["x", "x"], torch.tensor([10, 10])
    )
    condition = Condition(GaussianNoise(2.0), "positions 1: tokens letter")
    clean, cell = measure(model, [condition], shard)
    with (
        torch.no_grad(),
        perturbed(model, condition.perturbation, condition.where, sequence_ids=[3, 4]),
    ):
        nll = torch.nn.functional.cross_entropy(
            model.model(TOKENS_BL).transpose(1, 2), targets_SL, reduction="none"
        )
    np.testing.assert_allclose(cell.losses.nll_sum, nll.double().sum(-1), rtol=1e-5)
    letters = np.array([sum(b >= 65 for b in row) for row in TOKENS_BL[:, 1:].tolist()])
    assert (cell.routing.groupby("sequence_id", sort=False).changed.max() <= letters).all()
    assert (cell.losses.nll_sum != clean.losses.nll_sum).all()


def test_without_a_tokenizer(tiny_model, shard):
    model = as_adapter(tiny_model("smoe_share"))
    with pytest.raises(ValueError, match="kinds of tokens need a model with tokenizer"):
        measure(model, [Condition(DropTop(1), "tokens digit")], shard)
    with (
        pytest.raises(ValueError, match="kinds of tokens need a model with tokenizer"),
        perturbed(model, DropTop(1), "tokens digit"),
    ):
        model.model(TOKENS_BL % 13)
