"""Families of the transformers library that have to work, and a directory as people have them."""

from pathlib import Path
from typing import Any

import tokenizers

from studies.families import tiny

# fmt: off
FAMILIES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "olmoe", "flex_olmo",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "dots1", "gpt_oss",
    "granitemoe", "granitemoeshared", "granitemoehybrid", "ernie4_5_moe", "hunyuan_v1_moe",
    "minimax", "minimax_m2", "longcat_flash", "jamba", "nemotron_h", "afmoe", "lfm2_moe",
    "cohere2_moe", "kimi_linear", "bailing_hybrid", "laguna", "mellum", "exaone_moe", "solar_open",
    "zaya", "gemma4", "mistral4",
]
# fmt: on
NOT_EXPERTS = ["zaya", "longcat_flash"]  # classes that are none stand among theirs


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
