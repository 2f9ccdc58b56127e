"""Routed experts, forward and backward, against autograd through a loop over slots in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cartmoe.experts import RoutedExperts, _grouped_experts, dispatch
from cartmoe.routing import Routing

GRADS = ("x", "weights", "gate_up", "down")


def looped(experts: RoutedExperts, x_TD, routing):
    """What a CPU runs."""
    return experts(x_TD, routing)


def grouped(experts: RoutedExperts, x_TD, routing):
    """What an accelerator runs; grouped matmuls work on a CPU too."""
    return _grouped_experts(x_TD, routing, experts.gate_up_ECD, experts.down_EDF)


def naive(experts: RoutedExperts, x_TD, routing):
    """One slot after the other."""
    gate_E, up_E = experts.gate_up_ECD.chunk(2, dim=1)
    y_TD = []
    for x, ids, weights in zip(x_TD, routing.ids_TK.tolist(), routing.weights_TK, strict=True):
        y = x * 0.0
        for i, w in zip(ids, weights, strict=True):
            if w != 0:
                h = F.silu(gate_E[i] @ x) * (up_E[i] @ x)
                y = y + w * (experts.down_EDF[i] @ h)
        y_TD.append(y)
    return torch.stack(y_TD) if y_TD else x_TD * 1.0


PATHS = pytest.mark.parametrize("path", [looped, grouped])


def make_experts(num_experts=5, d_model=8, width=12) -> RoutedExperts:
    experts = RoutedExperts(num_experts, d_model, width)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def make_routing(num_tokens, num_slots, num_experts, unused=0.0) -> Routing:
    """Random ids, the same one possibly twice in a row; a share of slots without weight."""
    ids_TK = torch.randint(num_experts, (num_tokens, num_slots))
    weights_TK = torch.rand(num_tokens, num_slots) + 0.1
    weights_TK[torch.rand(num_tokens, num_slots) < unused] = 0.0
    none_TE = torch.zeros(num_tokens, num_experts)
    return Routing(none_TE, none_TE, ids_TK, weights_TK)


def forward_backward(path, experts, x_TD, routing, dtype=torch.float32):
    """The output, and the gradients of a fixed linear function of it by name."""
    experts = copy.deepcopy(experts).to(dtype)
    x_TD = x_TD.to(dtype).requires_grad_()
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights_TK = routing.weights_TK.to(weight_dtype).requires_grad_()
    y_TD = path(experts, x_TD, routing._replace(weights_TK=weights_TK))
    direction_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=dtype).sin().view_as(y_TD)
    inputs = (x_TD, weights_TK, experts.gate_up_ECD, experts.down_EDF)
    grads = torch.autograd.grad((y_TD * direction_TD).sum(), inputs, allow_unused=True)
    filled = (torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True))
    return dict(zip(("y", *GRADS), (y_TD.detach(), *filled), strict=True))


def assert_agrees(got, expected, tolerance):
    """Relative to each tensor's largest entry: sums cancel, so entries alone say little."""
    for name, e in expected.items():
        assert got[name].shape == e.shape
        scale = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(
            got[name].double(), e.double(), rtol=0, atol=tolerance * (scale + 1e-30), msg=name
        )


@PATHS
@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0, 0.5, 1]),
    st.data(),
)
def test_forward_and_backward(path, num_tokens, num_slots, num_experts, unused, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    d_model, width = data.draw(st.sampled_from([4, 8, 20])), data.draw(st.sampled_from([4, 16]))
    experts = make_experts(num_experts, d_model, width)
    x_TD, routing = (
        torch.randn(num_tokens, d_model),
        make_routing(num_tokens, num_slots, num_experts, unused),
    )
    expected = forward_backward(naive, experts, x_TD, routing, torch.float64)
    assert_agrees(forward_backward(path, experts, x_TD, routing), expected, 2e-6)


@PATHS
def test_bf16_within_its_own_precision(path):
    experts, x_TD = make_experts(8, 32, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    routing = make_routing(64, 3, 8, unused=0.3)
    expected = forward_backward(naive, experts, x_TD, routing, torch.float64)
    got = forward_backward(path, experts, x_TD, routing, torch.bfloat16)
    assert got["y"].dtype == torch.bfloat16
    assert got["weights"].dtype == torch.float32
    assert_agrees(got, expected, 2e-2)


def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32():
    experts, x_TD = make_experts(4, 16, 16), torch.randn(20, 16)
    routing = make_routing(20, 2, 4)
    expected = forward_backward(naive, experts, x_TD, routing, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = forward_backward(looped, experts, x_TD, routing)
    assert got["y"].dtype == torch.bfloat16
    assert all(got[name].dtype == torch.float32 for name in GRADS)
    assert_agrees(got, expected, 3e-2)


@PATHS
def test_an_id_twice_adds_its_weights(path):
    experts, x_TD = make_experts(), torch.randn(4, 8)
    none = torch.zeros(4, 5)
    twice = Routing(none, none, torch.tensor([[3, 3]] * 4), torch.tensor([[0.25, 0.5]] * 4))
    once = Routing(none, none, torch.tensor([[3]] * 4), torch.tensor([[0.75]] * 4))
    a, b = (forward_backward(path, experts, x_TD, r) for r in (twice, once))
    del a["weights"], b["weights"]
    assert_agrees(a, b, 1e-6)


@PATHS
def test_unused_slots_cost_nothing_and_receive_no_gradient(path):
    """The expert behind the unused slots is all NaN: computing it at all would show."""
    experts, x_TD, routing = make_experts(), torch.randn(6, 8), make_routing(6, 3, 5)
    routing.ids_TK.clamp_(max=3)[:, 1] = 4
    routing.weights_TK[:, 1] = 0.0
    with torch.no_grad():
        experts.gate_up_ECD[4] = experts.down_EDF[4] = math.nan
    d = dispatch(routing.ids_TK, routing.weights_TK, 5)
    assert len(d.token_R) == 12
    got = forward_backward(path, experts, x_TD, routing)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert (got["weights"][:, 1] == 0).all()
    assert (got["weights"][:, 0] != 0).all()
    assert (got["gate_up"][4] == 0).all()
    assert (got["down"][4] == 0).all()


@PATHS
def test_dead_experts_get_zero_gradients(path):
    routing = make_routing(10, 2, 5)
    routing.ids_TK.fill_(2)
    got = forward_backward(path, make_experts(), torch.randn(10, 8), routing)
    for name in ("gate_up", "down"):
        assert got[name].flatten(1).any(-1).tolist() == [False, False, True, False, False]


@PATHS
@pytest.mark.parametrize(("num_tokens", "num_slots"), [(0, 2), (3, 2)])
def test_no_used_slot(path, num_tokens, num_slots):
    routing = make_routing(num_tokens, num_slots, 5, unused=1.0)
    got = forward_backward(path, make_experts(), torch.randn(num_tokens, 8), routing)
    assert got["y"].shape == (num_tokens, 8)
    assert not any(tensor.any() for tensor in got.values())


@PATHS
def test_a_token_without_experts_is_zero_beside_others(path):
    routing = make_routing(5, 2, 5)
    routing.weights_TK[[1, 4]] = 0.0
    y_TD = forward_backward(path, make_experts(), torch.randn(5, 8), routing)["y"]
    assert y_TD.any(-1).tolist() == [True, False, True, True, False]


@PATHS
def test_two_runs_are_equal_to_the_bit(path):
    experts, x_TD, routing = make_experts(8, 32, 32), torch.randn(300, 32), make_routing(300, 3, 8)
    first, second = (forward_backward(path, experts, x_TD, routing) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@PATHS
def test_order_of_slots_is_of_no_consequence(path):
    experts, x_TD, routing = make_experts(), torch.randn(30, 8), make_routing(30, 4, 5, unused=0.2)
    turned = routing._replace(ids_TK=routing.ids_TK.flip(1), weights_TK=routing.weights_TK.flip(1))
    a, b = (forward_backward(path, experts, x_TD, r) for r in (routing, turned))
    assert_agrees(b | dict(weights=b["weights"].flip(1)), a, 1e-6)


@PATHS
def test_inputs_and_gradients_that_are_not_contiguous(path):
    """x is a transposed view; the gradient of a sum is one number, expanded."""
    experts, x_TD, routing = make_experts(), torch.randn(8, 6).T, make_routing(6, 2, 5)
    grads = []
    for run in (path, naive):
        leaf_TD = x_TD.clone(memory_format=torch.preserve_format).requires_grad_()
        assert not leaf_TD.is_contiguous()
        grads += torch.autograd.grad(run(experts, leaf_TD, routing).sum(), leaf_TD)
    torch.testing.assert_close(*grads)


def test_weights_may_be_negative():
    """A perturbation's affair; only zero means unused."""
    routing = make_routing(6, 2, 5)
    routing.weights_TK[:, 0] *= -1
    experts, x_TD = make_experts(), torch.randn(6, 8)
    expected = forward_backward(naive, experts, x_TD, routing, torch.float64)
    assert_agrees(forward_backward(looped, experts, x_TD, routing), expected, 1e-6)


@pytest.mark.parametrize("multiple", [1, 4])
def test_dispatch_sorts_stably_by_expert(multiple):
    ids_TK = torch.tensor([[2, 0], [0, 2], [1, 0], [2, 1]])
    weights_TK = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    d = dispatch(ids_TK, weights_TK, 4, multiple)
    tokens = {b.expert: d.token_R[b.start : b.start + b.num_used].tolist() for b in d.blocks}
    assert tokens == {0: [0, 1, 2], 1: [3], 2: [0, 3]}
    assert all((b.stop - b.start) % multiple == 0 for b in d.blocks)
    assert d.blocks[-1].stop == len(d.token_R) == (6 if multiple == 1 else 12)


def test_without_gradients_the_output_is_the_same():
    experts, x_TD, routing = make_experts(), torch.randn(6, 8), make_routing(6, 2, 5)
    with torch.no_grad():
        y_TD = experts(x_TD, routing)
    assert not y_TD.requires_grad
    assert y_TD.equal(experts(x_TD, routing).detach())


def test_repr_says_the_sizes():
    assert "num_experts=5, d_model=8, width=12" in repr(make_experts())
