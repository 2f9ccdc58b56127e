"""The gates of other models in this model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from analysis.adapters import as_adapter, identity_of, load, sites_of_path
from analysis.perturb.context import RouterContext
from analysis.perturb.recorded import OfAnotherRun
from cartmoe.checkpoint import CheckpointError
from cartmoe.fields import declared
from cartmoe.hooks import RouterSite


@declared
class GateSwap(OfAnotherRun):
    """The gates of another checkpoint in place of this one's: did tuning change the routers, or
    the experts? Both must have the same routers.

    checkpoint   its path, or a model under study (for this process only); in `analysis.compare`
                 also a model's name
    sha256       the identity of the model at that path; found out where it is not given
    """

    points: ClassVar[tuple[str, ...]] = ("logits",)
    needs_input: ClassVar[bool] = True
    source: ClassVar[str] = "checkpoint"
    needed: ClassVar[str] = "whole one; give the path of one, or a model under study"
    checkpoint: Any = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        given = self.checkpoint
        if isinstance(given, str | Path) and given != "":
            self.pin(str(given), _checkpoint_sha256(str(given)))
        elif isinstance(given, nn.Module) or hasattr(given, "segments"):
            object.__setattr__(self, "checkpoint", as_adapter(given))
        else:
            raise ValueError(
                f"checkpoint is {given!r}; give the path of one, or a model under study"
            )

    @property
    def models(self) -> tuple[Any, ...]:
        """The one whose gates these are, unless it is read from a path."""
        return () if isinstance(self.checkpoint, str) else (self.checkpoint,)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if not isinstance(self.checkpoint, str):
            raise ValueError(
                f"{self.label} holds a model in memory, which does not go to other processes; give "
                "the path of a checkpoint"
            )
        return super().__reduce_ex__(protocol)

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for a router that the other model does not have, or not with as many
        experts."""
        if isinstance(self.checkpoint, str):
            have = _sites_of(self.checkpoint, self.known())
        else:
            have = tuple(self.checkpoint.sites())
        experts = {site.place: site.num_experts for site in have}
        for site in sites:
            number = experts.get(site.place)
            if number is None:
                raise ValueError(f"the model of {self.label} has no router at {site.name}")
            if number != site.num_experts:
                raise ValueError(
                    f"the model of {self.label} has {number} experts at {site.name}; this one has "
                    f"{site.num_experts}"
                )

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """The other gate's logits of the same input."""
        assert ctx.x_TD is not None  # for `needs_input`
        self.check([ctx.site])
        device = ctx.x_TD.device
        if isinstance(self.checkpoint, str):
            gates = _loaded_gates(self.checkpoint, self.known(), device)
        else:
            gates = _gates(self.checkpoint)
        gate = gates[ctx.site.place]
        with torch.no_grad():
            other_TE = gate(ctx.x_TD, ctx.tokens.token_ids_T).to(logits_TE)
        return other_TE.where(logits_TE != -torch.inf, -torch.inf)  # after a mask, in a Compose


def _checkpoint_sha256(path: str) -> str | None:
    try:
        return identity_of(path)
    except (FileNotFoundError, CheckpointError):
        return None


@functools.lru_cache(maxsize=16)
def _sites_of(path: str, sha256: str) -> tuple[RouterSite, ...]:
    return sites_of_path(path)


Gates = dict[tuple[int, int], Callable[[Tensor, Tensor], Tensor]]


@functools.lru_cache(maxsize=2)
def _loaded_gates(path: str, sha256: str, device: torch.device) -> Gates:
    """Of a checkpoint; nothing else of it stays in memory."""
    model = load(path, device=str(device))
    if model.identity != sha256:
        raise ValueError(f"the checkpoint at {path} is another one than it was")
    return _gates(model)


def _gates(model: Any) -> Gates:
    return {site.place: model.router(site).gate for site in model.sites()}
