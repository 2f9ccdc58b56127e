"""Import of the authors' checkpoints, against outputs of their code (tests/goldens)."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cartmoe.hooks import hook_routers
from cartmoe.reference import config_from_reference, from_reference

GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("*.safetensors"))
FAMILY_OF = {
    "cartesian_noshared": "cartesian",
    "cartesian_shared": "cartesian",
    "dense": "dense",
    "fine_grained_shared": "fine_grained",
    "hash": "hash",
    "smoe_share": "smoe_share",
    "smoe_top3": "smoe",
    "top1": "smoe_share",
    "top_p": "top_p",
}


def load(name):
    """(their weights, their configuration, the tensors of inputs and outputs)."""
    path = next(path for path in GOLDENS if path.stem == name)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("w."): tensors.pop(k) for k in list(tensors) if k.startswith("w.")}
    return weights, config, tensors


def drop_top(routing, router, site):
    """Each token's highest logit to -inf."""
    top_T1 = routing.logits_TE.argmax(-1, keepdim=True)
    return router.route(routing.logits_TE.scatter(-1, top_T1, -math.inf))


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_every_golden_is_here():
    assert [path.stem for path in GOLDENS] == sorted(FAMILY_OF)


@pytest.mark.parametrize("name", FAMILY_OF)
def test_logits(name):
    weights, config, golden = load(name)
    model = from_reference(weights, config)
    assert model.config.family == FAMILY_OF[name]
    assert_same(model(golden["input_ids"]), golden["logits"])


@pytest.mark.parametrize("name", sorted(set(FAMILY_OF) - {"hash", "dense"}))
def test_logits_without_the_best_expert(name):
    """Of every token in every router; the masked output must also be another than the clean."""
    weights, config, golden = load(name)
    model = from_reference(weights, config)
    with hook_routers(model, drop_top):
        logits = model(golden["input_ids"])
    assert_same(logits, golden["logits_disable_top1"])
    assert (logits - golden["logits"]).abs().max() > 1e-2


def test_a_configuration_of_ours_serves_as_well():
    weights, config, golden = load("cartesian_shared")
    model = from_reference(weights, config_from_reference(config))
    assert_same(model(golden["input_ids"]), golden["logits"])


def test_the_model_is_apart_from_the_tensors_it_came_from_and_learns():
    weights, config, golden = load("cartesian_shared")
    model = from_reference(weights, config)
    for tensor in weights.values():
        tensor.zero_()
    logits = model(golden["input_ids"])
    assert_same(logits, golden["logits"])
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_what_every_llama_of_the_time_carries_is_passed_over():
    weights, config, _ = load("dense")
    from_reference(
        weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, config
    )


# ---- configurations


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "cartesian_shared": dict(num_stages=2, shared_experts=True),
        "cartesian_noshared": dict(num_stages=2, shared_experts=False),
        "hash": dict(top_k=(2,), gate="table"),
        "top1": dict(top_k=(1,), renormalize=False),
        "smoe_top3": dict(top_k=(3,), shared_experts=False),
        "top_p": dict(top_p=0.4, renormalize=False),
    }.items(),
)
def test_configuration(name, expected):
    _, theirs, _ = load(name)
    config = config_from_reference(theirs)
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("change", "routed"),
    [
        (dict(initial_moe_layer=-1, expert_interval=2), [0, 2, 4]),
        (dict(initial_moe_layer=-1, expert_interval=3), [0, 3]),
        (dict(initial_moe_layer=4), [4, 5]),
        (dict(initial_moe_layer=0), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_which_layers_are_moe(change, routed):
    _, theirs, _ = load("smoe_share")
    config = config_from_reference(theirs | dict(num_hidden_layers=6) | change)
    assert [layer for layer in range(6) if config.is_moe(layer)] == routed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings is true"),
        (dict(moe_top_k=99), "top_k is 99; it must lie in 1..num_experts"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    _, theirs, _ = load("smoe_share")
    with pytest.raises(ValueError, match=message):
        config_from_reference(theirs | change)


@pytest.mark.parametrize("key", ["hidden_size", "use_moe", "num_experts", "moe_top_k"])
def test_a_missing_key_is_named(key):
    _, theirs, _ = load("smoe_share")
    del theirs[key]
    with pytest.raises(ValueError, match=f"the reference configuration lacks '{key}'"):
        config_from_reference(theirs)


# ---- tensors


def test_a_missing_tensor_is_named():
    weights, config, _ = load("cartesian_shared")
    del weights["model.layers.0.mlp_layernorm.weight"]
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp_layernorm\.weight"):
        from_reference(weights, config)


def test_a_tensor_left_over_is_named():
    weights, config, _ = load("cartesian_shared")
    weights["model.layers.0.surplus.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"1 tensors .* no place for: model\.layers\.0\.surplus"):
        from_reference(weights, config)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lm_head.weight", "head.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "trunk.blocks.0.ffn.norms.0.weight"),
    ],
)
def test_a_tensor_of_another_shape_is_named(theirs, ours):
    weights, config, _ = load("cartesian_shared")
    weights[theirs] = weights[theirs][:-1]
    with pytest.raises(ValueError, match=f"{ours} has shape .*; the configuration asks for"):
        from_reference(weights, config)
