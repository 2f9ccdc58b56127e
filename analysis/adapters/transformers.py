"""Models of the transformers library as models under study: found by their structure, run by their
own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.adapters import layouts
from analysis.adapters.attach import check_coverage, check_router, probe_tokens, seats_of
from analysis.adapters.base import (
    ExpertsFunction,
    OutputFunction,
    RouterFunction,
    Segment,
    State,
)
from analysis.adapters.cartmoe import tensors_sha256
from analysis.adapters.pretrained import tokenizer_in
from analysis.adapters.router import TappedRouter
from analysis.adapters.running import run as run_segments
from analysis.adapters.seams import watch
from analysis.adapters.seat import Functions, Seat, stream_of
from analysis.adapters.stream import Layers, in_place_of, layers_of
from cartmoe.foreign import named
from cartmoe.hooks import Hook, RouterSite
from cartmoe.interrupt import restoring
from cartmoe.routing import Routing, raise_nonfinite
from cartmoe.tokenizers import Tokenizer


class TransformersAdapter:
    """See `analysis.adapters.base.Adapter`. The model is tried on a few tokens first.

    Raises `ValueError` for a model that could not be measured exactly, saying why: experts that
    are called with other things than hidden states, ids and weights; a router that decides by more
    than its logits, or whose choice no mask changes; other logits layer by layer.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str | None = None):
        self.model, self.tokenizer, self.train_seed = model, tokenizer, 0
        text = model.config.get_text_config()
        self.family, self.vocab_size = text.model_type, text.vocab_size
        self.name = name or self.family
        with torch.no_grad():
            self._attach()

    def __repr__(self) -> str:
        size = f"{self.model.num_parameters():,} parameters, {len(self.seats)} routers"
        return f"TransformersAdapter({self.name}: {self.family}, {size})"

    def _attach(self) -> None:
        tokens_BL = probe_tokens(self.vocab_size, self.device)
        run = partial(self.model, input_ids=tokens_BL, use_cache=False)
        events, result = watch(self.model, run)
        seats = seats_of(self.model, events)
        check_coverage(self.model, seats)
        self.seats = {seat.site: seat for seat in seats}
        self.layers = layers_of(self.model, events, [seat.experts for seat in seats])
        self.body = self.layers.owner if self.layers else self.model.base_model
        self._output = next(e.result for e in reversed(events) if e.module is self.body)
        taken = self._decisions(tokens_BL, result.logits)
        if taken is None and self.layers:  # they cannot be called again; all at once they can
            self.layers = None
            taken = self._decisions(tokens_BL, result.logits)
        if taken is None:
            raise ValueError(
                f"{self.name} gives other logits from its body and head alone: it does something "
                "before or behind them that is not seen here"
            )
        for seat, routing in zip(seats, taken, strict=True):
            check_router(seat.router, routing)

    def _decisions(self, tokens_BL: Tensor, logits_BLV: Tensor) -> Sequence[Routing] | None:
        """Those of a forward by segments, if it gives these logits to the last bit."""
        state = run_segments(self.segments(), tokens_BL)
        logits_TV = self.logits(state.hidden_BLD.flatten(0, 1))
        same = torch.equal(logits_TV, logits_BLV.flatten(0, 1).float())
        return state.decisions if same else None

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        return self.model

    @property
    def identity(self) -> str:
        """SHA-256 of its tensors."""
        return tensors_sha256(self.model)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def sites(self) -> list[RouterSite]:
        """Every router in the order in which they run."""
        return list(self.seats)

    def segments(self) -> list[Segment]:
        """embed, layer_0, ..., norm; or, where layers cannot be called again, the body at once,
        before which the stream is not known."""
        layers = self.layers
        if layers is None:
            return [
                self._segment("start", [], lambda _, tokens_BL: tokens_BL[..., None] * torch.nan),
                self._segment("body", [*self.seats.values()], self._body),
            ]
        steps = [self._segment("embed", [], lambda _, tokens_BL: layers.first(tokens_BL))]
        for number, layer in enumerate(layers.layers):
            inside = set(layer.modules())
            seats = [seat for seat in self.seats.values() if seat.experts in inside]
            steps.append(self._segment(f"layer_{number}", seats, partial(layers.run, number)))
        return [*steps, self._segment("norm", [], partial(self._norm, layers))]

    def _body(self, _: Tensor, tokens_BL: Tensor) -> Tensor:
        hidden_BLD = self.body(input_ids=tokens_BL, use_cache=False).last_hidden_state
        self._check_finite()
        return hidden_BLD

    def _norm(self, layers: Layers, hidden_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        self._check_finite()
        return layers.last(hidden_BLD, tokens_BL)

    def _check_finite(self) -> None:
        raise_nonfinite([(site.name, seat) for site, seat in self.seats.items()])

    def _segment(
        self, name: str, seats: list[Seat], forward: Callable[[Any, Tensor], Tensor]
    ) -> Segment:
        def run(state: State) -> State:
            taken: list[Routing] = []
            with ExitStack() as stack:
                for seat in seats:
                    stack.enter_context(seat.taken(Functions(taken=taken)))
                hidden_BLD = forward(state.hidden_BLD, state.tokens_BL)
            return State(hidden_BLD, state.tokens_BL, (*state.decisions, *taken))

        return Segment(name, run, tuple(seat.site for seat in seats))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32: what the model makes of them where its body returns them."""
        made = type(self._output)(last_hidden_state=hidden_TD[None])
        tokens = torch.zeros(1, len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
        with in_place_of([self.body], lambda *args, **kwargs: made):
            return self.model(input_ids=tokens, use_cache=False).logits[0].float()

    @restoring
    def hooked(
        self,
        *,
        forward: Callable[[Tensor | None], None] | None = None,
        router: RouterFunction | None = None,
        experts: ExpertsFunction | None = None,
        output: OutputFunction | None = None,
        where: Callable[[RouterSite], bool] | None = None,
    ) -> Iterator[None]:
        """In the place of routers' and experts' own `forward`, which they call.

        Raises `ValueError` where `where` selects nothing.
        """
        chosen = [seat for site, seat in self.seats.items() if where is None or where(site)]
        if not chosen and (router or experts is not None or output):
            have = ", ".join(map(str, self.seats)) or "none"
            raise ValueError(f"where selects no router; the model has {have}")
        with ExitStack() as stack:
            if forward:
                begin = Hook(lambda _, args, named: forward(named.get("input_ids", *args[:1])))
                end = Hook(lambda *_: forward(None), refuse=False)  # also behind a refusal
                stack.callback(self.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(self.model.register_forward_hook(end, always_call=True).remove)
            for seat in chosen:
                if output:
                    hook = Hook(partial(_leaves, output, seat.site))
                    stack.callback(seat.stage.register_forward_hook(hook).remove)
                if router or experts is not None:
                    stack.enter_context(seat.taken(Functions(router, experts)))
            yield

    def router(self, site: RouterSite) -> TappedRouter:
        """The site's router."""
        return self.seats[site].router

    def expert_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor]:
        """gate (E, F, D), up (E, F, D), down (E, D, F); see `layouts`."""
        return layouts.expert_weights(self.seats[site].experts, site.num_experts)

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
        """No such model has two stages a layer."""
        raise ValueError(f"{self.name} has no Cartesian layers: there are no composed experts")

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
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError('a pretrained model needs pip install "cartmoe[hf]"') from error
    tokenizer = tokenizer or tokenizer_in(folder)
    with named(folder):
        load: Any = AutoModelForCausalLM.from_pretrained
        model = load(folder, local_files_only=True, dtype="auto").to(device).eval()
    return TransformersAdapter(model, tokenizer, name=name or folder.resolve().name)


def _leaves(output: OutputFunction, site: RouterSite, module: Any, args: tuple, result: Any) -> Any:
    """What a block returns, its hidden states changed."""
    stream = stream_of(result)
    changed_TD = output(stream.reshape(-1, stream.shape[-1]), site)
    if changed_TD is None:
        return None
    changed = changed_TD.view(stream.shape)
    return (changed, *result[1:]) if isinstance(result, tuple) else changed
