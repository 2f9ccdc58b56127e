"""Where blocks keep lists of experts: found by how these are called, or named.

Shapes: T tokens, D model, K slots.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from analysis.adapters.listed import ListedSeat, Stubbed, hidden_in, rows_of
from analysis.adapters.router import TappedRouter
from analysis.adapters.seams import TOKENS, Call, Event
from analysis.adapters.tap import Roles, Watching
from cartmoe.hooks import RouterSite


def listed_seats(
    model: nn.Module,
    events: Sequence[Event],
    experts: Sequence[str] | None = None,
    routers: Sequence[str] | None = None,
) -> list[ListedSeat]:
    """Those whose experts stand one by one in their block, in the order in which they ran.

    experts, routers   patterns of names of single experts and of what gives their logits; None:
                       found as lists of modules of one kind, each called on some of the tokens

    Raises `ValueError` for names that there are not, and for blocks that do otherwise than is
    found.
    """
    modules, ran = dict(model.named_modules()), {event.module: event for event in events}
    lists = _lists(modules, ran) if experts is None else _named_lists(modules, experts)
    gates = {modules[name] for name in _matching(modules, routers or (), "routers")}
    order = [event.module for event in events]
    seats = [_listed(modules, *found, ran, gates) for found in lists.items()]
    return sorted(seats, key=lambda seat: order.index(seat.block))


def _lists(
    modules: Mapping[str, nn.Module], ran: Mapping[nn.Module, Event]
) -> dict[str, list[nn.Module]]:
    """By name of their block. Layers are a list, too: they get all tokens, one after the other."""
    found = {}
    for name, part in modules.items():
        each = [*part.children()]
        if not isinstance(part, nn.ModuleList) or len(each) < 2 or len(set(map(type, each))) > 1:
            continue
        inputs = [hidden_in(ran[e].args, ran[e].kwargs) if e in ran else None for e in each]
        rows = [0 if x is None else x.shape[:-1].numel() for x in inputs]
        if max(rows) and (min(rows) < TOKENS or all(x is inputs[0] for x in inputs)):
            found[name.rpartition(".")[0]] = each
    return found


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
            have = ", ".join(name for name in modules if name)
            raise ValueError(f"{what} has {pattern!r}, which no module is called: {have}")
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
    if inside and watching.last is not None and roles is not None:
        roles = roles._replace(logits=watching.last)
    if roles is None:
        raise ValueError(
            f"{name} has {len(experts)} experts and no linear operation that gives a logit for "
            "each of them"
        )
    stubbed.top_k = stubbed(*ran[block].args, **ran[block].kwargs)[0].shape[1]
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    layer = numbers[0] if numbers else 0
    site = RouterSite(f"{name}.router", layer, 0, len(experts), stubbed.top_k)
    router = TappedRouter(site, stubbed, how, roles, lambda result: result, ranked=True)
    seat = ListedSeat(site, router, block, block, how, stubbed=stubbed)
    x, made_TD = hidden_in(ran[block].args, ran[block].kwargs), rows_of(ran[block].result)
    x_TD = x.reshape(TOKENS, -1)
    again_TD = seat.combine(x_TD, seat.computed(x_TD, seat.given(x_TD)))
    if not torch.allclose(again_TD, made_TD, rtol=1e-3, atol=1e-3 * float(made_TD.abs().max())):
        raise ValueError(
            f"{name} does not give the sum of its experts' outputs by the weights that it gives "
            "them, and what else it adds: what they receive cannot be told"
        )
    return seat
