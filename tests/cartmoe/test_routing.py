"""Routers' decisions under ties, masks, top-p and biases; balance; gates that are not finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cartmoe.hooks import hook_routers
from cartmoe.routing import (
    EPS,
    LinearGate,
    Router,
    Routing,
    TableGate,
    balance_loss,
    expert_counts,
    stable_topk,
    update_selection_bias,
    z_loss,
)

INF = math.inf


def make_router(num_experts: int, top_k: int, **options) -> Router:
    """A router to be given logits directly."""
    return Router(torch.nn.Identity(), num_experts, top_k, **options)


def used(routing: Routing) -> list[dict[int, float]]:
    """Per token: expert -> weight."""
    return [
        {i: w for i, w in zip(ids, weights, strict=True) if w}
        for ids, weights in zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    ]


# ---- choose


@given(
    hnp.arrays(
        "float32", st.tuples(st.integers(0, 40), st.integers(1, 9)), elements=st.integers(0, 2)
    )
)
def test_ties_go_to_the_lower_index(scores):
    num_experts = scores.shape[1]
    for k in range(1, num_experts + 1):
        expected = [sorted(range(num_experts), key=lambda i: (-row[i], i))[:k] for row in scores]
        ids_TK = stable_topk(torch.from_numpy(scores), k)
        assert ids_TK.dtype == torch.int64
        assert ids_TK.tolist() == expected


def test_ties_in_many_wide_rows():
    scores_TE = torch.randint(0, 8, (2000, 64)).float()
    expected = scores_TE.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 8, 63, 64):
        assert stable_topk(scores_TE, k).equal(expected[:, :k])


def test_choice_is_best_first_and_differs_from_scores_only_by_order():
    routing = make_router(8, 3).route(torch.randn(50, 8))
    chosen_TK = routing.scores_TE.gather(-1, routing.ids_TK)
    assert chosen_TK.equal(routing.scores_TE.topk(3).values)
    assert not routing.ids_TK.requires_grad


# ---- weigh


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_weights_raw_or_renormalised(score, top_k):
    logits_TE = torch.randn(20, 5)
    raw, normed = (
        make_router(5, top_k, score=score, renormalize=r).route(logits_TE) for r in (False, True)
    )
    assert raw.ids_TK.equal(normed.ids_TK)
    assert raw.weights_TK.equal(raw.scores_TE.gather(-1, raw.ids_TK))
    torch.testing.assert_close(normed.weights_TK, raw.weights_TK / raw.weights_TK.sum(-1, True))


def test_sum_of_weights_is_floored_at_eps():
    """A sigmoid may be smaller than eps in every expert: weights then stay small."""
    routing = make_router(3, 2, score="sigmoid").route(torch.full((1, 3), -20.0))
    score = 1 / (1 + math.exp(20))
    assert 2 * score < EPS
    torch.testing.assert_close(routing.weights_TK, torch.full((1, 2), score / EPS))


def test_selection_bias_chooses_but_does_not_weigh():
    router = make_router(4, 2, score="sigmoid", renormalize=False)
    logits_TE = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    router.selection_bias_E[3] = 1.0
    assert used(router.route(logits_TE)) == [{3: pytest.approx(0.5), 0: pytest.approx(0.952574)}]


# ---- masks


@pytest.mark.parametrize("options", [{}, dict(score="sigmoid"), dict(top_p=0.9, renormalize=False)])
def test_fewer_experts_left_than_k(options):
    router = make_router(4, 3, **options)
    logits_TE = torch.tensor([[1.0, -INF, 1.0, -INF], [-INF, -INF, -INF, -2.0]])
    routing = router.route(logits_TE)
    weights = used(routing)
    assert [set(w) for w in weights] == [{0, 2}, {3}]
    assert weights[0] == {0: 0.5, 2: 0.5}
    assert weights[1][3] == pytest.approx(1)
    assert (routing.scores_TE[logits_TE == -INF] == 0).all()
    assert routing.ids_TK[:, 0].tolist() == [0, 3]


@pytest.mark.parametrize(
    "options", [{}, dict(score="sigmoid"), dict(top_p=0.4), dict(renormalize=False)]
)
def test_none_left(options):
    routing = make_router(4, 2, **options).route(torch.full((3, 4), -INF))
    assert (routing.scores_TE == 0).all()
    assert (routing.weights_TK == 0).all()
    assert ((routing.ids_TK >= 0) & (routing.ids_TK < 4)).all()


def test_a_row_without_experts_sends_no_nan_backward():
    logits_TE = torch.randn(3, 4, requires_grad=True)
    dead_T1 = torch.tensor([[False], [True], [False]])
    routing = make_router(4, 2, renormalize=False).route(logits_TE.masked_fill(dead_T1, -INF))
    routing.weights_TK.square().sum().backward()
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad.any(-1).tolist() == [True, False, True]


@given(hnp.arrays("bool", (8, 5)), st.integers(1, 5), st.floats(-20, 0), st.integers(0, 99))
def test_masked_experts_are_never_used_whatever_the_bias(mask, top_k, bias, seed):
    """A negative bias puts an expert that is left below a masked one's score of 0."""
    torch.manual_seed(seed)
    router = make_router(5, top_k, score="sigmoid")
    router.selection_bias_E += bias * torch.rand(5)
    mask_TE = torch.from_numpy(mask)
    routing = router.route(torch.randn(8, 5).masked_fill(mask_TE, -INF))
    for weights, left in zip(used(routing), (~mask_TE).tolist(), strict=True):
        assert all(left[i] for i in weights)
        assert len(weights) == min(top_k, sum(left))


# ---- top-p


def test_top_p_keeps_the_expert_that_crosses():
    scores = torch.tensor([[0.1, 0.35, 0.3, 0.25], [0.05, 0.85, 0.06, 0.04]])
    router = make_router(4, 2, top_p=0.4, renormalize=False)
    routing = router.route(scores.log())
    assert [set(w) for w in used(routing)] == [{1, 2}, {1}]
    torch.testing.assert_close(routing.weights_TK[0, :2], torch.tensor([0.35, 0.3]))
    assert routing.ids_TK.shape == (2, 4)


def test_top_p_exceeds_and_does_not_just_reach():
    routing = make_router(4, 2, top_p=0.5, renormalize=False).route(torch.zeros(1, 4))
    assert [set(w) for w in used(routing)] == [{0, 1, 2}]  # 0.25 + 0.25 is 0.5, not more


def test_top_p_takes_all_where_the_mass_left_never_exceeds_p():
    logits_TE = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    router = make_router(4, 2, top_p=0.4, renormalize=False)
    scores_TE = router.score(logits_TE).masked_fill(logits_TE == 3.0, 0.0)
    routing = router.decide(logits_TE, scores_TE)
    assert used(routing) == [{i: scores_TE[0, i].item() for i in (1, 2, 3)}]
    assert scores_TE.sum() < 0.4
    assert routing.logits_TE is logits_TE


# ---- gates


def test_linear_gate_works_in_fp32_under_autocast():
    gate = LinearGate(16, 4)
    torch.nn.init.normal_(gate.weight)
    x_TD = torch.randn(5, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits_TE = gate(x_TD, None)
    assert logits_TE.dtype == torch.float32
    assert logits_TE.equal(x_TD.float() @ gate.weight.T)


def test_table_gate_is_fixed_by_its_seed_alone():
    torch.manual_seed(1)
    a = TableGate(50, 4, seed=7)
    torch.manual_seed(2)
    b = TableGate(50, 4, seed=7)
    assert a.table_VE.equal(b.table_VE)
    assert not a.table_VE.equal(TableGate(50, 4, seed=8).table_VE)
    assert not list(a.parameters())
    assert a(None, torch.tensor([3, 3, 9])).equal(a.table_VE[[3, 3, 9]])
    assert TableGate(5000, 4, seed=0).table_VE.std() == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_noise_is_for_training_only():
    router = Router(LinearGate(4, 6), 6, 2, noise=1.0)
    torch.nn.init.normal_(router.gate.weight)
    x_TD, ids_T = torch.randn(500, 4), torch.zeros(500, dtype=torch.int64)
    clean_TE = router.gate(x_TD, ids_T)
    assert router.eval()(x_TD, ids_T).logits_TE.equal(clean_TE)
    noise_TE = router.train()(x_TD, ids_T).logits_TE - clean_TE
    assert noise_TE.std() == pytest.approx(1, abs=0.05)


# ---- non-finite gates


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_gate_that_is_not_finite_names_layer_stage_and_tokens(tiny_model, value):
    model = tiny_model("cartesian")
    gate = model.trunk.blocks[2].ffn.stages[1].router.gate
    gate.register_forward_hook(lambda m, args, out: out.index_fill(0, torch.tensor([1, 4]), value))
    with pytest.raises(FloatingPointError, match=r"not finite \(layer 2 stage 1: 2 tokens\)"):
        model(torch.arange(10).view(2, 5))


def test_all_gates_that_are_not_finite_are_named(tiny_model):
    model = tiny_model("hash")
    model.trunk.blocks[0].ffn.stages[0].router.gate.table_VE[3, 1] = math.nan
    tokens_BL = torch.tensor([[3, 1, 3], [2, 3, 0]])
    with pytest.raises(FloatingPointError, match=r"\(layer 0 .*: 3 tokens, layer 2 .*: 3 tokens\)"):
        model(tokens_BL)
    assert model(torch.tensor([[1, 2]])).isfinite().all()  # the next forward is judged anew


@pytest.mark.parametrize("family", ["smoe_share", "cartesian", "top_p", "hash"])
def test_a_perturbed_minus_infinity_is_legal(tiny_model, family):
    model = tiny_model(family)
    tokens_BL = torch.arange(10).view(2, 5)
    clean = model(tokens_BL)
    with hook_routers(model, lambda routing, router, site: router.route(routing.logits_TE - INF)):
        dead = model(tokens_BL)
    assert dead.isfinite().all()
    assert not dead.equal(clean)


# ---- load and losses


def test_counts_leave_unused_slots_out():
    routing = Routing(
        torch.zeros(3, 4),
        torch.zeros(3, 4),
        torch.tensor([[0, 1], [1, 1], [3, 0]]),
        torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]),
    )
    assert expert_counts(routing).tolist() == [1, 3, 0, 1]


def test_counts_of_no_token():
    routing = make_router(4, 2).route(torch.zeros(0, 4))
    assert expert_counts(routing).tolist() == [0, 0, 0, 0]


def test_balance_loss_is_1_balanced_and_e_collapsed():
    balanced = make_router(4, 1).route(100 * torch.eye(4).repeat(3, 1))
    collapsed = make_router(4, 1).route(torch.tensor([[100.0, 0, 0, 0]]).repeat(12, 1))
    for routing, expected in [(balanced, 1), (collapsed, 4)]:
        loss = balance_loss(routing.scores_TE, expert_counts(routing))
        assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_loss_of_parts_averages_to_the_whole(score):
    """As over ranks or accumulated batches, when all use the counts of the whole."""
    routing = make_router(6, 2, score=score).route(torch.randn(40, 6))
    counts_E = expert_counts(routing)
    parts = [balance_loss(scores, counts_E) for scores in routing.scores_TE.chunk(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), balance_loss(routing.scores_TE, counts_E))


def test_descent_on_the_balance_loss_balances():
    preference_E = torch.linspace(0, 2, 8).requires_grad_()
    logits_TE, router, loads = torch.randn(256, 8), make_router(8, 2), []
    for _ in range(100):
        routing = router.route(logits_TE + preference_E)
        loads.append(expert_counts(routing))
        (grad_E,) = torch.autograd.grad(balance_loss(routing.scores_TE, loads[-1]), preference_E)
        preference_E.data -= grad_E
    assert loads[0].max() > 2 * loads[0].float().mean()
    assert loads[-1].max() < 1.2 * loads[-1].float().mean()


def test_z_loss():
    assert z_loss(torch.zeros(3, 8)).item() == pytest.approx(math.log(8) ** 2)
    logits_TE = torch.tensor([[1.0, -INF, 1.0], [0.0, -INF, -INF]])
    assert z_loss(logits_TE).item() == pytest.approx((1 + math.log(2)) ** 2 / 2)


def test_selection_bias_moves_towards_balance():
    router = make_router(4, 1, score="sigmoid")
    logits_TE = torch.randn(400, 4) + torch.tensor([1.0, 0.5, 0.0, -1.0])
    before = expert_counts(router.route(logits_TE))
    update_selection_bias(router, before, 0.25)
    assert router.selection_bias_E.tolist() == (0.25 * (100 - before).sign()).tolist()
    for _ in range(300):
        update_selection_bias(router, expert_counts(router.route(logits_TE)), 0.005)
    after = expert_counts(router.route(logits_TE))
    assert before.max() > 180
    assert after.max() < 110
    balanced = router.selection_bias_E.clone()
    update_selection_bias(router, torch.full((4,), 100), 0.25)
    assert router.selection_bias_E.equal(balanced)
