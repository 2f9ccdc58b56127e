"""Compact models from checkpoints into the transformers library and back, with their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cartmoe.checkpoint import META, load, newest, read_meta, read_tokenizer
from cartmoe.files import path_of
from cartmoe.folders import write_folder
from cartmoe.hf.config import CartmoeConfig
from cartmoe.hf.model import CartmoeForCausalLM
from cartmoe.model import LanguageModel
from cartmoe.tokenizers import JsonTokenizer


def from_native(model: LanguageModel) -> CartmoeForCausalLM:
    """The same model, with tensors of its own."""
    made: Any = CartmoeForCausalLM(CartmoeConfig.of(model.config))
    made.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return made.eval()


def to_native(model: CartmoeForCausalLM) -> LanguageModel:
    """The inverse of `from_native`."""
    made = LanguageModel(model.config.native)
    made.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return made.eval()


def from_checkpoint(directory: str | Path) -> CartmoeForCausalLM:
    """The model of a checkpoint, of the newest one of a run, or of a name of `analysis.models`, in
    fp32. Raises as `cartmoe.checkpoint.load` does."""
    return from_native(load(directory).float())


def tokenizer_of(directory: str | Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer that a checkpoint was trained with; None where it does not say."""
    found = read_tokenizer(directory)
    if found is None:
        return None
    backend = Tokenizer.from_str(found.json) if isinstance(found, JsonTokenizer) else _of_bytes()
    start = backend.id_to_token(found.bos_id)
    starting = [(start, found.bos_id)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=starting
    )
    # A document ends where the next one starts, and one about that token does not.
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), start)
    return PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True, **tokens)


def _of_bytes() -> Tokenizer:
    """`cartmoe.tokenizers.ByteTokenizer` as one of the library: an id a byte, 0 starts a text."""
    start = "<|endoftext|>"
    letters = _letters()
    vocabulary = {start: 0} | {letters[byte]: byte for byte in range(1, 256)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.normalizer = normalizers.Replace("\0", " ")
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([start])
    return made


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE (GPT-2): itself where it can be
    seen, else the next one behind 255."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def export(directory: str | Path, out: str | Path) -> None:
    """Write the model of a checkpoint, a run or a name of `analysis.models`, and its tokenizer, as
    the library reads them, beside what is known of its training.

    Raises `FileExistsError` where out exists, and as `cartmoe.checkpoint.load` does.
    """
    found = newest(directory)
    model, tokenizer = from_checkpoint(found), tokenizer_of(found)

    def fill(folder: Path) -> None:
        if tokenizer is not None:
            for config in (model.config, model.generation_config):
                config.bos_token_id = config.eos_token_id = tokenizer.bos_token_id
                config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / META).write_text(json.dumps(read_meta(found), indent=1), encoding="utf-8")

    write_folder(path_of("out", out), fill)
