"""Text as a model reads it undisturbed, and what conditions do to each of its tokens.

Shapes: N tokens that are predicted, E experts, K slots.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.adapters import (
    Adapter,
    DenseRouting,
    check_documents,
    owned,
    run,
    tokenizer_of,
)
from analysis.measure import CleanPass, Intervention, calibrate, calibration_documents, prepared
from analysis.perturb import Calibration, Condition, Tokens, models_of, sites_of, token_kinds
from cartmoe.corpora import Document
from cartmoe.data import IGNORE, Sequences, sequences_from
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

LIMIT = 2048  # tokens of a text
PARTS = 4  # tokens that a character may be spread over


class Slots(NamedTuple):
    """What a router decided for the tokens, each expert once, the heaviest first."""

    ids_NK: Tensor
    weights_NK: Tensor  # 0: an empty slot


class Run(NamedTuple):
    """What one condition did: every token's loss in nats, and every router's decisions."""

    nll_N: Tensor
    slots: dict[RouterSite, Slots]


@dataclass
class Passage:
    """Documents, read in one clean pass that all conditions share.

    Token i is predicted at position i, and read by experts at position i + 1: the first position
    reads what begins a document, and nobody reads the last token.

    num_given   tokens that the text had before it was cut
    """

    model: Adapter
    docs: Sequences
    num_given: int = 0
    calibrated_on: Sequences | None = None

    @classmethod
    def of(
        cls, model: Adapter, text: str, length: int, calibrated_on: Sequences | None = None
    ) -> Passage:
        """One text in windows of `length` tokens, each read without those before, at most `LIMIT`
        tokens in all. Raises `ValueError` for an empty text."""
        if not text:
            raise ValueError("text is empty; give some")
        document = Document("text", "text", "text", text)
        tokenizer = tokenizer_of(model)
        limits: dict[str, Any] = dict(max_tokens_per_document=LIMIT, windows="first")
        docs = sequences_from([document], tokenizer, length, **limits)
        check_documents(docs, model, name="text")
        return cls(model, docs, len(tokenizer.encode(text)), calibrated_on)

    @cached_property
    def batch(self) -> Sequences:
        """The documents where the model is."""
        return self.docs.to(self.model.device)

    @cached_property
    def clean(self) -> CleanPass:
        """One forward."""
        with owned(self.model):
            return CleanPass.of(self.model, self.batch)

    @cached_property
    def calibration(self) -> Calibration:
        """Of the documents that were given for it, or else of the text itself."""
        docs = calibration_documents(self.calibrated_on, self.docs, self.model)
        return calibrate(self.model, docs)

    @cached_property
    def used_T(self) -> Tensor:
        """(T,) which positions predict a token; others are padding."""
        return (self.batch.targets_SL != IGNORE).flatten()

    @cached_property
    def undisturbed(self) -> Run:
        """The clean run."""
        return self._run(self.clean.losses.nll_T, self.clean.routings.values())

    @cached_property
    def margins(self) -> dict[RouterSite, Tensor]:
        """(N,) how far each clean decision is from another one; see `Router.margin`."""
        clean, found = self.clean, {}
        for site, routing in clean.routings.items():
            margin_T = self.model.router(site).margin(routing, clean.dense[site].count_T)
            found[site] = margin_T[self.used_T]
        return found

    @cached_property
    def target_ids(self) -> list[int]:
        """N token ids."""
        return self.docs.targets_SL[self.docs.targets_SL != IGNORE].tolist()

    @cached_property
    def texts(self) -> list[str]:
        """N texts of the tokens, which joined are the text."""
        return token_texts(tokenizer_of(self.model), self.target_ids)

    @torch.no_grad()
    def run(self, condition: Condition) -> Run:
        """The text under a condition, from the first segment in which it acts. Raises `ValueError`
        for one that cannot act on the model."""
        model, clean, batch = self.model, self.clean, self.batch
        sites_of(model, condition.where, tokens=True)
        kinds_V = token_kinds(model, [condition.where])
        clean.tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S, kinds_V)
        clean.draws.clear()  # they may be of other sites, and are quickly made
        with owned(model, *models_of([condition])):
            ready = prepared(model, clean, condition)
            acting = Intervention(ready, self.calibration, clean.routings, check=True)
            with acting.rerunning(model, clean) as (segments, start):
                end = run(segments, start)
            losses = clean.losses.compare(model, end.hidden_BLD.flatten(0, 1))
        return self._run(losses["nll"], end.decisions)

    def _run(self, nll_T: Tensor, decisions: Iterable[Routing]) -> Run:
        pairs = zip(self.model.sites(), decisions, strict=True)
        slots = {site: slots_of(routing, self.used_T) for site, routing in pairs}
        return Run(nll_T[self.used_T], slots)


def slots_of(routing: Routing, used_T: Tensor) -> Slots:
    """As many slots as the token with most experts has, on the CPU."""
    dense = DenseRouting(Routing(*(t[used_T] for t in routing)))
    K = max(1, int(dense.count_T.max()))
    weights_NE, ids_NE = dense.weights_TE.sort(dim=-1, descending=True, stable=True)
    return Slots(ids_NE[:, :K].cpu(), weights_NE[:, :K].cpu())


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """What each token adds to the text. A character that several tokens make up stands with the
    first of them, and the others have none."""
    texts: list[str] = []
    before: list[int] = []  # a decoder may drop a space at the beginning of what it is given
    group: list[int] = []
    for id in ids:
        group.append(id)
        head = tokenizer.decode(before)
        text = tokenizer.decode([*before, *group]).removeprefix(head)
        if "\N{REPLACEMENT CHARACTER}" in text and len(group) < PARTS:
            continue
        texts += [text, *[""] * (len(group) - 1)]
        before, group = group, []
    if group:
        texts += ["\N{REPLACEMENT CHARACTER}", *[""] * (len(group) - 1)]
    return texts


def default_text() -> str:
    """A passage of the running Python's standard library; none of the models that come with the
    project was trained on it."""
    return Path(queue.__file__).read_text(encoding="utf-8")[:800]
