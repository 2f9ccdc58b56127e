"""Which families of the installed transformers library can be measured, and how far.

    python -m studies.families --out runs/families

makes a tiny random model of each family whose experts are marked by the library's decorator, tries
it, and writes families.csv and families.md, a row a family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

DECORATOR = "use_experts_implementation"
LIBRARY = Path(transformers.__file__).parent / "models"

# fmt: off
# What a configuration has of these, it gets.
SHRUNK: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 24, "ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 24,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "moe_num_experts": 6,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "moe_top_k": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "sliding_window": 8, "zero_expert_num": 2, "num_layers": 2,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "router_hidden_size": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0,
    "global_head_dim": 8, "num_global_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
LATENT = ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash"]
OWN: dict[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4} for family in LATENT},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {"enable_moe_block": True},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "llama4_text": {"interleave_moe_layer_step": 1},
}
# fmt: on


def tiny(family: str, **changes: Any) -> Any:
    """A model of that family (`model_type`), with weights large enough for its experts to differ."""
    return tiny_of(class_of(family), **changes)


def class_of(family: str) -> type:
    """The causal language model of a family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config_class = CONFIG_MAPPING[family]
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    except KeyError:  # not every family is listed there
        return getattr(transformers, config_class.__name__.replace("Config", "ForCausalLM"))
