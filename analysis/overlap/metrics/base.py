"""What overlap metrics are made of: streams that sum over tokens, and estimates from their sums.

A stream sees one router site, batch after batch, and keeps sums of fixed size for each *unit*, a
set of whole documents that is left out at once by the jackknife. A metric is a function of sums,
so that the value over all units and those without each unit come from the same lines.

Shapes: U units, E experts, T tokens, D model, K slots, R shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from cartmoe.routing import Routing

KINDS = ("usage", "weights", "outputs", "function", "composite")
TABLES = ("experts", "sites", "pairs")
PROBES = ("all", "routed", "either")
MAX_UNITS = 32  # so that sums do not grow with the documents
# By name (U, ...), fp64 on the CPU; what is summed adds over units. (1, ...): of all together.
Sums = Mapping[str, Tensor]


def tensor_of(name: str, values: Any, dimensions: str) -> Tensor:
    """A tensor, or an array as one (copied: those of serving engines may be read-only).

    Raises `ValueError` naming the parameter for other things, and unless it has these dimensions,
    such as "experts, tokens"; "..." in front stands for any more.
    """
    if not isinstance(values, Tensor):
        try:
            values = torch.from_numpy(np.array(values))
        except (TypeError, ValueError):
            found = type(values).__name__
            raise ValueError(f"{name} is a {found}; give numbers ({dimensions})") from None
    names = dimensions.split(", ")
    more = names[0] == "..."
    if values.ndim != len(names) and not (more and values.ndim >= len(names) - 1):
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be ({dimensions})")
    return values


class Metric(NamedTuple):
    """One overlap metric.

    kind    what it is computed from, one of `KINDS`
    table   what a row speaks of, one of `TABLES`: values are (U, E), (U,) or (U, E, E)
    of      sums -> values; for kind "weights": `ExpertWeights` -> values
    about   one line: what it is and what its null is
    null    the same under chance, as `about` says; a number: that everywhere; None: there is none
    units   False: it is of all units together, values have no U, and there is no interval
    """

    kind: str
    table: str
    of: Callable[..., Tensor]
    about: str
    null: Callable[..., Tensor] | float | None = None
    units: bool = True

    def __repr__(self) -> str:
        return f"<{self.kind}, by {self.table}: {self.about}>"


class Probe(NamedTuple):
    """Those tokens of one batch that count, in a random order, as one site saw them.

    unit          to which their documents belong
    tokens_T      token ids; domain_T the number of the domain
    other_tokens_RT, other_domain_RT   the same of other documents, at the same positions: labels
                  shuffled over documents, R times
    before        the decision at the site before, None at the first
    stream_TD     the residual stream that enters the site's segment
    gradient_TD   dloss/d(routed output), nats, where a metric of kind "function" asked for it
    """

    unit: int
    x_TD: Tensor
    routing: Routing
    tokens_T: Tensor
    domain_T: Tensor
    other_tokens_RT: Tensor
    other_domain_RT: Tensor
    before: Routing | None
    stream_TD: Tensor
    gradient_TD: Tensor | None = None


class Stream(Protocol):
    """Sums over one site's tokens; their size does not depend on how many tokens there are."""

    def add(self, probe: Probe) -> None:
        """Add a batch."""
        ...

    def sums(self) -> Sums:
        """By name (U, ...), of all batches so far."""
        ...


class Estimate(NamedTuple):
    """Arrays of one shape: values, bounds (NaN where there is nothing to resample), the null."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray


class UnitSums(dict[str, Tensor]):
    """fp64 sums by name and unit, made when first added to."""

    def __init__(self, units: int):
        super().__init__()
        self.units = units

    def add(self, unit: int, **values: Tensor) -> None:
        """Add to one unit's sums; each name has one shape."""
        for name, value in values.items():
            if name not in self:
                self[name] = torch.zeros(self.units, *value.shape, dtype=torch.float64)
            self[name][unit] += value.detach().to("cpu", torch.float64)

    def add_tokens(self, unit_T: Tensor, **values_TX: Tensor) -> None:
        """Add tokens, each to the sums of its unit; none of them leave zeros."""
        wide_TX = {name: v.detach().to("cpu", torch.float64) for name, v in values_TX.items()}
        for unit in unit_T.unique().tolist() or [0]:
            own_T = (unit_T == unit).cpu()
            self.add(unit, **{name: value_TX[own_T].sum(0) for name, value_TX in wide_TX.items()})


def total(sums: Sums) -> Sums:
    """Over all units: (1, ...)."""
    return {name: values.sum(0, keepdim=True) for name, values in sums.items()}


def without_each(sums: Sums) -> Sums:
    """All but one unit, for each unit: (U, ...)."""
    return {name: values.sum(0) - values for name, values in sums.items()}


def estimate(metric: Metric, sums: Sums | Any, confidence: float = 0.95) -> Estimate:
    """The value over all units with jackknife bounds, and the null.

    value +- t s with s^2 = (U - 1) / U sum_u (v_u - mean v)^2, v_u the value without unit u, and
    t of Student's distribution with U - 1 degrees of freedom (Efron and Tibshirani, An Introduction
    to the Bootstrap, 1993, ch. 11). A single unit gives NaN bounds, and so does a metric that is
    not by units; the first of the sums is. Of kind "weights" the sums are `ExpertWeights`.
    """
    whole = total(sums) if metric.units else sums
    value = metric.of(whole).double().cpu().numpy()
    value = value[0] if metric.units else value
    null = metric.null(whole).double().cpu().numpy() if callable(metric.null) else metric.null
    null = np.broadcast_to(np.asarray(null, float), (1, *value.shape))[0]  # NaN for None
    half = np.full(value.shape, np.nan)
    units = len(next(iter(sums.values()))) if metric.units else 1
    if units > 1:
        left_out = metric.of(without_each(sums)).numpy()
        spread = np.sqrt((units - 1) / units * ((left_out - left_out.mean(0)) ** 2).sum(0))
        half = spread * stdtrit(units - 1, (1 + confidence) / 2)
    return Estimate(value, value - half, value + half, null)
