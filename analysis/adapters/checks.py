"""What a model of anybody's must hold to be measured exactly; what does not is refused, saying why.

Shapes: B batch, L length, T = B * L tokens, E experts, K slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.form import is_library
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import TOKENS, Event
from analysis.adapters.seat import Seat
from cartmoe.routing import Routing

ROWS = 24  # of one text: some expert gets this many times its tokens
# What configurations call the number of experts.
SAID = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def other_end(tokens_BL: Tensor) -> Tensor:
    """The same tokens but the last ones."""
    other_BL = tokens_BL.clone()
    other_BL[:, -1] = (other_BL[:, -1] + 1) % (tokens_BL.max() + 1)
    return other_BL


def check_causal(model: Any, logits_BLV: Tensor, other_BLV: Tensor) -> None:
    """Raise `ValueError` for a model in which a token changes what comes before it, so that no
    prefix is worth what is measured of it: one with an encoder, or that routes all at once.

    other_BLV   the logits with an `other_end`
    """
    before = slice(None, logits_BLV.shape[1] - 1)
    if _apart(logits_BLV[:, before], other_BLV[:, before], share=0):
        raise ValueError(
            f"{type(model).__name__} is not causal: another last token changes the logits before it"
        )


def check_alone(model: Any, added: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Raise `ValueError` for a model in which other texts change what is made of one.

    added   what each segment with experts adds to the stream of a text that is alone, and of the
            same text, from the same stream, among `ROWS`. (Over all layers of a deep model in half
            precision rounding alone may change most of it.)
    """
    for alone_BLD, among_BLD in added:
        if _apart(alone_BLD, among_BLD, share=0.5):
            raise ValueError(
                f"{type(model).__name__} gives a text other logits beside others than alone: its "
                "experts may have a capacity"
            )


def _apart(was_XV: Tensor, now_XV: Tensor, share: float) -> bool:
    """Whether logits of more than this share of tokens differ by more than rounding, which other
    shapes do otherwise; it may have single tokens go to another expert, in half precision soon."""
    change_X = (was_XV - now_XV).float().abs().amax(-1).flatten()
    half = was_XV.dtype.itemsize <= 2
    near, share = (0.2, 0.5) if half else (1e-2, share)
    return bool(change_X.quantile(1 - share) > near * was_XV.float().std())


def check_coverage(model: Any, seats: Sequence[Seat], events: Sequence[Event]) -> str:
    """How much of the model's experts is seen: "48 of 48 MoE layers; 97 % of the parameters of
    experts"; the others take no part in a forward.

    Raises `ValueError` naming experts that do, or if there are none in a model whose configuration
    speaks of some.
    """
    text = model.config.get_text_config() if is_library(model) else None
    said = {key: value for key in SAID if isinstance(value := getattr(text, key, None), int)}
    numbers = {*said.values(), *(seat.site.num_experts for seat in seats)} - {0, 1}
    seen = {part for seat in seats for part in seat.experts.modules()}
    dense = {event.module for event in events if _of_every_token(event)}
    unseen = {
        name: part
        for name, part in model.named_modules()
        if _has_experts(part, numbers) and part not in seen | dense and _size(part)
    }
    ran = {event.module for event in events}
    missed = [name for name in unseen if model.get_submodule(name.rpartition(".")[0]) in ran]
    if missed:
        raise ValueError(
            f"{len(missed)} modules with experts ({missed[0]}) are not called with hidden states, "
            f"ids and weights of the chosen: what they receive cannot be told{_unpacked(model)}"
        )
    if not seats and max(said.values(), default=0) > 1:
        raise ValueError(
            f"its configuration says {said}, and nothing in it is called with ids and weights of "
            f"experts: what they receive cannot be told{_unpacked(model)}"
        )
    if not seats and not is_library(model):
        raise ValueError(
            f"found no experts in {type(model).__name__}: no module is called with hidden states, "
            "ids and weights of the chosen, and no block calls a list of modules on some of its "
            'tokens. Name them: an.adapt(model, routers=["layers.*.gate"], '
            'experts=["layers.*.experts.*"])'
        )
    size = sum(_size(seat.experts) for seat in seats)
    share = size / max(1, size + sum(map(_size, unseen.values())))
    layers = f"{len(seats)} of {len(seats) + len(unseen)} MoE layers"
    return f"{layers}; {100 * share:.0f} % of the parameters of experts"


def _has_experts(part: nn.Module, numbers: Collection[int]) -> bool:
    """By its name, or by a parameter of as many matrices as there are experts."""
    stacks = (p for p in part.parameters(recurse=False) if p.ndim == 3 and len(p) in numbers)
    return "Experts" in type(part).__name__ or (any(stacks) and not hasattr(part, "stride"))


def _of_every_token(event: Event) -> bool:
    """Whether a module is called with the hidden states of all tokens and nothing else, as shared
    experts are."""
    given = [v for v in (*event.args, *event.kwargs.values()) if isinstance(v, Tensor)]
    return len(given) == 1 and given[0].shape[:-1].numel() == TOKENS


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _unpacked(model: Any) -> str:
    """What a user can do about weights that are packed."""
    how = getattr(getattr(model, "config", None), "quantization_config", {})
    method = (how if isinstance(how, dict) else vars(how)).get("quant_method")
    if getattr(method, "value", method) == "mxfp4":
        return (
            ". It is packed in MXFP4, whose kernel routes by itself: load it with "
            "quantization_config=Mxfp4Config(dequantize=True)"
        )
    return f". It is quantized by {method}; load it dequantized" if method else ""


def checked(router: TappedRouter, taken: Routing) -> TappedRouter:
    """The router described, its scores said to be unknown where it decides otherwise when it is
    told them.

    Raises `ValueError` unless the router, asked with the logits that it had, decides what it did,
    and never chooses what is masked."""
    name, logits_TE = router.site.name, taken.logits_TE
    again = router.route(logits_TE)
    for what, now, then in zip(("ids", "weights"), again[2:], taken[2:], strict=True):
        if not torch.equal(now, then):
            raise ValueError(
                f"{name} decides by more than its logits: asked with the same ones again, it gives "
                f"other {what}"
            )
    first_T1 = taken.ids_TK[:, :1]
    masked = router.route(logits_TE.scatter(-1, first_T1, -torch.inf))
    if ((masked.ids_TK == first_T1) & (masked.weights_TK != 0)).any():
        raise ValueError(f"{name} uses an expert whose logit is -inf: it cannot be masked")
    if torch.equal(masked.ids_TK, taken.ids_TK):
        raise ValueError(f"{name} does not choose by its logits: a mask changes nothing")
    return replace(router.described(logits_TE.device), scored=_agrees(router, taken))


def _agrees(router: TappedRouter, taken: Routing) -> bool:
    """Whether its scores, told again, lead to what it decided."""
    scores_TE = router.score(taken.logits_TE)
    told = [router.decide(taken.logits_TE, scores_TE)]
    if router.roles.choice is not None:
        told.append(taken._replace(weights_TK=router.weigh(scores_TE, taken.ids_TK)))
    none_TE = torch.zeros_like(scores_TE)
    was_TE, *now = (none_TE.scatter_add(-1, r.ids_TK, r.weights_TK) for r in (taken, *told))
    half = any(p.dtype.itemsize < 4 for p in router.module.parameters())
    near, most = (3e-2, 0.8) if half else (1e-3, 0.99)  # rounded logits change places
    near *= float(was_TE.max())
    agree_T = torch.stack([((was_TE - now_TE).abs() <= near).all(-1) for now_TE in now]).all(0)
    return bool(agree_T.float().mean() >= most)
