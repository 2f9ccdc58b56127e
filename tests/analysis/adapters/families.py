"""Tiny random models of the transformers library, made from their own config classes."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# fmt: off
FAMILIES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "flex_olmo",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "dots1", "gpt_oss",
    "granitemoe", "granitemoeshared", "granitemoehybrid", "ernie4_5_moe", "hunyuan_v1_moe",
    "minimax", "minimax_m2", "longcat_flash", "jamba", "nemotron_h", "afmoe", "lfm2_moe",
    "cohere2_moe", "kimi_linear", "bailing_hybrid", "laguna", "mellum", "exaone_moe", "solar_open",
    "zaya", "gemma4_text", "mistral4",
]
NOT_EXPERTS = ["zaya", "longcat_flash"]  # classes that are none stand among theirs

# What a configuration has of these, it gets.
SHRUNK = {
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
# fmt: on
LATENT = ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash"]
OWN: dict[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4} for family in LATENT},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {"enable_moe_block": True},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "llama4_text": {"interleave_moe_layer_step": 1},
}


def tiny(family: str, **changes: Any) -> Any:
    """A model of that family, with weights large enough for its experts to differ."""
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    have = {*vars(default), *getattr(default, "attribute_map", {})}
    shape = {name: value for name, value in SHRUNK.items() if name in have}
    config = config_class(**shape | OWN.get(family, {}) | changes)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # not every family is listed there
        model = getattr(transformers, config_class.__name__.replace("Config", "ForCausalLM"))(
            config
        )
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    return model


def save_directory(folder: Path, family: str, **changes: Any) -> None:
    """A model of that family with a tokenizer, as people download them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a text, and another text"], trainer)
    tiny(family, vocab_size=300, **changes).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|start|>"}}')
