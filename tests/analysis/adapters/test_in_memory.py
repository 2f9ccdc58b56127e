"""Models in memory that somebody prepared: moved, offloaded, packed, of other families."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from transformers.utils.quantization_config import Mxfp4Config

import analysis as an
from analysis.adapters import adapt
from cartmoe.tokenizers import ByteTokenizer
from studies.families import tiny


@pytest.fixture(scope="module")
def plain():
    return adapt(tiny("olmoe"), ByteTokenizer())


@pytest.fixture(scope="module")
def docs(plain):
    return an.documents("stdlib", plain, length=24, limit=3, max_tokens_per_document=48)


def damage(model, docs):
    conditions = [an.DropTop(1), an.RandomRouting()]
    return an.sweep(model, docs, conditions, progress=False).damage(full=True).delta_nats


def test_accelerate_places_it_on_devices(plain, docs):
    placed = dispatch_model(tiny("olmoe"), device_map={"": "cpu"}, force_hooks=True)
    assert damage(adapt(placed, ByteTokenizer()), docs).equals(damage(plain, docs))


def test_what_is_offloaded_is_refused():
    with pytest.raises(ValueError, match="olmoe has weights that are not in memory"):
        adapt(cpu_offload(tiny("olmoe"), execution_device="cpu"))


def test_another_implementation_is_another_model(plain, docs):
    other = tiny("olmoe")
    other.set_experts_implementation("eager")
    model = adapt(other, ByteTokenizer())
    assert model.identity != plain.identity
    assert damage(model, docs).sub(damage(plain, docs)).abs().max() < 1e-4


def test_packed_experts_that_route_by_themselves():
    """As the library's MXFP4 does: router and experts are never called."""
    model = tiny("gpt_oss")
    for layer in model.model.layers:
        router = layer.mlp.router
        layer.mlp.forward = lambda x, router=router: (x, F.linear(x, router.weight, router.bias))
    model.config.quantization_config = Mxfp4Config()
    with pytest.raises(ValueError, match=r"packed in MXFP4.*Mxfp4Config\(dequantize=True\)"):
        adapt(model)


def test_weights_that_are_packed_have_no_metrics():
    model = adapt(tiny("olmoe"), ByteTokenizer())
    experts = model.seats[model.sites()[0]].experts
    packed = experts.down_proj.data.mul(100).to(torch.int8)
    experts.down_proj = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"OlmoeExperts keeps its weights packed \(torch.int8"):
        model.expert_weights(model.sites()[0])


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("dbrx", "are not called with hidden states, ids and weights"),
        ("llama4", "are not called with hidden states, ids and weights"),
        ("jetmoe", "are not called with hidden states, ids and weights"),
        ("deepseek_v4", "no linear operation that gives logits"),
        ("inkling", "no linear operation that gives logits"),
        ("doge", "is not causal"),
        ("switch_transformers", "has an encoder"),
        ("nllb_moe", "has an encoder"),
    ],
)
def test_families_that_cannot_be_exact_are_refused(family, why):
    with pytest.raises(ValueError, match=why):
        adapt(tiny(family))


def test_a_router_without_top_k():
    """It decides, and what cannot be told from its code is refused by name."""
    model = adapt(tiny("phimoe"), ByteTokenizer())
    router, logits_TE = model.router(model.sites()[0]), torch.randn(7, 6)
    assert router.route(logits_TE).ids_TK.shape == (7, 2)
    with pytest.raises(ValueError, match="its scores cannot be told"):
        router.decide(logits_TE, logits_TE.softmax(-1))
    assert router.route(logits_TE).scores_TE.isnan().all()
