"""Import of the authors' checkpoints: their configuration, their parameter names.

The format is that of the public model code of arXiv 2410.16077 (a LLaMA with MoE layers).
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cartmoe.config import ModelConfig
from cartmoe.model import LanguageModel

# moe_top_k of their configuration says more than a number.
TOP_P, HASH = -1, -2


def config_from_reference(reference: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for one of theirs (the JSON beside their weights).

    Raises `ValueError` naming the key for what is missing or not supported.
    """
    ref = _Checked(reference)
    if ref.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {ref['hidden_act']!r}; only 'silu' is supported")
    if ref.get("tie_word_embeddings", False):
        raise ValueError("tie_word_embeddings is true; only untied embeddings are supported")
    shape = dict(
        vocab_size=ref["vocab_size"],
        d_model=ref["hidden_size"],
        ffn_width=ref["intermediate_size"],
        num_layers=ref["num_hidden_layers"],
        num_heads=ref["num_attention_heads"],
        norm_eps=ref["rms_norm_eps"],
        init_std=ref.get("initializer_range", 0.01),
        rope_base=ref.get("rope_theta", 10000.0),
    )
    if not ref["use_moe"]:
        return ModelConfig(family="dense", **shape)
    if ref["initial_moe_layer"] >= 0:
        shape |= dict(first_moe_layer=ref["initial_moe_layer"], moe_interval=1)
    else:
        shape |= dict(moe_interval=ref["expert_interval"])
    shape |= dict(num_experts=ref["num_experts"], shared_experts=ref["use_residual"])
    top_k = ref["moe_top_k"]
    if top_k == HASH:
        return ModelConfig(family="hash", top_k=(2,), **shape)
    if top_k == TOP_P:
        return ModelConfig(family="top_p", top_k=(min(2, ref["num_experts"]),), **shape)
    if ref["c2_fine_grain"]:
        return ModelConfig(family="cartesian", top_k=top_k, num_stages=2, **shape)
    if ref["fine_grain"]:
        grain = ref["grain_level"]
        return ModelConfig(family="fine_grained", top_k=top_k, grain=grain, **shape)
    return ModelConfig(family="smoe_share" if ref["use_residual"] else "smoe", top_k=top_k, **shape)


class _Checked(dict):
    def __missing__(self, key):
        raise ValueError(f"the reference configuration lacks {key!r}")


def from_reference(
    state_dict: Mapping[str, Tensor], config: ModelConfig | Mapping[str, Any]
) -> LanguageModel:
    """A model with the authors' weights.

    config   ours, or theirs as a mapping. Raises `ValueError` naming the tensors that are missing,
    left over, or of another shape than the configuration asks for.
    """
    if not isinstance(config, ModelConfig):
        config = config_from_reference(config)
    weights = _Weights(state_dict)
    with torch.device("meta"):
        model = LanguageModel(config)
    ours = {
        "trunk.embed.weight": weights.take("model.embed_tokens.weight"),
        "trunk.norm.weight": weights.take("model.norm.weight"),
        "head.weight": weights.take("lm_head.weight"),
    }
    for layer in range(config.num_layers):
        ours |= _layer(weights, config, layer)
    if config.gate == "table":
        table = weights.take("model.router_tokens.weight")
        ours |= {key: table for key in model.state_dict() if key.endswith("table_VE")}
        weights.ignore(r"\.wg\.weight$")  # their hash layers hold a gate that nothing reads
    # Of every LLaMA of that time; computed anew here.
    weights.ignore(r"rotary_emb\.inv_freq$")
    weights.check_all_used()
    for key, tensor in model.state_dict().items():
        if ours[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {tuple(ours[key].shape)}; the configuration asks for "
                f"{tuple(tensor.shape)}"
            )
    model.load_state_dict(_of_one_dtype(ours), assign=True)
    return model.requires_grad_()


def _of_one_dtype(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floats, but for routers' gates, which may have more digits, in a dtype that holds all of
    them; with a warning where that is another one for any."""
    floats = {
        name: tensor
        for name, tensor in ours.items()
        if tensor.is_floating_point() and ".router." not in name
    }
    numbers = Counter(tensor.dtype for tensor in floats.values())
    widest = functools.reduce(torch.promote_types, numbers)
    if len(numbers) == 1:
        return ours
    (usual, _), *_ = numbers.most_common()
    others = sorted(name for name, tensor in floats.items() if tensor.dtype != usual)
    warnings.warn(
        f"{len(others)} tensors are not of {usual} as most are, such as {others[0]}: all are taken "
        f"as {widest}, which holds every number as it is",
        stacklevel=3,
    )
    return ours | {name: tensor.to(widest) for name, tensor in floats.items()}


class _Weights:
    """Tensors by the authors' names, each to be taken once."""

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self.tensors, self.unused = state_dict, set(state_dict)

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"the reference checkpoint lacks {name}")
        self.unused.discard(name)
        return self.tensors[name].detach().clone()

    def swiglu(self, prefix: str, width: int) -> tuple[Tensor, Tensor]:
        """(2F, D) gate over up, and (D, F) down."""
        gate, up, down = (self.take(f"{prefix}.{p}_proj.weight") for p in ("gate", "up", "down"))
        for name, rows in (("gate", len(gate)), ("up", len(up)), ("down", down.shape[-1])):
            if rows != width:
                raise ValueError(
                    f"{prefix}.{name}_proj.weight has width {rows}; the configuration asks for "
                    f"{width}"
                )
        return torch.cat([gate, up]), down

    def ignore(self, pattern: str) -> None:
        self.unused = {name for name in self.unused if not re.search(pattern, name)}

    def check_all_used(self) -> None:
        if self.unused:
            names = ", ".join(sorted(self.unused)[:5])
            raise ValueError(
                f"the reference checkpoint has {len(self.unused)} tensors that the configuration "
                f"has no place for: {names}"
            )


def _layer(weights: _Weights, config: ModelConfig, layer: int) -> dict[str, Tensor]:
    theirs, ours = f"model.layers.{layer}", f"trunk.blocks.{layer}"
    qkv = [weights.take(f"{theirs}.self_attn.{p}_proj.weight") for p in "qkv"]
    out = {
        f"{ours}.norm.weight": weights.take(f"{theirs}.input_layernorm.weight"),
        f"{ours}.attention.qkv.weight": torch.cat(qkv),
        f"{ours}.attention.out.weight": weights.take(f"{theirs}.self_attn.o_proj.weight"),
    }
    post_norm = weights.take(f"{theirs}.post_attention_layernorm.weight")
    if not config.is_moe(layer):
        gate_up, down = weights.swiglu(f"{theirs}.mlp", config.ffn_width)
        return out | {
            f"{ours}.ffn.norm.weight": post_norm,
            f"{ours}.ffn.ffn.gate_up.weight": gate_up,
            f"{ours}.ffn.ffn.down.weight": down,
        }
    out[f"{ours}.ffn.norms.0.weight"] = post_norm
    cartesian = config.num_stages > 1
    if cartesian:
        out[f"{ours}.ffn.norms.1.weight"] = weights.take(f"{theirs}.mlp_layernorm.weight")
    for stage in range(config.num_stages):
        number = str(stage) if cartesian else ""
        out |= _stage(weights, config, theirs, f"{ours}.ffn.stages.{stage}", number)
    return out


def _stage(weights, config, theirs: str, ours: str, number: str) -> dict[str, Tensor]:
    width = config.expert_width
    experts = [
        weights.swiglu(f"{theirs}.mlp{number}.{e}", width) for e in range(config.num_experts)
    ]
    out = {
        f"{ours}.experts.gate_up_ECD": torch.stack([gate_up for gate_up, _ in experts]),
        f"{ours}.experts.down_EDF": torch.stack([down for _, down in experts]),
    }
    if config.gate == "linear":
        out[f"{ours}.router.gate.weight"] = weights.take(f"{theirs}.wg{number}.weight")
    if config.shared_experts:
        # Their fine-grained shared expert is the mean of FFNs side by side: one wide FFN here.
        names = [f".mlp{i}" for i in range(config.grain)] if config.grain > 1 else [""]
        parts = [weights.swiglu(f"{theirs}.res_mlp{number}{name}", width) for name in names]
        gate_up = torch.cat([torch.cat([g_u.chunk(2)[i] for g_u, _ in parts]) for i in (0, 1)])
        out |= {
            f"{ours}.shared.gate_up.weight": gate_up,
            f"{ours}.shared.down.weight": torch.cat([down for _, down in parts], 1),
            f"{ours}.mix.weight": weights.take(f"{theirs}.coefficient{number}.weight"),
            f"{ours}.mix.bias": weights.take(f"{theirs}.coefficient{number}.bias"),
        }
    return out
