"""What a model is fed: batches to train on, sequences to evaluate on.

Shapes: B rows of a batch, S sequences, L tokens of a sequence. `prepare` makes the `Corpus`.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cartmoe.cards import card
from cartmoe.config import check_choice, check_whole
from cartmoe.corpora import Document
from cartmoe.tokenized import Corpus, document_ids, prepare
from cartmoe.tokenizers import Tokenizer

__all__ = ["Corpus", "Sequences", "TrainBatches", "prepare", "sequences", "sequences_from"]

Windows = Literal["spread", "first"]
IGNORE = -100  # the target that F.cross_entropy leaves out
CONTEXT = 8  # ids that settle what the next ones decode to: a character has at most 4 bytes


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """Windows of the concatenated training documents; a batch depends on seed and step alone.

    Every epoch cuts the tokens, taken as a ring, from another random offset into windows of
    `length` predicted tokens, and goes through them in another random order: no window twice.
    Raises `ValueError` where the training documents are shorter than one window.
    """

    corpus: Corpus
    batch_size: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", check_whole("batch_size", self.batch_size, 1))
        object.__setattr__(self, "length", check_whole("length", self.length, 1))
        if len(self._tokens) < self.length + 1:
            raise ValueError(
                f"length is {self.length}; a window of length + 1 tokens does not fit into the "
                f"{len(self._tokens)} training tokens of corpus {self.corpus.name!r}"
            )

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        return self.corpus.tokens[: self.corpus.split("train").end.max()]

    @property
    def windows_per_epoch(self) -> int:
        return len(self._tokens) // self.length

    def batch(self, step: int) -> Tensor:
        """(B, L + 1) ids, step = 0, 1, ...: inputs [:, :-1], targets [:, 1:]."""
        row = step * self.batch_size + np.arange(self.batch_size)
        epoch, number = np.divmod(row, self.windows_per_epoch)
        start_B = np.empty_like(row)
        for e in np.unique(epoch):
            start_B[epoch == e] = self._epoch(int(e))[number[epoch == e]]
        ring_BL = (start_B[:, None] + np.arange(self.length + 1)) % len(self._tokens)
        return torch.from_numpy(self._tokens[ring_BL].astype(np.int64))

    @functools.cached_property
    def _epochs(self) -> dict[int, np.ndarray]:
        return {}

    def _epoch(self, epoch: int) -> np.ndarray:
        """Where each window of the epoch starts; kept for the batches to come."""
        if epoch not in self._epochs:
            self._epochs.clear()
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(len(self._tokens))
            self._epochs[epoch] = offset + self.length * rng.permutation(self.windows_per_epoch)
        return self._epochs[epoch]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Windows of documents, each within one, those of a document adjacent and in order.

    Every token of a document but its bos is a target exactly once; the first window of a document
    begins with bos, the others with the last target of the window before.

    tokens_SL      int64 inputs; padded at the end with bos_id
    targets_SL     int64; `IGNORE` at the padding
    sequence_id_S  int64, a hash of the document's id and the number of the window within it
    document_id, domain   lists of S strings
    num_bytes_S    int64, UTF-8 bytes that the targets stand for
    unit           what a document_id stands for: "documents", or the groups of `by_group`

    `len`, and slices, which are Sequences too.
    """

    tokens_SL: Tensor
    targets_SL: Tensor
    sequence_id_S: Tensor
    document_id: list[str]
    domain: list[str]
    num_bytes_S: Tensor
    unit: str = "documents"

    def __len__(self) -> int:
        return len(self.document_id)

    def __repr__(self) -> str:
        documents, domains = len(set(self.document_id)), ", ".join(sorted(set(self.domain)))
        size = f"{len(self)} x {self.tokens_SL.shape[1]}, {self.num_tokens:,} tokens"
        return f"Sequences({size} of {documents} documents; domains {domains})"

    def _repr_html_(self) -> str:
        """How much text there is, by domain."""
        rows = pd.DataFrame({"domain": self.domain, "documents": self.document_id})
        rows["tokens"] = (self.targets_SL != IGNORE).sum(1).cpu().numpy()
        rows["bytes"] = self.num_bytes_S.cpu().numpy()
        sums = rows.groupby("domain").agg(
            documents=("documents", "nunique"), tokens=("tokens", "sum"), bytes=("bytes", "sum")
        )
        size = f"{len(self)} windows of {self.tokens_SL.shape[1]} tokens"
        title = f"{self.num_tokens:,} tokens to predict in {size}"
        return card(title, tables={"by domain": sums.reset_index()})

    def __getitem__(self, rows: slice) -> Sequences:
        return self._each(lambda v: v[rows])

    def take(self, rows: Sequence[int]) -> Sequences:
        """Those of these numbers, in this order."""
        index = torch.tensor(rows, dtype=torch.int64)
        return self._each(lambda v: v[index] if isinstance(v, Tensor) else [v[i] for i in rows])

    def to(self, device: str | torch.device) -> Sequences:
        """The same with its tensors on a device."""
        return self._each(lambda v: v.to(device) if isinstance(v, Tensor) else v)

    def _each(self, change: Callable[[Any], Any]) -> Sequences:
        return replace(self, **{name: change(getattr(self, name)) for name in ROWS})

    def by_group(self, group_of: Mapping[str, str], unit: str = "packages") -> Sequences:
        """The same with a document's group in the place of its id.

        Statistics take what shares a document_id for one unit; in the standard library that is the
        package, since its files are not independent. Sequence ids stay.
        """
        return replace(self, document_id=[group_of[id] for id in self.document_id], unit=unit)

    @property
    def num_tokens(self) -> int:
        """Predicted ones: targets without the padding."""
        return int((self.targets_SL != IGNORE).sum())

    @functools.cached_property
    def sha256(self) -> str:
        """Of all fields: equal hashes, equal sequences."""
        digest = hashlib.sha256(repr((self.document_id, self.domain)).encode())
        for tensor in (self.tokens_SL, self.targets_SL, self.sequence_id_S, self.num_bytes_S):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


ROWS = [field.name for field in fields(Sequences) if field.name != "unit"]  # an item a sequence


def sequences(
    corpus: Corpus,
    length: int,
    split: str = "validation",
    limit: int | None = None,
    max_tokens_per_document: int | None = None,
    windows: Windows = "spread",
) -> Sequences:
    """Evaluation sequences of a corpus.

    length   L, tokens that a sequence predicts at most
    limit    documents to take, the same ones every time; those of a smaller limit are the first of
             those of a larger one. Each domain has as large a share of their tokens as of all of
             the split's, as nearly as whole documents allow
    max_tokens_per_document   predicted tokens to take of each document
    windows  where they stand if it has more: "spread" over it, at places drawn by its id, or
             "first": from its beginning, where there are headers and imports

    Raises `ValueError` for an unknown split, one without documents, other windows, and numbers
    below 1.
    """
    table = corpus.split(split)
    table = table.assign(size=table.end - table.start - 1)
    parts = (
        (row.document_id, row.domain, corpus.tokens[row.start : row.end])
        for row in _sample(table, limit, max_tokens_per_document).itertuples()
    )
    return _cut(parts, corpus.tokenizer, length, max_tokens_per_document, windows)


def sequences_from(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    limit: int | None = None,
    max_tokens_per_document: int | None = None,
    windows: Windows = "spread",
) -> Sequences:
    """Evaluation sequences of documents in memory, as `sequences`; those without text are left out,
    and, with a warning, those that repeat another one to the last character.

    tokenizer   anything with the attributes and methods of `cartmoe.tokenizers.Tokenizer`

    Raises `ValueError` for no text at all, ids that two documents share, and numbers below 1.
    """
    by_id: dict[str, Document] = {}
    for document in documents:
        if by_id.setdefault(document.id, document) is not document:
            raise ValueError(f"document id {document.id!r} stands for more than one document")
    first: dict[str, str] = {}  # a copy would count as one more independent document
    for document in by_id.values():
        first.setdefault(document.text, document.id)
    kept = [d for d in by_id.values() if d.text and first[d.text] == d.id]
    ids = {d.id: document_ids(d, tokenizer) for d in kept}
    rows = [(d.id, d.domain, len(ids[d.id]) - 1) for d in kept]
    if not rows:
        raise ValueError("documents have no text")
    if copies := sum(1 for d in by_id.values() if d.text) - len(rows):
        warnings.warn(
            f"{copies} of the documents repeat others to the last character and are left out",
            stacklevel=2,
        )
    table = pd.DataFrame(rows, columns=["document_id", "domain", "size"])
    parts = (
        (row.document_id, row.domain, ids[row.document_id])
        for row in _sample(table, limit, max_tokens_per_document).itertuples()
    )
    return _cut(parts, tokenizer, length, max_tokens_per_document, windows)


def _hash(text: str) -> int:
    """63 bits: a nonnegative int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _sample(documents: pd.DataFrame, limit: int | None, max_tokens: int | None) -> pd.DataFrame:
    """So many of them, whose `size` is in tokens. Next comes of the domain that is furthest behind
    its share (as Sainte-Lague gives seats); within a domain its groups take turns, each with its
    documents by their hashes."""
    if limit is not None:
        limit = check_whole("limit", limit, 1)
    if max_tokens is not None:
        max_tokens = check_whole("max_tokens_per_document", max_tokens, 1)
    documents = documents.iloc[np.argsort([_hash(id) for id in documents.document_id])]
    if "group" in documents:
        nth = documents.groupby(["domain", "group"]).cumcount()
        documents = documents.iloc[np.argsort(nth, kind="stable")]
    share = documents.groupby("domain")["size"].sum()
    weight = documents["size"].clip(upper=max_tokens)
    middle = weight.groupby(documents.domain).cumsum() - weight / 2
    turn = middle / documents.domain.map(share)
    return documents.assign(turn=turn).sort_values(["turn", "domain"], kind="stable")[:limit]


def _places(
    document_id: str, size: int, length: int, max_tokens: int | None, windows: Windows
) -> list[tuple[int, int, str]]:
    """(start, stop) of each window among the `size` predicted tokens of a document, in order, and
    what tells it from its others."""
    taken = size if max_tokens is None else min(size, max_tokens)
    edges = list(pairwise([*range(0, taken, length), taken]))
    if windows == "first" or taken == size:
        return [(start, stop, str(number)) for number, (start, stop) in enumerate(edges)]
    # The tokens between them, cut at random.
    rng = np.random.default_rng(_hash(document_id))
    gaps = np.sort(rng.integers(size - taken + 1, size=len(edges))).tolist()
    moved = [(start + gap, stop + gap) for (start, stop), gap in zip(edges, gaps, strict=True)]
    return [(start, stop, f"at {start}") for start, stop in moved]


def _cut(
    documents: Iterable[tuple[str, str, np.ndarray]],
    tokenizer: Tokenizer,
    length: int,
    max_tokens: int | None,
    windows: Windows,
) -> Sequences:
    length = check_whole("length", length, 1)
    check_choice("windows", windows, get_args(Windows))
    columns: list[list] = [[] for _ in ROWS]
    for document_id, domain, ids in documents:
        ids = ids.astype(np.int64)
        places = _places(document_id, len(ids) - 1, length, max_tokens, windows)
        for start, stop, name in places:
            window = ids[start : stop + 1]
            tokens = np.full(length, tokenizer.bos_id)
            targets = np.full(length, IGNORE)
            tokens[: len(window) - 1] = window[:-1]
            targets[: len(window) - 1] = window[1:]
            # Counted behind the ids before: a decoder may drop a space at the beginning, or meet
            # half a character, and so the bytes of a document still add up.
            context = ids[max(0, start + 1 - CONTEXT) : start + 1]
            num_bytes = tokenizer.num_bytes(np.concatenate([context, window[1:]]))
            num_bytes -= tokenizer.num_bytes(context)
            sequence_id = _hash(f"{document_id}\0{name}")
            row = (tokens, targets, sequence_id, document_id, domain, num_bytes)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    tokens_SL, targets_SL = (torch.from_numpy(np.stack(rows)) for rows in columns[:2])
    hashes, names, domains, sizes = columns[2:]
    sequence_id_S, num_bytes_S = torch.tensor(hashes), torch.tensor(sizes)
    return Sequences(tokens_SL, targets_SL, sequence_id_S, names, domains, num_bytes_S)
