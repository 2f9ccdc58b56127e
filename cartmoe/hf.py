"""The compact models as models of the transformers library: `import cartmoe.hf` makes them known.

    model = cartmoe.hf.from_checkpoint("cartesian")
    cartmoe.hf.export("cartesian", "cartesian-hf")        # model and tokenizer
    AutoModelForCausalLM.from_pretrained("cartesian-hf")  # generate, Trainer, lm-eval, ...

Tensors have the names of `cartmoe.LanguageModel`, and are computed with by its modules. Routers and
experts are called as those of the library are, experts with hidden states, ids and weights, so that
whatever looks for a mixture of experts there finds one. Shapes as in `cartmoe.model`.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from cartmoe.checkpoint import META, load, newest, read_meta, read_tokenizer
from cartmoe.config import FAMILIES, ModelConfig
from cartmoe.experts import RoutedExperts
from cartmoe.ffn import DenseLayer, MoELayer, RoutedStage
from cartmoe.files import path_of
from cartmoe.folders import write_folder
from cartmoe.model import Attention, LanguageModel
from cartmoe.routing import Router, Routing, TableGate, balance_loss, expert_counts
from cartmoe.tokenizers import JsonTokenizer

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


class CartmoeRouter(Router):
    """Chooses by one top-k, as routers of the library do. Which of two equal scores comes first is
    then not fixed; learned ones are never equal."""

    def choose(self, scores_TE: Tensor, k: int | None = None) -> Tensor:
        """(T, K) ids, best first."""
        slots = k or (self.num_experts if self.top_p else self.top_k)
        return self.selection_scores(scores_TE.detach()).topk(slots).indices


class CartmoeExperts(RoutedExperts):
    """Called with hidden states, ids and weights.

    gate_up_proj (E, 2F, D), down_proj (E, D, F)   what its tensors are called in the library
    """

    @property
    def gate_up_proj(self) -> nn.Parameter:
        """Gate above up projection."""
        return self.gate_up_ECD

    @property
    def down_proj(self) -> nn.Parameter:
        """Down projection."""
        return self.down_EDF

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:  # type: ignore[override]
        """(T, D)."""
        return super().forward(x_TD, Routing(weights_TK, weights_TK, ids_TK, weights_TK))


class CartmoeStage(RoutedStage):
    """Router, experts, shared expert."""

    router_class, experts_class = CartmoeRouter, CartmoeExperts

    def forward(self, h_TD: Tensor, token_ids_T: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(T, D) to be added to the stream. Token ids are asked for by a table (hash) alone."""
        routing = self.router(h_TD, token_ids_T)
        return self.combine(h_TD, self.experts(h_TD, routing.ids_TK, routing.weights_TK))


class CartmoeMoE(MoELayer):
    """A routed layer, whose stages are called with no more than they need."""

    stage_class = CartmoeStage

    def forward(self, u_BLD: Tensor, token_ids_BL: Tensor) -> Tensor:
        """(B, L, D): the stream behind the layer."""
        u_TD, ids_T = u_BLD.flatten(0, 1), token_ids_BL.flatten()
        if self.parallel:
            h_TD = self.norms[0](u_TD)
            made = [stage(h_TD, *self._ids(stage, ids_T)) for stage in self.stages]
            u_TD = u_TD + torch.stack(made).sum(0)
        else:
            for norm, stage in zip(self.norms, self.stages, strict=True):
                u_TD = u_TD + stage(norm(u_TD), *self._ids(stage, ids_T))
        return u_TD.view_as(u_BLD)

    def _ids(self, stage: Any, ids_T: Tensor) -> tuple[Tensor, ...]:
        return (ids_T,) if isinstance(stage.router.gate, TableGate) else ()


class CartmoeDense(DenseLayer):
    """A layer that is not routed."""

    def forward(self, u_BLD: Tensor, token_ids_BL: Tensor) -> Tensor:
        """(B, L, D): the stream behind the layer."""
        return u_BLD + self.ffn(self.norm(u_BLD))


class CartmoeBlock(nn.Module):
    """x + attention(norm(x)), then the feed-forward half; keys and values of earlier tokens may
    come from a cache."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        routed = FAMILIES[config.family].ffn == "moe" and config.is_moe(layer)
        table = None
        if config.gate == "table":  # the same in all blocks, of which a file holds each by itself
            table = TableGate(config.vocab_size, config.num_experts, config.hash_seed)
        self.ffn = (CartmoeMoE if routed else CartmoeDense)(config, table)

    def forward(
        self,
        x_BLD: Tensor,
        token_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """(B, L, D). attention_mask: which keys (B, 1, L, S) a query sees; None: all before it."""
        q, k, v = self.attention.heads(self.norm(x_BLD), position_ids[:, None])
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
        causal = attention_mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, is_causal=causal)
        return self.ffn(x_BLD + self.attention.merge(y), token_ids)


class CartmoePreTrainedModel(PreTrainedModel):
    """What both classes of models say of themselves."""

    config: CartmoeConfig
    config_class = CartmoeConfig
    base_model_prefix = "trunk"
    _no_split_modules = ["CartmoeBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(CartmoeRouter, index=0),
        "hidden_states": CartmoeBlock,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.constant_(parameter, 0.0 if name == "bias" else 1.0)


class CartmoeModel(CartmoePreTrainedModel):
    """Embedding, blocks, norm."""

    def __init__(self, config: CartmoeConfig):
        super().__init__(config)
        native = config.native
        self.embed: nn.Module = nn.Embedding(native.vocab_size, native.d_model)
        layers = range(native.num_layers)
        self.blocks = nn.ModuleList(CartmoeBlock(native, layer) for layer in layers)
        self.norm = nn.RMSNorm(native.d_model, eps=native.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of the tokens."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another one."""
        self.embed = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """(B, L, D) of (B, L) ids, and the cache."""
        x_BLD = self.embed(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = seen + torch.arange(x_BLD.shape[1], device=x_BLD.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BLD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        for block in self.blocks:
            x_BLD = block(x_BLD, input_ids, position_ids, mask, past_key_values)
        x_BLD = self.norm(x_BLD)
        return MoeModelOutputWithPast(last_hidden_state=x_BLD, past_key_values=past_key_values)


class CartmoeForCausalLM(CartmoePreTrainedModel, GenerationMixin):
    """The language model. The selection bias of a sigmoid is kept, and not updated by training."""

    def __init__(self, config: CartmoeConfig):
        super().__init__(config)
        self.trunk = CartmoeModel(config)
        self.head: nn.Module = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Another one."""
        self.head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """(B, L, V) logits of (B, L) ids; with labels (-100: none) their mean loss, to which, with
        output_router_logits, router_aux_loss_coef times the sum of the balance losses is added."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        made = self.trunk(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(made.last_hidden_state[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if output_router_logits and made.router_logits:
            aux_loss = self._balance(made.router_logits, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=made.past_key_values,
            hidden_states=made.hidden_states,
            router_logits=made.router_logits,
        )

    def _balance(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        """Of the tokens that are no padding."""
        real_T: Any = slice(None)
        if attention_mask is not None and attention_mask.numel() == len(router_logits[0]):
            real_T = attention_mask.flatten().bool()
        routers = [part for part in self.modules() if isinstance(part, CartmoeRouter)]
        taken = [r.route(logits[real_T]) for r, logits in zip(routers, router_logits, strict=True)]
        return torch.stack([balance_loss(r.scores_TE, expert_counts(r)) for r in taken]).sum()


AutoConfig.register("cartmoe", CartmoeConfig)
AutoModel.register(CartmoeConfig, CartmoeModel)
AutoModelForCausalLM.register(CartmoeConfig, CartmoeForCausalLM)


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
