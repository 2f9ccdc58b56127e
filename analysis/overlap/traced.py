"""Recorded routing as metrics of use see it: no model, no forward.

Shapes: S sequences, L length, T = S * L tokens, E experts, K slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from analysis.overlap.metrics import METRICS
from analysis.overlap.probes import Probes, Seen
from analysis.overlap.request import metric_names
from analysis.perturb import Tokens, Trace, check_lengths, sites_of
from cartmoe.config import check_choice
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

OF_WEIGHTS = {"routed_weight", "committee"}
OF_DOMAINS = {"domain_specialization", "mi_domain", "mi_domain_given_token"}
OF_TOKENS = {"token_jaccard", "token_js", "vocabulary_specialization", "mi_token"}


class TracedModel:
    """Who decided, as far as a trace tells: what tables call it, and its routers."""

    family, train_seed = "trace", 0
    device = torch.device("cpu")
    vocab_size = 2**63  # whatever it was

    def __init__(self, trace: Trace):
        unknown = [str(site) for site in trace.places if site.num_experts is None]
        if unknown:
            raise ValueError(
                f"trace {trace.name} does not say how many experts there are at {unknown[0]}; "
                "make it with Trace.from_arrays(num_experts=...)"
            )
        self.trace, self.name = trace, trace.name

    def sites(self) -> list[RouterSite]:
        """Every recorded router."""
        return self.trace.places


def check_trace_request(
    trace: Trace, docs: Sequences | None, metrics: str | Sequence[str] | None, sites: Any
) -> tuple[TracedModel, Sequences, list[RouterSite], Sequence[str]]:
    """Who decided, the documents (None: each recorded sequence is one), sites and metrics that were
    asked for; raises `ValueError` for metrics that recorded decisions do not tell."""
    model = TracedModel(trace)
    chosen = sites_of(model, sites, "sites")  # type: ignore[arg-type]
    lacking = {"router_entropy"}
    if any(trace.routing(site).weights_NK is None for site in chosen):
        lacking |= OF_WEIGHTS
    if docs is None:
        lacking |= OF_DOMAINS | (OF_TOKENS if trace.tokens_N is None else set())
    if all(site == trace.places[0] for site in chosen):
        lacking.add("transition")  # from the site before
    fitting = [name for name, m in METRICS.items() if m.kind == "usage" and name not in lacking]
    names = fitting if metrics is None else metric_names(metrics, METRICS)
    for name in names:
        check_choice(f"metric for these sites of trace {trace.name}", name, fitting)
    if docs is not None and not isinstance(docs, Sequences):
        raise ValueError(f"docs is a {type(docs).__name__}; give what analysis.documents returns")
    return model, texts_of(trace) if docs is None else docs, chosen, names


def texts_of(trace: Trace) -> Sequences:
    """The recorded sequences as documents of their own; token 0 where tokens were not recorded."""
    tokens_N = torch.zeros(len(trace), dtype=torch.int64)
    if trace.tokens_N is not None:
        tokens_N = torch.from_numpy(trace.tokens_N.astype("int64"))
    order = trace.offset_S.argsort(kind="stable")
    parts = tokens_N.split(trace.length_S[order].tolist())
    names = [f"sequence {id}" for id in trace.sequence_id_S[order]]
    return Sequences(
        pad_sequence(parts, batch_first=True),
        pad_sequence(parts, batch_first=True, padding_value=IGNORE),
        torch.from_numpy(trace.sequence_id_S[order]),
        names,
        [""] * len(names),
        torch.zeros(len(names), dtype=torch.int64),
    )


class TraceProbes(Probes):
    """Documents as recorded decisions tell of them. Tokens count that have one at every site."""

    model: Any  # a TracedModel
    asked, left_out = 0, 0  # tokens so far, and those of them without a decision

    def look(self, batch: Sequences, counts_SL: Tensor) -> dict[RouterSite, Seen]:
        """What was recorded. Tokens without a decision count no more."""
        trace, sites = self.model.trace, self.model.sites()
        tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S)
        at = tokens.sequence_T, tokens.position_T
        check_lengths(trace, tokens, (batch.targets_SL != IGNORE).flatten())
        known_SL = trace.known(*at, tokens.token_ids_T, sites).view_as(counts_SL)
        self.asked += int(counts_SL.sum())
        self.left_out += int((counts_SL & ~known_SL).sum())
        counts_SL &= known_SL
        nothing_TD = torch.zeros(len(tokens.token_ids_T), 0)
        seen = {}
        for site in sites:
            ids_TK, weights_TK = trace.lookup(site, *at)
            if weights_TK is None:  # each that was chosen is used
                weights_TK = torch.ones(ids_TK.shape)
            scores_TE = torch.zeros(len(ids_TK), site.num_experts)
            routing = Routing(scores_TE, scores_TE, ids_TK.clamp(min=0), weights_TK)
            seen[site] = Seen(nothing_TD, routing, nothing_TD, None)
        return seen

    def check(self) -> None:
        """Warn of tokens without a decision; `ValueError` where none has one."""
        if not self.left_out:
            return
        said = (
            f"trace {self.model.name} has no decision for {self.left_out} of {self.asked} tokens "
            "that were to be measured"
        )
        if self.left_out == self.asked:
            raise ValueError(said)
        warnings.warn(f"{said}; they are left out", stacklevel=3)
