"""A compact model in the transformers library: that library's forward around `cartmoe`'s modules.
Shapes as in `cartmoe.model`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from cartmoe.config import FAMILIES, ModelConfig
from cartmoe.experts import RoutedExperts
from cartmoe.ffn import DenseLayer, MoELayer, RoutedStage
from cartmoe.hf.config import CartmoeConfig
from cartmoe.model import Attention
from cartmoe.routing import Router, Routing, TableGate, balance_loss, expert_counts


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
