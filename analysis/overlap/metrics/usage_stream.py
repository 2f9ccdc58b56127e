"""Sums of which experts the tokens of one site use, from the decisions of the real run.

Shapes: U units, T tokens, E experts, K slots, F experts of the site before, V classes of tokens, Z
domains, R shuffles of labels over documents, none of a single one, N = 1 + R ways to label tokens,
their own first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.special import entr

from analysis.adapters import DenseRouting
from analysis.overlap.metrics.base import Probe, Sums, UnitSums
from analysis.overlap.metrics.usage import both_counts, conditional_mutual_information
from cartmoe.hooks import RouterSite
from cartmoe.routing import EPS


@dataclass(eq=False)
class UsageStream:
    """Sums over one site's tokens of which experts they use.

    units         of documents, for what gets an interval
    num_classes   V of the tokens' labels;  num_domains   Z
    classes       count by classes too, which metrics that are not by units need

    What needs classes of tokens is counted over all units together, for its size, which grows with
    the number of domains: N (E + 1) V Z int32 numbers. A use is an expert and a token that uses it,
    once however many slots it has.
    """

    site: RouterSite
    units: int
    num_classes: int
    num_domains: int
    classes: bool = True

    def __post_init__(self) -> None:
        self._sums = UnitSums(self.units)
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, probe: Probe) -> None:
        """Add a batch."""
        dense = DenseRouting(probe.routing)
        self._add_to_unit(probe, dense)
        self._count_labels(probe, _distinct(dense).T.contiguous())

    def sums(self) -> Sums:
        """By name, those of units (U, ...):

        tokens            how many there are; domain_tokens (Z,) by domain
        both (E, E)       tokens that use both; on the diagonal those that use one
        domains (E, Z)    tokens of the domain that use the expert
        weight (E,)       that the expert's uses have
        entropy           of scores as a distribution, nats
        transition (F, E), before (F,)   tokens that use both, the first at the site before;
                          lacking at the first site

        and those of all units together (1, ...):

        other_domains (R, E, Z)   under shuffled labels

        and with classes

        classes (N, E, V), class_tokens (N, V)   as by domain
        mi_domain_given_token (N,)   which is no sum
        """
        E = self.site.num_experts
        if self.classes:
            joint_NEVZ = self._counts["joint"][:, :E]
            given = [conditional_mutual_information(n_EVZ.double().mT) for n_EVZ in joint_NEVZ]
            together = {
                "other_domains": joint_NEVZ[1:].sum(-2),
                "classes": self._counts["classes"][:, :E],
                "class_tokens": self._counts["class_tokens"],
                "mi_domain_given_token": torch.stack(given),
            }
        else:
            together = {"other_domains": self._counts["domains"][1:, :E]}
        return self._sums | {name: counts[None].double() for name, counts in together.items()}

    def _add_to_unit(self, probe: Probe, dense: DenseRouting) -> None:
        domain_TZ = one_hot(probe.domain_T, self.num_domains)
        scores_TE = probe.routing.scores_TE.float()
        p_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=EPS)
        self._sums.add(
            probe.unit,
            tokens=torch.tensor(len(p_TE)),
            domain_tokens=domain_TZ.sum(0),
            both=both_counts(dense.used_TE, dense.used_TE),
            domains=both_counts(dense.used_TE.cpu(), domain_TZ),
            weight=dense.weights_TE.double().sum(0),
            entropy=entr(p_TE).sum(-1).double().sum(),
        )
        if probe.before is not None:
            before_TF = DenseRouting(probe.before).used_TE
            both_FE = both_counts(before_TF, dense.used_TE)
            self._sums.add(probe.unit, transition=both_FE, before=before_TF.sum(0))

    def _count_labels(self, probe: Probe, ids_KT: Tensor) -> None:
        """Each axis is its size and the tokens' places on it, (K, T) or (N, K, T)."""
        token_NT = torch.cat([probe.tokens_T[None], probe.other_tokens_RT])
        domain_NT = torch.cat([probe.domain_T[None], probe.other_domain_RT])
        labels = len(token_NT), torch.arange(len(token_NT))[:, None, None]
        expert = self.site.num_experts + 1, ids_KT  # the last is nobody
        token = self.num_classes, token_NT[:, None]
        domain = self.num_domains, domain_NT[:, None]
        if not self.classes:
            self._count("domains", labels, expert, domain)
            return
        self._count("joint", labels, expert, (self.num_classes, probe.tokens_T), domain)
        self._count("classes", labels, expert, token)
        self._count("class_tokens", labels, token)

    def _count(self, name: str, *axes: tuple[int, Tensor]) -> None:
        """In place: a batch touches few of the cells."""
        if name not in self._counts:
            self._counts[name] = torch.zeros([size for size, _ in axes], dtype=torch.int32)
        cells = torch.zeros((), dtype=torch.int64)
        for size, at in axes:
            cells = cells * size + at
        ones = torch.ones(cells.numel(), dtype=torch.int32)
        self._counts[name].view(-1).scatter_add_(0, cells.flatten(), ones)


def _distinct(dense: DenseRouting) -> Tensor:
    """(T, K) on the CPU: the experts that each token uses, each once; behind them E, nobody."""
    used_TE = dense.used_TE.cpu()
    E = used_TE.shape[-1]
    ids_TE = torch.arange(E).where(used_TE, E).sort(-1).values
    return ids_TE[:, (ids_TE < E).any(0)]
