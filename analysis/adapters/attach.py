"""What a model of anybody's is asked once, on a few tokens: where its seats are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.fused import FusedSeat
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import PROBE, TOKENS, Call, Event, Places, argument, places
from analysis.adapters.seat import Seat
from analysis.adapters.tap import Roles, Watching
from cartmoe.hooks import RouterSite


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
    fewest: dict[type, int] = {}  # by class of experts: of one it is asked once
    for i, event in enumerate(events):
        where = places(event.args, event.kwargs, TOKENS)
        if where and _holds(event.module, argument(event.args, event.kwargs, where.ids)):
            if event.module in modules:
                raise ValueError(f"{event.name} is called more than once in a forward")
            modules.add(event.module)
            seat = _seat(model, where, events[last:i], events[i:])
            kind = type(seat.experts)
            if kind not in fewest:
                fewest[kind] = _fewest(seat, argument(event.args, event.kwargs, where.hidden))
            seat.fewest = fewest[kind]
            found.append(seat)
            last = i + 1
    return found


def _holds(module: nn.Module, ids_TK: Tensor) -> bool:
    """Whether a parameter of its own has a part for each of these experts."""
    least = int(ids_TK.max()) + 1
    return any(p.ndim == 3 and len(p) >= least for p in module.parameters(recurse=False))


def _seat(
    model: nn.Module, where: Places, before: Sequence[Event], behind: Sequence[Event]
) -> FusedSeat:
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
    width = watching.ops[roles.logits].width
    site = RouterSite(router.name, 0, 0, width, ids_TK.shape[-1])  # its place: `lists.numbered`

    def read(result: Any) -> tuple[Tensor, Tensor]:
        parts = _flat(result)
        ids, weights = parts[ids_at], parts[weights_at]
        return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])

    tapped = TappedRouter(site, router.module, Call.of(router.args, router.kwargs), roles, read)
    block = model.get_submodule(event.name.rpartition(".")[0])
    around = next(e for e in behind if e.module is block)
    how = Call.of(around.args, around.kwargs)
    return FusedSeat(site, tapped, event.module, block, how, places=where, batched=x.ndim == 3)


def _fewest(seat: FusedSeat, x: Tensor) -> int:
    """Slots that its experts can do with."""
    try:
        seat.outputs(x.reshape(TOKENS, -1), [0])
    except ValueError:
        return 2
    return seat.fewest


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
