"""Where blocks keep lists of experts: found by how these are called, or named.

Shapes: T tokens, D model, K slots.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from analysis.adapters.form import is_library
from analysis.adapters.listed import ListedSeat, Stubbed, hidden_in, rows_of
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import TOKENS, Call, Event
from analysis.adapters.seat import Seat
from analysis.adapters.tap import Roles, Watching
from cartmoe.hooks import RouterSite

AnySeat = TypeVar("AnySeat", bound=Seat)


def listed_seats(
    model: nn.Module,
    events: Sequence[Event],
    others: Sequence[Seat] = (),
    experts: Sequence[str] | str | None = None,
    routers: Sequence[str] | str | None = None,
) -> list[ListedSeat]:
    """Those whose experts stand one by one in their block.

    others             seats that are known, within which none is looked for
    experts, routers   patterns of names of single experts and of what gives their logits; None:
                       found as lists of modules of one kind, each called on some of the tokens

    Raises `ValueError` for names that there are not, and for blocks that do otherwise than is
    found; of lists that nobody named these are no experts.
    """
    modules, ran = dict(model.named_modules()), {event.module: event for event in events}
    gates = {modules[name] for name in _matching(modules, _several(routers), "routers")}
    lists = _named_lists(modules, _several(experts)) if experts else _lists(modules, ran)
    known = {part for seat in others for part in seat.block.modules()}
    found, problems = [], []
    for name, each in lists.items():
        if modules[name] in known or known.intersection(modules[name].modules()):
            continue
        times = sum(event.module is modules[name] for event in events)
        try:
            if times > 1:
                raise ValueError(f"{name} is called {times} times in a forward")
            found.append(_listed(modules, name, each, ran, gates))
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            if experts:
                raise
            problems.append(error)
    if problems and not (found or others or is_library(model)):
        raise ValueError(f"experts were looked for in lists of modules: {problems[0]}")
    used = {part for seat in found for part in seat.block.modules()}
    if unused := [name for name, part in modules.items() if part in gates - used]:
        raise ValueError(f"routers has {unused[0]}, which stands in no block with experts")
    return found


def numbered(seats: Sequence[AnySeat]) -> list[AnySeat]:
    """Seats by depth: the layer is the first number in their names that tells them apart, and of
    those of one layer the stage counts."""
    numbers = [[int(n) for n in seat.site.name.split(".") if n.isdecimal()] for seat in seats]
    depth = min(map(len, numbers), default=0)
    apart = next((i for i in range(depth) if len({n[i] for n in numbers}) > 1), 0)
    stages: Counter[int] = Counter()
    for order, (seat, found) in enumerate(zip(seats, numbers, strict=True)):
        layer = found[apart] if depth else order
        seat.site = replace(seat.site, layer=layer, stage=stages[layer])
        seat.router = replace(seat.router, site=seat.site)
        stages[layer] += 1
    return [*seats]


def _several(patterns: Sequence[str] | str | None) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns or ()


def _lists(
    modules: Mapping[str, nn.Module], ran: Mapping[nn.Module, Event]
) -> dict[str, list[nn.Module]]:
    """By name of their block. Layers are a list, too: they get all tokens, one after the other."""
    found = {}
    for name, part in modules.items():
        each = [*part.children()]
        if not isinstance(part, nn.ModuleList) or len(each) < 2 or len(set(map(type, each))) > 1:
            continue
        inputs = [_entering(ran[e]) if e in ran else None for e in each]
        rows = [0 if x is None else x.shape[:-1].numel() for x in inputs]
        if max(rows) and (min(rows) < TOKENS or all(x is inputs[0] for x in inputs)):
            found[name.rpartition(".")[0]] = each
    return found


def _entering(event: Event) -> Tensor | None:
    given = (v for v in (*event.args, *event.kwargs.values()) if isinstance(v, Tensor))
    return next(given, None)


def _named_lists(
    modules: Mapping[str, nn.Module], patterns: Sequence[str]
) -> dict[str, list[nn.Module]]:
    found: dict[str, list[nn.Module]] = {}
    for name in _matching(modules, patterns, "experts"):
        holder = name.rpartition(".")[0]
        if isinstance(modules[holder], nn.ModuleList | nn.ModuleDict):
            holder = holder.rpartition(".")[0]
        found.setdefault(holder, []).append(modules[name])
    return found


def _matching(modules: Mapping[str, nn.Module], patterns: Sequence[str], what: str) -> list[str]:
    found = []
    for pattern in patterns:
        wanted = re.compile(re.escape(pattern).replace(r"\*", "[^.]*"))
        names = [name for name in modules if wanted.fullmatch(name)]
        if not names:
            have = [name for name in modules if name]
            some = f"{', '.join(have[:12])}{', ...' * (len(have) > 12)}"
            raise ValueError(f"{what} has {pattern!r}, which no module is called: {some}")
        found += names
    return found


def _listed(
    modules: Mapping[str, nn.Module],
    name: str,
    experts: list[nn.Module],
    ran: Mapping[nn.Module, Event],
    gates: Collection[nn.Module],
) -> ListedSeat:
    block = modules[name]
    if block not in ran:
        raise ValueError(f"{name}, which has {len(experts)} experts, did not run")
    how = Call.of(ran[block].args, ran[block].kwargs)
    if not how.of_hidden_alone:
        raise ValueError(f"{name} is called with more than hidden states")
    stubbed, inside = Stubbed(block, experts), [m for m in block.modules() if m in gates]
    with Watching(inside) as watching:
        stubbed.run(0, *ran[block].args, **ran[block].kwargs)
    roles = Roles.of(watching.ops, len(experts))
    if inside and roles is not None:
        if watching.last is None:
            raise ValueError(f"routers: none of those in {name} gives logits there")
        roles = roles._replace(logits=watching.last)
    if roles is None:
        raise ValueError(
            f"{name} has {len(experts)} experts and no linear operation that gives a logit for "
            "each of them"
        )
    stubbed.top_k = stubbed(*ran[block].args, **ran[block].kwargs)[0].shape[1]
    site = RouterSite(f"{name}.router", 0, 0, len(experts), stubbed.top_k)
    router = TappedRouter(site, stubbed, how, roles, lambda result: result, ranked=True)
    seat = ListedSeat(site, router, block, block, how, stubbed=stubbed)
    x, made_TD = hidden_in(ran[block].args, ran[block].kwargs), rows_of(ran[block].result)
    x_TD = x.reshape(TOKENS, -1)
    again_TD = seat.combine(x_TD, seat.computed(x_TD, seat.given(x_TD)))
    near = 1e-3 if x.dtype.itemsize > 2 else 3e-2
    if not torch.allclose(again_TD, made_TD, rtol=near, atol=near * float(made_TD.abs().max())):
        raise ValueError(
            f"{name} does not give the sum of its experts' outputs by the weights that it gives "
            "them, and what else it adds: what they receive cannot be told"
        )
    return seat
