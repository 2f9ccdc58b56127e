"""What misleads in models of the transformers library, where no other file tests it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis as an
from analysis.adapters import adapt
from cartmoe.tokenizers import ByteTokenizer
from studies.families import tiny

TOKENS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
OPERATIONS = {
    "matmul": lambda x, w: x @ w.T,
    "mm": lambda x, w: torch.mm(x, w.T),
    "addmm": lambda x, w: torch.addmm(torch.zeros(len(w)), x, w.T),
    "einsum": lambda x, w: torch.einsum("td,ed->te", x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w.T[None])[0],
    "float": lambda x, w: F.linear(x.float(), w.float()).float(),
    "softcap": lambda x, w: 3 * torch.tanh(F.linear(x, w) / 3),
    "multiplied": lambda x, w: 0.5 * F.linear(x, w),
}


class Gate(nn.Module):
    """OLMoE's router with another operation."""

    def __init__(self, own, operation):
        super().__init__()
        self.weight, self.operation = own.weight, operation

    def forward(self, hidden_states):
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.operation(x_TD, self.weight)
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(2)
        return logits_TE, weights_TK, ids_TK


@torch.no_grad()
@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_gives_the_logits(name):
    module = tiny("olmoe")
    for layer in module.model.layers:
        layer.mlp.gate = Gate(layer.mlp.gate, OPERATIONS[name])
    model, plain = adapt(module, ByteTokenizer()), module(TOKENS, use_cache=False).logits
    used = []

    def watch(x_TD, routing, site, own):
        used.append(routing)

    with an.perturbed(model, an.DropExperts(ids=(1,))), model.hooked(experts=watch):
        dropped = module(TOKENS, use_cache=False).logits
    assert len(used) == 3
    assert not any(((r.ids_TK == 1) & (r.weights_TK != 0)).any() for r in used)
    assert not torch.equal(dropped, plain)


GROUPED = {
    "deepseek_v2": dict(topk_method="group_limited_greedy"),
    "deepseek_v3": {},
    "glm4_moe": {},
    "mistral4": {},
    "axk2": {},
}


@torch.no_grad()
@pytest.mark.parametrize("family", GROUPED)
def test_a_masked_expert_of_a_masked_group_is_not_chosen(family):
    """Groups that are out are filled with 0, which is more than -inf."""
    module = tiny(family, n_group=3, topk_group=1, **GROUPED[family])
    model = adapt(module, ByteTokenizer())
    used = []

    def watch(x_TD, routing, site, own):
        used.append(routing)

    with an.perturbed(model, an.DropExperts(ids=(0, 2, 4))), model.hooked(experts=watch):
        module(input_ids=TOKENS, use_cache=False)
    for routing in used:
        weight_TK = routing.weights_TK * (routing.ids_TK % 2 == 0)
        assert (weight_TK == 0).all()
        assert (routing.weights_TK.sum(-1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_edits_of_returned_logits_change_nothing(family):
    """By then the router has chosen; ours reach the choice."""
    module = tiny(family)
    model, plain = adapt(module, ByteTokenizer()), module(TOKENS, use_cache=False).logits

    def hide(router, args, returned):
        return tuple(
            -torch.inf * torch.ones_like(part) if part.shape[-1] == 6 else part for part in returned
        )

    hooks = [seat.router.module.register_forward_hook(hide) for seat in model.seats.values()]
    by_hand = module(TOKENS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(by_hand, plain)
    with an.perturbed(model, an.DropTop(1)):
        assert not torch.equal(module(TOKENS, use_cache=False).logits, plain)
