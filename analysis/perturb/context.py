"""What a perturbation may see of the forward that it acts in.

Shapes: T tokens, D model, E experts, R reservoir rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from analysis.adapters import Given, Router
from analysis.perturb.noise import Noise
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


class SiteStats(NamedTuple):
    """A site's clean routing over a calibration slice.

    reservoir_RE  logits of tokens drawn uniformly without replacement; std: over all their
                  entries; load_E: share of the used slots that each expert has (sums to 1)
    """

    reservoir_RE: Tensor
    std: float
    load_E: Tensor


def after_score(stats: SiteStats, router: Router) -> SiteStats:
    """With rows of l = log score(z), what a perturbation at point "scores" works on; the std stays
    that of z, so that noise has the same dose at both points."""
    return stats._replace(reservoir_RE=router.score(stats.reservoir_RE).log())


@dataclass(frozen=True)
class Calibration:
    """`SiteStats` by site. Its `sha256` belongs to the identity of what was measured with it."""

    sites: Mapping[RouterSite, SiteStats]

    def __repr__(self) -> str:
        rows = {len(stats.reservoir_RE) for stats in self.sites.values()}
        return f"Calibration({len(self.sites)} sites, {max(rows, default=0)} tokens of each)"

    @property
    def sha256(self) -> str:
        """Of sites, reservoirs and loads."""
        digest = hashlib.sha256()
        for site, stats in self.sites.items():
            digest.update(repr((site.name, stats.std)).encode())
            for tensor in (stats.reservoir_RE, stats.load_E):
                digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()


class Tokens(NamedTuple):
    """The tokens of one forward, flattened: what every site's context has in common.

    position_T   within the sequence;  sequence_T   id of the sequence
    kind_T       see `where.KINDS`; None without a tokenizer
    real_T       which are no padding, on which nothing acts; None: all
    past         tokens a sequence that earlier forwards have left in a cache
    """

    token_ids_T: Tensor
    position_T: Tensor
    sequence_T: Tensor
    kind_T: Tensor | None = None
    real_T: Tensor | None = None
    past: int = 0

    @classmethod
    def of(cls, given: Given | Tensor, sequence_B: Tensor, kinds_V: Tensor | None = None) -> Tokens:
        """From what a forward is given (or token ids (B, L) of whole sequences), (B,) sequence ids
        and the kind of each id of the vocabulary."""
        given = Given.whole(given) if isinstance(given, Tensor) else given
        ids_T, position_T = given.tokens_BL.flatten(), given.position_BL.flatten()
        kind_T = None if kinds_V is None else kinds_V.to(ids_T.device)[ids_T]
        sequence_T = sequence_B.repeat_interleave(given.tokens_BL.shape[1])
        real_T = None if given.real_BL is None else given.real_BL.flatten()
        return cls(ids_T, position_T, sequence_T, kind_T, real_T, given.past)


@dataclass(frozen=True)
class RouterContext:
    """What a perturbation may see at one router.

    clean     the decision that this router would take on the input it works from
    x_TD      that input; None where the clean run's decisions are replayed
    noise     draws keyed by seed, site, sequence, position and expert
    stats     of this site, from one calibration pass; None if there was none
    earlier   decisions that sites before this one took in this forward, in order
    own       those that their routers had come to of themselves
    """

    site: RouterSite
    clean: Routing
    x_TD: Tensor | None
    tokens: Tokens
    noise: Noise
    stats: SiteStats | None = None
    earlier: Mapping[RouterSite, Routing] = field(default_factory=dict)
    own: Mapping[RouterSite, Routing] = field(default_factory=dict)

    def previous(self, site: RouterSite) -> Routing:
        """The decision that an earlier site took; `ValueError` listing them if it took none."""
        if site not in self.earlier:
            have = ", ".join(s.name for s in self.earlier) or "none"
            raise ValueError(f"{site.name} took no decision before {self.site.name}; did: {have}")
        return self.earlier[site]

    def need_stats(self, perturbation: object) -> SiteStats:
        """The site's statistics; `ValueError` saying how to get them if there are none."""
        if self.stats is None:
            raise ValueError(
                f"{perturbation} needs statistics of clean routing; pass "
                "stats=analysis.calibrate(model, docs)"
            )
        return self.stats
