"""Configurations: the paper's parameter counts, every option, every rejection."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cartmoe import FAMILIES, PRESETS, LanguageModel, ModelConfig

# paper.md, "Exact counts": (preset, family): (total, activated).
PAPER = {
    ("base", "dense"): (162_417_408, 162_417_408),
    ("base", "smoe"): (844_622_592, 258_042_624),
    ("base", "smoe_share"): (841_977_612, 247_435_020),
    ("base", "top_p"): (841_977_612, 247_435_020),
    ("base", "hash"): (841_903_884, 247_361_292),
    ("base", "fine_grained"): (842_051_340, 247_508_748),
    ("base", "cartesian"): (842_065_176, 247_522_584),
    ("large", "dense"): (468_239_360, 468_239_360),
    ("large", "smoe"): (2_893_792_256, 808_174_592),
    ("large", "smoe_share"): (2_884_379_672, 770_450_456),
    ("large", "top_p"): (2_884_379_672, 770_450_456),
    ("large", "hash"): (2_884_183_064, 770_253_848),
    ("large", "fine_grained"): (2_884_576_280, 770_647_064),
    ("large", "cartesian"): (2_884_613_168, 770_683_952),
}


def build_meta(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config)


def count(config: ModelConfig) -> tuple[int, int]:
    """(total, activated) parameters in closed form, from paper.md's equations alone."""
    D, V, E = config.d_model, config.vocab_size, config.num_experts
    expert = 3 * D * config.ffn_width // config.grain // config.num_stages
    total, unused = 2 * V * D + D, 0
    for layer in range(config.num_layers):
        total += 4 * D * D + D
        past = layer - config.first_moe_layer
        if config.family == "dense" or past < 0 or past % config.moe_interval:
            total += D + 3 * D * config.ffn_width
            continue
        total += D if config.composition == "parallel" else D * config.num_stages
        for k in config.top_k:
            total += E * expert + (0 if config.family == "hash" else E * D)
            total += config.shared_experts * (expert * config.grain + 2 * D + 2)
            unused += (E - k) * expert
    return total, total - unused


def test_paper_has_every_family_and_size():
    assert set(PAPER) == {(size, family) for size in ("base", "large") for family in FAMILIES}


@pytest.mark.parametrize(("preset", "family"), PAPER)
def test_parameter_counts_of_the_paper(preset, family):
    model = build_meta(ModelConfig.preset(preset, family))
    assert (model.num_parameters(), model.num_parameters(active=True)) == PAPER[preset, family]


@pytest.mark.parametrize(("preset", "apart"), [("micro", 0.012), ("nano", 0.01), ("small", 0.01)])
def test_families_cost_the_same_at_our_sizes(preset, apart):
    counts = {}
    for family in FAMILIES:
        config = ModelConfig.preset(preset, family)
        model = build_meta(config)
        counts[family] = (model.num_parameters(), model.num_parameters(active=True))
        assert counts[family] == count(config)
    total, active = counts["smoe_share"]
    for family in set(FAMILIES) - {"dense", "smoe"}:
        assert counts[family] == pytest.approx((total, active), rel=apart)


@given(st.data())
def test_counts_and_round_trip_of_any_configuration(any_config, data):
    config = data.draw(any_config)
    model = build_meta(config)
    assert (model.num_parameters(), model.num_parameters(active=True)) == count(config)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    unset = {name for name, value in config.to_dict().items() if value is None}
    assert unset <= {"top_p", "renormalize"}


@pytest.mark.parametrize(
    ("family", "expected"),
    {
        "dense": dict(shared_experts=False),
        "smoe": dict(num_experts=16, top_k=(3,), shared_experts=False, renormalize=True),
        "smoe_share": dict(num_experts=16, top_k=(2,), shared_experts=True, expert_width=3072),
        "hash": dict(top_k=(2,), gate="table", renormalize=True, shared_experts=True),
        "fine_grained": dict(num_experts=32, top_k=(4,), grain=2, expert_width=1536),
        "top_p": dict(top_p=0.4, renormalize=False, shared_experts=True),
        "cartesian": dict(num_experts=16, top_k=(2, 2), num_stages=2, expert_width=1536),
    }.items(),
)
def test_family_defaults(family, expected):
    config = ModelConfig.preset("base", family)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.init_std == 0.01
    assert config.rope_base == 10000.0
    assert config.norm_eps == 1e-6


def test_smoe_is_wider_also_in_its_dense_layers():
    assert ModelConfig.preset("base", "smoe").ffn_width == 3264
    assert ModelConfig.preset("large", "smoe").ffn_width == 4352


@pytest.mark.parametrize(
    ("changes", "routed"),
    [
        ({}, [0, 2, 4]),
        (dict(moe_interval=1), [0, 1, 2, 3, 4, 5]),
        (dict(moe_interval=3, first_moe_layer=1), [1, 4]),
        (dict(first_moe_layer=9), []),
        (dict(family="dense"), []),
    ],
)
def test_which_layers_are_moe(tiny_config, changes, routed):
    config = tiny_config(**(dict(family="smoe_share", num_layers=6) | changes))
    assert [layer for layer in range(6) if config.is_moe(layer)] == routed


def test_number_of_experts_follows_grain(tiny_config):
    config = tiny_config("fine_grained", grain=4, num_experts=None)
    assert (config.num_experts, config.top_k, config.expert_width) == (64, (8,), 8)


def test_one_expert_a_token_is_not_renormalised(tiny_config):
    assert not tiny_config("smoe_share", top_k=1).renormalize
    assert tiny_config("smoe_share", top_k=1, renormalize=True).renormalize


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(family="moe"), "family is 'moe'; choose one of 'dense', 'smoe', 'smoe_share',"),
        (dict(composition="sum"), "composition is 'sum'; choose one of 'sequential', 'parallel'"),
        (dict(score="relu"), "score is 'relu'; choose one of 'softmax', 'sigmoid'"),
        (dict(vocab_size=0), "vocab_size is 0; it must be at least 1"),
        (dict(d_model=0), "d_model is 0; it must be at least 1"),
        (dict(ffn_width=-4), "ffn_width is -4; it must be at least 1"),
        (dict(num_layers=0), "num_layers is 0; it must be at least 1"),
        (dict(num_heads=0), "num_heads is 0; it must be at least 1"),
        (dict(grain=0), "grain is 0; it must be at least 1"),
        (dict(num_stages=0), "num_stages is 0; it must be at least 1"),
        (dict(num_experts=0), "num_experts is 0; it must be at least 1"),
        (dict(moe_interval=0), "moe_interval is 0; it must be at least 1"),
        (dict(first_moe_layer=-1), "first_moe_layer is -1; it must be at least 0"),
        (dict(router_noise=-0.1), "router_noise is -0.1; it must be at least 0"),
        (dict(router_noise=float("nan")), "router_noise is nan; it must be a finite number"),
        (dict(top_k=0), "top_k is 0; it must lie in 1..num_experts=6"),
        (dict(top_k=(2, 7)), "top_k is 7; it must lie in 1..num_experts=6"),
        (dict(top_k=(2, 2, 2)), "top_k is (2, 2, 2); give one number, or one for each of the 2"),
        (dict(top_k=()), "top_k is (); give one number, or one for each of the 2 stages"),
        (dict(top_p=0.0), "top_p is 0.0; it must be more than 0"),
        (dict(top_p=1.0), "top_p is 1.0; it must be less than 1"),
        (dict(family="smoe", num_stages=2), "num_stages is 2; only family 'cartesian'"),
        (dict(family="smoe", composition="parallel"), "composition is 'parallel'; only family"),
        (dict(family="top_p", score="sigmoid"), "top_p needs score='softmax'"),
        (dict(family="hash", score="sigmoid"), "score is 'sigmoid'; family 'hash'"),
        (dict(d_model=18), "d_model is 18; it must be a multiple of 2 * num_heads = 4"),
        (dict(ffn_width=31), "ffn_width is 31; it must be a multiple of grain * num_stages = 2"),
        (dict(ffn_width=6, grain=2), "ffn_width is 6; it must be a multiple of grain * num_stages"),
    ],
)
def test_rejections_name_the_value_and_the_choices(tiny_config, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("arguments", "changes", "name", "choices"),
    [
        (("huge",), {}, "preset", PRESETS),
        (("nano", "moe"), {}, "family", FAMILIES),
        (("nano",), dict(experts=4), "field of ModelConfig", ["num_experts", "top_k"]),
    ],
)
def test_preset_lists_the_choices(arguments, changes, name, choices):
    with pytest.raises(ValueError, match=f"{name} is '.*'; choose one of") as error:
        ModelConfig.preset(*arguments, **changes)
    assert all(repr(choice) in str(error.value) for choice in choices)


def test_preset_takes_changes_as_they_are():
    config = ModelConfig.preset("nano", "smoe", ffn_width=64, num_layers=2)
    assert (config.ffn_width, config.num_layers, config.d_model) == (64, 2, 128)


def test_from_dict_names_what_is_unknown_or_missing(tiny_config):
    known = tiny_config().to_dict()
    with pytest.raises(ValueError, match="field of ModelConfig is 'experts'; choose one of"):
        ModelConfig.from_dict(known | dict(experts=3))
    with pytest.raises(ValueError, match="ModelConfig lacks family\nModelConfig lacks num_heads"):
        ModelConfig.from_dict({k: known[k] for k in known if k not in ("family", "num_heads")})


def test_config_is_a_value(tiny_config):
    assert tiny_config(top_k=2) == tiny_config(top_k=(2, 2))
    assert hash(tiny_config()) == hash(tiny_config())
    with pytest.raises(AttributeError):
        tiny_config().top_k = 3


def test_renormalization_is_decided_for_each_stage(tiny_config):
    config = tiny_config("cartesian", top_k=(2, 1))
    assert [config.renormalizes(stage) for stage in (0, 1)] == [True, False]
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "wrong",
    [dict(num_experts=4.5), dict(vocab_size=True), dict(top_k=2.0), dict(top_k="2"),
     dict(bias_rate=float("nan")), dict(router_noise=float("inf")), dict(init_std=-1)],
)  # fmt: skip
def test_a_number_of_the_wrong_kind_is_refused_by_name(tiny_config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tiny_config("cartesian", **wrong)
