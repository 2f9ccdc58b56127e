"""What a model of anybody's is asked once, on a few tokens: where its seats are, and that they do
what is said of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.form import call, is_library, logits_of
from analysis.adapters.fused import FusedSeat
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import PROBE, TOKENS, Call, Event, Places, argument, places
from analysis.adapters.seat import Seat
from analysis.adapters.tap import Roles, Watching
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

# What configurations call the number of experts.
ROWS = 24  # of one text: some expert gets this many times its tokens
SAID = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def probe_tokens(vocab_size: int, device: torch.device) -> Tensor:
    """(B, L) ids, all different where there are enough of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(vocab_size, generator=generator)[:TOKENS]
    return ids.repeat(-(-TOKENS // len(ids)))[:TOKENS].view(PROBE).to(device)


def seats_of(model: nn.Module, events: Sequence[Event]) -> list[Seat]:
    """Every router and its experts, in the order in which they ran on the probe.

    Raises `ValueError` where experts are found and what chose them is not.
    """
    found: list[Seat] = []
    last, modules = 0, set()
    for i, event in enumerate(events):
        where = places(event.args, event.kwargs, TOKENS)
        if where and _holds(event.module, argument(event.args, event.kwargs, where.ids)):
            if event.module in modules:
                raise ValueError(f"{event.name} is called more than once in a forward")
            modules.add(event.module)
            found.append(_seat(model, where, events[last:i], events[i:], len(found)))
            last = i + 1
    return found


def check_causal(model: Any, tokens_BL: Tensor, logits_BLV: Tensor) -> None:
    """Raise `ValueError` for a model in which a token changes what comes before it, so that no
    prefix is worth what is measured of it: one with an encoder, or that routes all at once."""
    other_BL = tokens_BL.clone()
    other_BL[:, -1] = (other_BL[:, -1] + 1) % (tokens_BL.max() + 1)
    before = slice(None, tokens_BL.shape[1] - 1)
    other_BLV = logits_of(call(model, other_BL))
    if _apart(logits_BLV[:, before], other_BLV[:, before], share=0):
        raise ValueError(
            f"{type(model).__name__} is not causal: another last token changes the logits before it"
        )
    row_BL = tokens_BL[:1]
    alone, among = (logits_of(call(model, row_BL.expand(n, -1)))[-1] for n in (1, ROWS))
    if _apart(alone, among, share=0.5):
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


def _holds(module: nn.Module, ids_TK: Tensor) -> bool:
    """Whether a parameter of its own has a part for each of these experts."""
    least = int(ids_TK.max()) + 1
    return any(p.ndim == 3 and len(p) >= least for p in module.parameters(recurse=False))


def _seat(
    model: nn.Module, where: Places, before: Sequence[Event], behind: Sequence[Event], number: int
) -> Seat:
    event = behind[0]
    ids_TK, weights_TK, x = (
        argument(event.args, event.kwargs, key) for key in (where.ids, where.weights, where.hidden)
    )
    decided = [(e, at) for e in before if (at := _outputs(e.result, ids_TK, weights_TK))]
    if not decided:
        raise ValueError(
            f"{event.name} is called with ids and weights that no module returned: what chooses "
            "experts stands in one that does more"
        )
    router, (ids_at, weights_at) = decided[-1]
    with Watching() as watching:
        router.module(*router.args, **router.kwargs)
    roles = Roles.of(watching.ops, int(ids_TK.max()) + 1)
    if roles is None:
        raise ValueError(f"{router.name} has no linear operation that gives logits of its experts")
    numbers = [int(part) for part in event.name.split(".") if part.isdecimal()]
    width = watching.ops[roles.logits].width
    layer = numbers[0] if numbers else number
    site = RouterSite(router.name, layer, 0, width, ids_TK.shape[-1])

    def read(result: Any) -> tuple[Tensor, Tensor]:
        parts = _flat(result)
        ids, weights = parts[ids_at], parts[weights_at]
        return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])

    tapped = TappedRouter(site, router.module, Call.of(router.args, router.kwargs), roles, read)
    block = model.get_submodule(event.name.rpartition(".")[0])
    around = next(e for e in behind if e.module is block)
    how = Call.of(around.args, around.kwargs)
    seat = FusedSeat(site, tapped, event.module, block, how, places=where, batched=x.ndim == 3)
    try:
        seat.outputs(x.reshape(TOKENS, -1), [0])
    except ValueError:
        seat.fewest = 2
    return seat


def _outputs(result: Any, ids_TK: Tensor, weights_TK: Tensor) -> tuple[int, int] | None:
    """Which parts of what a module returned are these ids and weights; None where none are."""
    parts = _flat(result)
    ids = [i for i, part in enumerate(parts) if _equal(part, ids_TK)]
    weights = [i for i, part in enumerate(parts) if _equal(part, weights_TK)]
    return (ids[0], weights[0]) if ids and weights else None


def _flat(result: Any) -> list[Any]:
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in _flat(part)]
    return [result]


def _equal(found: Any, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.is_floating_point() != wanted.is_floating_point():
        return False
    if not found.ndim or found.numel() != wanted.numel() or found.shape[-1] != wanted.shape[-1]:
        return False
    return torch.equal(found.reshape(wanted.shape).to(wanted.dtype), wanted)


def checked(router: TappedRouter, taken: Routing) -> TappedRouter:
    """The router, its scores said to be unknown where it decides otherwise when it is told them.

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
    return router if _agrees(router, taken) else replace(router, scored=False)


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
