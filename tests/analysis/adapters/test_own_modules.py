"""Models of one's own: experts in a list, found by what their block does, or named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis as an
from analysis.adapters import adapt, clean_routing
from analysis.perturb import Condition
from cartmoe.tokenizers import ByteTokenizer

E, K, D = 5, 2, 16


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, 24), nn.Linear(24, D), nn.Linear(D, 24)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """As many write it, from the Mixtral of 2023 on."""

    def __init__(self, shared):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.shared = Expert() if shared else None

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, ids = self.gate(flat).softmax(-1).topk(K)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return (out + self.shared(flat) if self.shared else out).view(x.shape)


class Layer(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.norm, self.mix, self.moe = nn.LayerNorm(D), nn.Linear(D, D), moe

    def forward(self, x):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]  # the mean of what was
        x = x + self.mix(past)
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    def __init__(self, moe=MoE, **how):
        super().__init__()
        self.position = nn.Embedding(16, D)  # in no use
        self.embed = nn.Embedding(256, D)
        self.layers = nn.ModuleList(Layer(moe(**how)) for _ in range(2))
        self.head = nn.Linear(D, 256)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(moe=MoE, **how):
    torch.manual_seed(0)
    model = Model(moe, **how).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    return model


@pytest.fixture(params=[False, True], ids=["", "shared"])
def model(request):
    return adapt(build(shared=request.param), ByteTokenizer())


TOKENS = torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(1))


def test_what_was_found(model):
    assert [site.name for site in model.sites()] == ["layers.0.moe.router", "layers.1.moe.router"]
    assert {(s.num_experts, s.top_k) for s in model.sites()} == {(E, K)}
    assert "2 of 2 MoE layers" in repr(model)
    assert [s.name for s in model.segments()] == ["embed", "layer_0", "layer_1", "norm"]
    facts = model.router(model.sites()[0]).facts
    assert facts == dict(top_k=K, renormalize=1.0, num_experts=E)


@torch.no_grad()
def test_its_decisions(model):
    moe = model.module.layers[0].moe
    x = model.module.embed(TOKENS)
    x = x + model.module.layers[0].mix(x.cumsum(1) / torch.arange(1, 10)[:, None])
    logits_TE = moe.gate(model.module.layers[0].norm(x).reshape(-1, D))
    weights, ids = logits_TE.softmax(-1).topk(K)
    routing = clean_routing(model, TOKENS)[model.sites()[0]]
    assert torch.equal(routing.ids_TK, ids)
    torch.testing.assert_close(routing.logits_TE, logits_TE)
    torch.testing.assert_close(routing.weights_TK, weights / weights.sum(-1, keepdim=True))


@torch.no_grad()
def test_nothing_is_changed_by_watching(model):
    plain = model.module(TOKENS)
    with an.perturbed(model, an.Identity()):
        assert torch.equal(model.module(TOKENS), plain)
    assert not any("forward" in vars(part) for part in model.module.modules())


@torch.no_grad()
def test_a_dropped_expert_is_as_if_it_were_masked_in_the_gate(model):
    with an.perturbed(model, an.DropExperts(ids=(2,))):
        dropped = model.module(TOKENS)
    for layer in model.module.layers:
        gate = layer.moe.gate
        layer.moe.gate = nn.Linear(D, E)
        layer.moe.gate.weight, layer.moe.gate.bias.data[:] = gate.weight, 0
        layer.moe.gate.bias.data[2] = -torch.inf
    torch.testing.assert_close(dropped, model.module(TOKENS), rtol=1e-4, atol=1e-4)


CONDITIONS = [
    *(an.DropTop(1), an.TopK(1), an.TopK(3), an.UniformWeights(1.0), an.GaussianNoise(0.5)),
    *(an.DropSlots(0.5), an.SwapRanks(), an.RandomRouting(), an.ResidualNoise(an.DropTop(1))),
    *(Condition(an.DropTop(1), effect=e) for e in ("selection", "weights", "no_refill")),
    *(Condition(an.DropTop(1), point="scores"), Condition(an.DropTop(1), downstream="replay")),
    an.Worst(1),
]


def test_a_sweep(model):
    docs = an.documents("stdlib", model, length=24, limit=3, max_tokens_per_document=48)
    found = an.sweep(model, docs, CONDITIONS, progress=False).damage(full=True).set_index("label")
    assert found.delta_nats.notna().all()
    assert found.delta_nats["Identity"] == 0
    assert found.flips["DropTop(1)"] == pytest.approx(1 / K)


def test_overlap(model):
    docs = an.documents("stdlib", model, length=24, limit=3, max_tokens_per_document=48)
    metrics = ["cka", "lift", "matched_cosine", "router_cosine"]
    found = an.measure_overlap(model, docs, metrics, progress=False)
    assert set(found.pairs.metric) == set(metrics)


class Apart(MoE):
    """Its experts are attributes; two of its matrices have a row an expert."""

    def __init__(self, shared=False):
        super().__init__(shared)
        for e, expert in enumerate(self.experts):
            setattr(self, f"expert_{e}", expert)
        self.other = nn.Linear(D, E, bias=False)
        del self.experts

    def forward(self, x):
        self.experts = [getattr(self, f"expert_{e}") for e in range(E)]
        flat = x.reshape(-1, D)
        noted = self.gate(flat)
        self.other(flat)  # for a loss of its own
        weights, ids = noted.softmax(-1).topk(K)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            out = out + expert(flat) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out.view(x.shape)


def test_named():
    with pytest.raises(ValueError, match=r"found no experts .* an\.adapt\(model, routers="):
        adapt(build(Apart))
    model = adapt(build(Apart), experts=["layers.*.moe.expert_*"], routers=["layers.*.moe.gate"])
    assert len(model.sites()) == 2
    with torch.no_grad():
        routing = clean_routing(model, TOKENS)[model.sites()[0]]
        x = model.module.embed(TOKENS)
        x = x + model.module.layers[0].mix(x.cumsum(1) / torch.arange(1, 10)[:, None])
        x_TD = model.module.layers[0].norm(x).reshape(-1, D)
        torch.testing.assert_close(routing.logits_TE, model.module.layers[0].moe.gate(x_TD))
        plain = model.module(TOKENS)
        with an.perturbed(model, an.DropTop(1)):
            assert not torch.equal(model.module(TOKENS), plain)


def test_names_that_there_are_not():
    with pytest.raises(ValueError, match=r"experts has 'layers\.\*\.mlp\.experts\.\*', which no"):
        adapt(build(shared=False), experts=["layers.*.mlp.experts.*"])


class Multiplied(MoE):
    """What experts give is not added up."""

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, ids = self.gate(flat).softmax(-1).topk(K)
        out = torch.ones_like(flat)
        for e, expert in enumerate(self.experts):
            out = out * (1 + expert(flat) * (weights * (ids == e)).sum(-1, keepdim=True))
        return out.view(x.shape)


class Ahead(Layer):
    def forward(self, x):
        return x + self.moe(self.norm(x + x.mean(1, keepdim=True)))


def test_what_cannot_be_exact_is_refused():
    with pytest.raises(ValueError, match="does not give the sum of its experts' outputs"):
        adapt(build(Multiplied, shared=False))
    model = build(shared=False)
    model.layers[0].__class__ = Ahead
    with pytest.raises(ValueError, match="Model is not causal"):
        adapt(model)
    with pytest.raises(ValueError, match="model is a str"):
        adapt("a model")
    with pytest.raises(ValueError, match="has no table of embeddings"):
        adapt(nn.Linear(2, 2))


def test_a_compiled_model_is_refused():
    model = build(shared=False)
    model._compiled_call_impl = model.forward  # what model.compile() sets
    with pytest.raises(ValueError, match="model is compiled"):
        adapt(model)


# ---- what a review found


class Scored(MoE):
    """With another function of logits than softmax and sigmoid."""

    def forward(self, x):
        flat = x.reshape(-1, D)
        p = F.softplus(self.gate(flat))
        weights, ids = (p / p.sum(-1, keepdim=True)).topk(K)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view(x.shape)


def test_scores_that_are_not_known_are_not_made_up():
    model = adapt(build(Scored, shared=False), ByteTokenizer())
    docs = an.documents("stdlib", model, length=16, limit=2, max_tokens_per_document=16)
    found = an.sweep(model, docs, [an.DropTop(1), an.GaussianNoise(1.0)], progress=False)
    assert found.damage().set_index("label").flips["DropTop(1)"] == pytest.approx(1 / K)
    for condition in (
        Condition(an.DropTop(1), point="scores"),
        Condition(an.DropTop(1), effect="weights"),
    ):
        with pytest.raises(ValueError, match="its scores cannot be told"):
            an.sweep(model, docs, [condition], progress=False)


@torch.no_grad()
def test_fewer_dimensions_than_experts():
    class Many(MoE):
        def __init__(self, shared):
            super().__init__(shared)
            self.gate = nn.Linear(D, 37, bias=False)
            self.experts = nn.ModuleList(Expert() for _ in range(37))

    model = adapt(build(Many, shared=True), ByteTokenizer())
    plain = model.module(TOKENS)
    assert {site.num_experts for site in model.sites()} == {37}
    with an.perturbed(model, an.DropExperts(ids=(36,))):
        dropped = model.module(TOKENS)
    for layer in model.module.layers:
        layer.moe.gate.bias = nn.Parameter(
            torch.zeros(37).index_fill(0, torch.tensor(36), -torch.inf)
        )
    torch.testing.assert_close(dropped, model.module(TOKENS), rtol=1e-4, atol=1e-4)
    assert not torch.equal(plain, dropped)


def test_in_bf16_with_a_shared_expert():
    model = adapt(build(shared=True).bfloat16(), ByteTokenizer())
    with torch.no_grad(), an.perturbed(model, an.Identity()):
        assert model.module(TOKENS).isfinite().all()


class Headed(Layer):
    """Heads, and a list whose members take no tensors, beside the experts."""

    def __init__(self, moe):
        super().__init__(moe)
        self.heads = nn.ModuleList(nn.Linear(D, D // 4) for _ in range(4))
        self.turns = nn.ModuleList(Turn() for _ in range(2))

    def forward(self, x):
        x = x + torch.cat([head(x) for head in self.heads], -1) + sum(t(3) for t in self.turns)
        return super().forward(x)


class Turn(nn.Module):
    def forward(self, length):
        return float(length)


def test_other_lists_are_no_experts():
    module = build(shared=False)
    for i, layer in enumerate(module.layers):
        module.layers[i] = Headed(layer.moe).eval()
    model = adapt(module, ByteTokenizer())
    assert [site.name for site in model.sites()] == ["layers.0.moe.router", "layers.1.moe.router"]


class Twice(Layer):
    """Two blocks of experts."""

    def __init__(self, moe):
        super().__init__(moe)
        torch.manual_seed(3)
        self.second = MoE(shared=False)

    def forward(self, x):
        x = super().forward(x)
        return x + self.second(self.norm(x))


def test_two_blocks_in_a_layer_are_two_stages():
    module = build(shared=False)
    for i, layer in enumerate(module.layers):
        module.layers[i] = Twice(layer.moe).eval()
    model = adapt(module, ByteTokenizer())
    assert [site.place for site in model.sites()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    docs = an.documents("stdlib", model, length=16, limit=2, max_tokens_per_document=16)
    found = an.sweep(
        model, docs, [Condition(an.DropTop(1), where="layer 0 stage 1")], progress=False
    )
    assert (
        found.routing[found.routing.condition == "clean"].groupby(["layer", "stage"]).ngroups == 4
    )


class Capped(MoE):
    """No expert takes more than sixteen tokens."""

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, ids = self.gate(flat).softmax(-1).topk(K)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            token, slot = token[:16], slot[:16]
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view(x.shape)


def test_a_capacity_is_refused():
    with pytest.raises(ValueError, match="experts may have a capacity"):
        adapt(build(Capped, shared=False))


def test_identity_follows_attributes_and_buffers():
    module = build(shared=False)
    module.layers[0].moe.k = 2
    module.register_buffer("mask", torch.zeros(3), persistent=False)
    model = adapt(module)
    seen = {model.identity}
    module.layers[0].moe.k = 1
    seen.add(model.identity)
    module.mask += 1
    seen.add(model.identity)
    assert len(seen) == 3


def test_coverage_says_what_was_named():
    named = adapt(build(shared=False), experts="layers.0.moe.experts.*")
    assert named.coverage.startswith("1 of 1 MoE layers")
    assert named.coverage.endswith("that were named")
    assert [site.layer for site in named.sites()] == [0]


class SharedFirst(MoE):
    def __init__(self, shared):
        super().__init__(shared)
        self.experts, self.common = None, nn.ModuleList(Expert() for _ in range(E))
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x):
        return super().forward(x) + sum(expert(x) for expert in self.common)


def test_weights_are_those_of_the_experts():
    model = adapt(build(SharedFirst, shared=False), experts=["layers.*.moe.experts.*"])
    gate_EFD, _, _ = model.expert_weights(model.sites()[0])
    experts = model.module.layers[0].moe.experts
    assert torch.equal(gate_EFD, torch.stack([e.w1.weight for e in experts]))


class Last(nn.Module):
    """Logits of the last token alone."""

    def __init__(self):
        super().__init__()
        self.whole = build(shared=False)

    def forward(self, tokens):
        return self.whole(tokens)[:, -1]


def test_what_gives_no_logits_of_every_token():
    with pytest.raises(ValueError, match=r"gives \(\d+, 256\) for token ids"):
        adapt(Last().eval())
    with pytest.raises(ValueError, match="tokenizer is a str"):
        adapt(build(shared=False), "bytes")
    with pytest.raises(ValueError, match="stands in no block with experts"):
        adapt(build(shared=False), routers=["layers.*.mix"])
