"""Chunked losses against F.cross_entropy on all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from cartmoe import losses
from cartmoe.losses import IGNORE, mean_loss, token_losses

T, D, V = 23, 8, 11


@pytest.fixture(params=[1, 4, 23, 24, 1000], ids="chunks of {}".format)
def _chunks(request, monkeypatch):
    """As many tokens a chunk: one, some with a rest, all but none to spare, all."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", request.param * V)


def make_batch(ignored=(), dtype=torch.float32):
    targets_T = torch.randint(V, (T,))
    targets_T[list(ignored)] = IGNORE
    x_TD = torch.randn(T, D, dtype=dtype, requires_grad=True)
    return x_TD, torch.randn(V, D, dtype=dtype, requires_grad=True), targets_T


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("ignored", [(), (0, 3, 4, 22), range(1, 23)])
def test_mean_loss_and_its_gradients(ignored):
    x_TD, weight_VD, targets_T = make_batch(ignored)
    loss = mean_loss(x_TD, weight_VD, targets_T)
    expected = F.cross_entropy(x_TD @ weight_VD.T, targets_T, ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected)
    for scale in (1.0, -2.5):  # what stands behind the loss scales its gradients
        got = torch.autograd.grad(scale * loss, (x_TD, weight_VD), retain_graph=True)
        want = torch.autograd.grad(scale * expected, (x_TD, weight_VD), retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("ignored", [(), (0, 3, 4, 22), range(23)])
def test_token_losses(ignored):
    x_TD, weight_VD, targets_T = make_batch(ignored)
    got = token_losses(x_TD, weight_VD, targets_T)
    logits_TV = x_TD @ weight_VD.T
    expected = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(got, expected.detach())
    assert (got[list(ignored)] == 0).all()
    assert not got.requires_grad


def test_all_ignored_is_zero_with_zero_gradients():
    x_TD, weight_VD, targets_T = make_batch(range(T))
    loss = mean_loss(x_TD, weight_VD, targets_T)
    loss.backward()
    assert loss.item() == 0
    assert not x_TD.grad.any()
    assert not weight_VD.grad.any()


def test_no_token():
    weight_VD, none_T = torch.randn(V, D, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    x_TD = torch.zeros(0, D, requires_grad=True)
    loss = mean_loss(x_TD, weight_VD, none_T)
    loss.backward()
    assert loss.item() == 0
    assert not weight_VD.grad.any()
    assert token_losses(x_TD, weight_VD, none_T).shape == (0,)


def test_huge_logits_overflow_nothing():
    x_TD, weight_VD, targets_T = make_batch()
    loss = mean_loss(1e4 * x_TD, weight_VD, targets_T)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(1e4 * x_TD @ weight_VD.T, targets_T))
    assert x_TD.grad.isfinite().all()


def test_bf16_inputs_are_summed_in_fp32(monkeypatch):
    """Many chunks and tokens: sums of bf16 would lose most of the later terms."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 8 * V)
    x_TD = torch.randn(4000, D).bfloat16().requires_grad_()
    weight_VD = torch.randn(V, D).bfloat16().requires_grad_()
    targets_T = torch.randint(V, (4000,))
    logits_TV = F.linear(x_TD, weight_VD).float()
    loss, nll_T = mean_loss(x_TD, weight_VD, targets_T), token_losses(x_TD, weight_VD, targets_T)
    assert loss.dtype == nll_T.dtype == torch.float32
    expected_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    torch.testing.assert_close(nll_T, expected_T.detach())
    torch.testing.assert_close(loss, expected_T.mean(), rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(loss, weight_VD)
    exact_VD = weight_VD.detach().double().requires_grad_()
    F.cross_entropy(x_TD.detach().double() @ exact_VD.T, targets_T).backward()
    tolerance = 0.02 * exact_VD.grad.abs().max().item()
    torch.testing.assert_close(got.double(), exact_VD.grad, rtol=0, atol=tolerance)


def test_autocast_returns_gradients_in_the_inputs_dtype():
    x_TD, weight_VD, targets_T = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_loss(x_TD, weight_VD, targets_T)
    loss.backward()
    assert loss.dtype == x_TD.grad.dtype == weight_VD.grad.dtype == torch.float32
    expected = F.cross_entropy(x_TD @ weight_VD.T, targets_T)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


def test_chunks_never_hold_more_logits_than_they_may(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * V)
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: seen.append(len(x)) or linear(x, w))
    mean_loss(*make_batch())
    assert seen == [5, 5, 5, 5, 3]
