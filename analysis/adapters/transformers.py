"""Models of the transformers library as models under study: found by their structure, run by their
own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.adapters import layouts
from analysis.adapters.attach import probe_tokens, seats_of
from analysis.adapters.base import (
    ExpertsFunction,
    ForwardFunction,
    OutputFunction,
    RouterFunction,
    Segment,
)
from analysis.adapters.body import Body
from analysis.adapters.card import model_card
from analysis.adapters.checks import check_causal, check_coverage, checked, other_end
from analysis.adapters.form import call, is_library, logits_of, vocab_size_of
from analysis.adapters.given import given_to
from analysis.adapters.identity import module_sha256
from analysis.adapters.lists import listed_seats, numbered
from analysis.adapters.pretrained import origin_of, pretrained_sha256, read_model, tokenizer_in
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import stream_of, watch
from analysis.adapters.seat import Functions
from cartmoe.hooks import Hook, RouterSite, refuse_compiled
from cartmoe.interrupt import restoring
from cartmoe.tokenizers import Tokenizer


class TransformersAdapter:
    """See `analysis.adapters.base.Adapter`. The model is tried on a few tokens first.

    coverage   how much of its experts is seen

    Raises `ValueError` for a model that could not be measured exactly, saying why: experts that
    are called with other things than hidden states, ids and weights; a router that decides by more
    than its logits, or whose choice no mask changes; other logits layer by layer; no causality.
    """

    composed = streamed = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        identity: str | None = None,
        trained_on: Mapping[str, Any] | None = None,
        routers: Sequence[str] | None = None,
        experts: Sequence[str] | None = None,
    ):
        """identity, trained_on: those of the directory that it was loaded from, its "meta"."""
        self.model, self.tokenizer, self.train_seed = model, tokenizer, 0
        self.trained_on, self._loaded = trained_on or {}, {}
        text = model.config.get_text_config() if is_library(model) else None
        self.family = text.model_type if text else type(model).__name__
        self.vocab_size = text.vocab_size if text else vocab_size_of(model)
        self.name = name or self.family
        with torch.no_grad():
            self._attach(experts, routers)
        if identity:  # for as long as the model is the one that was read from there
            self._loaded = {self.identity: identity}

    def __repr__(self) -> str:
        size = f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {self.coverage}"
        return f"TransformersAdapter({self.name}: {self.family}, {size})"

    def _repr_html_(self) -> str:
        return model_card(self)

    def _attach(self, experts: Sequence[str] | None, routers: Sequence[str] | None) -> None:
        refuse_compiled(self.model)
        self._check_weights()
        if is_library(self.model) and self.model.config.is_encoder_decoder:
            raise ValueError(f"{self.name} has an encoder; this is for decoders of text alone")
        tokens_BL = probe_tokens(self.vocab_size, self.device)
        events, result = watch(self.model, partial(call, self.model, tokens_BL))
        logits_BLV = logits_of(result)
        other_BL = other_end(tokens_BL)
        if not self.streamed:  # else in the pass through its body
            check_causal(self.model, logits_BLV, logits_of(call(self.model, other_BL)))
        seats = [] if experts else seats_of(self.model, events)
        seats = numbered([*seats, *listed_seats(self.model, events, seats, experts, routers)])
        named = " that were named" if experts else ""
        self.coverage = check_coverage(self.model, seats, events) + named
        self.seats = {seat.site: seat for seat in seats}
        other = other_BL if self.streamed else None
        self.body = Body(self.model, seats, events, tokens_BL, logits_BLV, other)
        self.width = self.body.width
        for seat, routing in zip(seats, self.body.decisions, strict=True):
            seat.router = checked(seat.router, routing)

    def _check_weights(self) -> None:
        if any(p.is_meta for p in self.model.parameters()):
            raise ValueError(
                f"{self.name} has weights that are not in memory (on the device meta): load it "
                "whole, without offloading, or with stream=True"
            )

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        return self.model

    @property
    def identity(self) -> str:
        """Of the directory that it was loaded from, or else of all that decides what it computes;
        see `module_sha256`."""
        found = module_sha256(self.model)
        return self._loaded.get(found, found)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def sites(self) -> list[RouterSite]:
        """Every router in the order in which they run."""
        return list(self.seats)

    def segments(self) -> list[Segment]:
        """See `Body.segments`."""
        return self.body.segments()

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32: what the model makes of them where its body returns them."""
        return self.body.logits(hidden_TD)

    @restoring
    def hooked(
        self,
        *,
        forward: ForwardFunction | None = None,
        router: RouterFunction | None = None,
        experts: ExpertsFunction | None = None,
        output: OutputFunction | None = None,
        where: Callable[[RouterSite], bool] | None = None,
    ) -> Iterator[None]:
        """In the place of routers' and experts' own `forward`, which they call.

        Raises `ValueError` for a compiled model and where `where` selects nothing, `RuntimeError`
        for routers and experts that did not run as they did when the model was attached: others
        may have been put in their place meanwhile (kernels, for example).
        """
        refuse_compiled(self.model)
        chosen = [seat for site, seat in self.seats.items() if where is None or where(site)]
        if not chosen and (router or experts is not None or output):
            have = ", ".join(map(str, self.seats)) or "none"
            raise ValueError(f"where selects no router; the model has {have}")
        with ExitStack() as stack:
            if forward:
                begin = Hook(partial(self._begins, forward))
                end = Hook(partial(self._ends, forward), refuse=False)  # also behind a refusal
                stack.callback(self.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(self.model.register_forward_hook(end, always_call=True).remove)
            for seat in chosen:
                if output:
                    hook = Hook(partial(_leaves, output, seat.site))
                    stack.callback(seat.stage.register_forward_hook(hook).remove)
                if router or experts is not None:
                    stack.enter_context(seat.taken(Functions(router, experts)))
                seat.calls = 0
            yield
            silent = [seat.site.name for seat in chosen if seat.functions and not seat.calls]
        if silent:
            raise RuntimeError(f"routers that did not run inside the block: {', '.join(silent)}")

    def _begins(self, forward: Callable, _: Any, args: tuple, named: dict) -> None:
        for seat in self.seats.values():
            seat.calls = 0
        forward(given_to(self.model, args, named), None)

    def _ends(self, forward: Callable, _: Any, args: tuple, result: Any) -> None:
        forward(None, getattr(result, "past_key_values", None))
        seats = self.seats.values() if result is not None else ()  # else it raised something
        if other := [s.site.name for s in seats if s.functions and s.calls != 1]:
            raise RuntimeError(
                f"{other[0]} and its experts were not called once in this forward, as they were "
                "when the model was attached: something was put in their place since"
            )

    def router(self, site: RouterSite) -> TappedRouter:
        """The site's router."""
        return self.seats[site].router

    def expert_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor]:
        """gate (E, F, D), up (E, F, D), down (E, D, F); see `layouts`."""
        return self.seats[site].weights()

    def expert_outputs(
        self, site: RouterSite, x_TD: Tensor, ids: list[int] | None = None
    ) -> Tensor:
        """(E, T, D), or (len(ids), T, D), each from the experts module itself."""
        return self.seats[site].outputs(x_TD, range(site.num_experts) if ids is None else ids)

    def shared_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor] | None:
        """gate (F, D), up (F, D), down (D, F) of what stands beside the experts."""
        seat = self.seats[site]
        return layouts.shared_weights(seat.block, [seat.router.module, seat.experts])

    def stage_input(self, site: RouterSite, stream_TD: Tensor) -> Tensor:
        """Not known: of two routers in a layer nobody says how one follows the other."""
        raise ValueError(f"{self.name} does not tell how its stages follow: no composed experts")

    def combine(self, site: RouterSite, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): what its stage makes of it; see `Seat.stage`."""
        return self.seats[site].combine(x_TD, routed_TD)


def load_pretrained(
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    name: str | None = None,
    device: str = "cpu",
) -> TransformersAdapter:
    """The causal language model of a directory, in the dtype that it is stored in.

    Raises `ImportError` without the library, `ValueError` naming the directory where it cannot
    read that, and as `TransformersAdapter` does.
    """
    tokenizer = tokenizer or tokenizer_in(folder)
    identity = pretrained_sha256(folder)
    model = read_model(folder, device)
    meta = origin_of(folder)
    name = name or folder.resolve().name
    return TransformersAdapter(model, tokenizer, name=name, identity=identity, trained_on=meta)


def _leaves(output: OutputFunction, site: RouterSite, module: Any, args: tuple, result: Any) -> Any:
    """What a block returns, its hidden states changed."""
    stream = stream_of(result)
    changed_TD = output(stream.reshape(-1, stream.shape[-1]), site)
    if changed_TD is None:
        return None
    changed = changed_TD.view(stream.shape)
    return (changed, *result[1:]) if isinstance(result, tuple) else changed
