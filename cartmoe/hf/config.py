"""The configuration of a compact model in the transformers library."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from cartmoe.config import FAMILIES, ModelConfig

# What the library takes for arguments of `generate`, under these names of its own.
RENAMED = {"top_k": "num_experts_per_tok", "top_p": "routing_top_p"}


def _names() -> dict[str, str]:
    """Of each field of `ModelConfig`, its name here."""
    return {field.name: RENAMED.get(field.name, field.name) for field in fields(ModelConfig)}


class CartmoeConfig(PreTrainedConfig):
    """The fields of `cartmoe.ModelConfig` (top_k as num_experts_per_tok, top_p as routing_top_p);
    those that are not given are those of its preset micro, of family cartesian.

    router_aux_loss_coef    what the sum of the routers' balance losses is multiplied by
    output_router_logits    whether it is added to the loss of labels

    Raises `ValueError` as `ModelConfig` does.
    """

    model_type = "cartmoe"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "intermediate_size": "ffn_width",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "initializer_range": "init_std",
        "rms_norm_eps": "norm_eps",
    }

    def __init__(
        self, router_aux_loss_coef: float = 0.01, output_router_logits: bool = False, **given: Any
    ):
        for name in RENAMED.keys() & given.keys():
            raise ValueError(f"{name} is {given[name]!r}; here it is called {RENAMED[name]}")
        given = {self.attribute_map.get(name, name): value for name, value in given.items()}
        ours = _names()
        chosen = {name: given.pop(own) for name, own in ours.items() if own in given}
        if "top_k" in chosen and not isinstance(chosen["top_k"], int):
            chosen["top_k"] = tuple(chosen["top_k"])
        native = ModelConfig.preset("micro", **chosen)
        kept = native.to_dict()
        if FAMILIES[native.family].ffn == "dense":  # whoever looks for experts is to find none
            kept = {name: v for name, v in kept.items() if name not in ("num_experts", "top_k")}
        given.setdefault("tie_word_embeddings", False)
        super().__init__(**given)
        for name, value in kept.items():
            setattr(self, ours[name], value)
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits

    @classmethod
    def of(cls, native: ModelConfig, **others: Any) -> CartmoeConfig:
        """Of such a model."""
        said = native.to_dict()
        return cls(**{own: said[name] for name, own in _names().items()}, **others)

    @property
    def native(self) -> ModelConfig:
        """The same of `cartmoe`."""
        said = {name: getattr(self, own, None) for name, own in _names().items()}
        return ModelConfig.from_dict(said)
