"""One expert: how much it is used, where, for what, what losing it costs, who is like it.

Shapes: N tokens that have a target, E experts.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import tokenizer_of
from analysis.explorer.passage import Passage
from analysis.overlap import measure_overlap
from analysis.perturb import KINDS, Condition, DropExperts, Where, kind_of
from analysis.stats import SHARED
from cartmoe.hooks import RouterSite

CONTEXTS, LABELS, NEAREST = 5, 6, 3
BEFORE, AFTER = 16, 8  # tokens around one that an expert reads


class Cards:
    """Cards of a model's experts, from the passage that they are observed on; each is made when it
    is first asked for, and kept."""

    def __init__(self, passage: Passage):
        self.passage, self.model = passage, passage.model
        self._made: dict[tuple[RouterSite, int], dict[str, Any]] = {}
        self._pairs: dict[RouterSite, pd.DataFrame] = {}

    def card(self, site: RouterSite, expert: int) -> dict[str, Any]:
        """Plain JSON:

        load       its share of the used slots;  weight  its mean weight where it is used
        contexts   before, token, after, weight: its heaviest tokens, each token id once
        affinity   name, share, tokens: of the tokens of each domain, or else of each kind, the
                   share that it reads; `by` says which
        damage     rise of the loss, nats per token, when it is dropped (the router then chooses
                   among the others)
        nearest    expert, cka, null: those with the most similar outputs (debiased linear CKA)
        """
        if (site, expert) not in self._made:
            self._made[site, expert] = self._card(site, expert)
        return self._made[site, expert]

    def _card(self, site: RouterSite, expert: int) -> dict[str, Any]:
        passage = self.passage
        weight_NE = passage.clean.dense[site].weights_TE[passage.used_T].cpu()
        weight_N, used_NE = weight_NE[:, expert], weight_NE != 0
        dropped = passage.run(Condition(DropExperts(ids=(expert,)), Where(*site.place)))
        rise = dropped.nll_N.double().mean() - passage.undisturbed.nll_N.double().mean()
        num_used = int(used_NE[:, expert].sum())
        return {
            "site": str(site),
            "expert": expert,
            "load": num_used / max(1, int(used_NE.sum())),
            "weight": float(weight_N.sum()) / max(1, num_used),
            "contexts": self._contexts(weight_N),
            "by": self._labels[0],
            "affinity": self._affinity(used_NE[:, expert]),
            "damage": rise.item(),
            "nearest": self._nearest(site, expert),
            "num_tokens": len(weight_N),
            "num_documents": len(set(passage.docs.document_id)),
        }

    def _contexts(self, weight_N: Tensor) -> list[dict[str, Any]]:
        docs, decode = self.passage.docs, tokenizer_of(self.model).decode
        place_N = self.passage.used_T.cpu().nonzero()[:, 0]
        found: dict[int, dict[str, Any]] = {}
        for number in weight_N.argsort(descending=True, stable=True).tolist():
            if weight_N[number] == 0 or len(found) == CONTEXTS:
                break
            row, at = divmod(int(place_N[number]), docs.tokens_SL.shape[1])
            ids = docs.tokens_SL[row].tolist()
            found.setdefault(
                ids[at],
                {
                    "before": decode(ids[max(0, at - BEFORE) : at]),
                    "token": decode([ids[at]]),
                    "after": decode(ids[at + 1 : at + 1 + AFTER]),
                    "weight": round(weight_N[number].item(), 3),
                },
            )
        return list(found.values())

    @cached_property
    def _labels(self) -> tuple[str, list[str], np.ndarray]:
        """What tokens are told apart by, its values, and that of each token (N,)."""
        passage, docs = self.passage, self.passage.docs
        used_T = passage.used_T.cpu()
        if len(set(docs.domain)) > 1:
            names, domain_S = np.unique(docs.domain, return_inverse=True)
            domain_T = torch.from_numpy(domain_S).repeat_interleave(docs.tokens_SL.shape[1])
            return "domain", names.tolist(), domain_T[used_T].numpy()
        decode = tokenizer_of(self.model).decode
        kinds = [kind_of(decode([id])) for id in docs.tokens_SL.flatten()[used_T].tolist()]
        return "kind of token", list(KINDS), np.array([KINDS.index(kind) for kind in kinds])

    def _affinity(self, used_N: Tensor) -> list[dict[str, Any]]:
        _, names, label_N = self._labels
        tokens, uses = (np.bincount(label_N, w, len(names)) for w in (None, used_N.numpy()))
        shares = uses / np.maximum(tokens, 1)
        order = [i for i in np.argsort(-shares, kind="stable") if tokens[i]]
        return [
            {"name": names[i], "share": round(float(shares[i]), 4), "tokens": int(tokens[i])}
            for i in order[:LABELS]
        ]

    def _nearest(self, site: RouterSite, expert: int) -> list[dict[str, Any]]:
        if site not in self._pairs:
            found = measure_overlap(
                self.model, self.passage.docs, ["cka"], sites=site, progress=False
            )
            self._pairs[site] = found.pairs
        pairs = self._pairs[site]
        own = pairs[(pairs.expert_i == expert) & (pairs.expert_j != SHARED)]
        rows = own.dropna(subset=["value", "null"]).nlargest(NEAREST, "value").itertuples()
        return [
            {"expert": int(row.expert_j), "cka": round(row.value, 3), "null": round(row.null, 3)}
            for row in rows
        ]
