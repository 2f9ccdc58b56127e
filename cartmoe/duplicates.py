"""Documents that repeat others: a model that saw one in training has seen the other."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tqdm.auto import tqdm

from cartmoe.corpora import Document


def drop_near_duplicates(documents: Iterable[Document], threshold: float = 0.5) -> list[Document]:
    """The documents without those that mostly repeat longer ones, in their order.

    A document goes when at least the share `threshold` of its shingles (32 characters wide, case
    and white space aside) stands in longer documents, or in equally long ones before it. So a
    copy goes, an edited copy goes, and an excerpt goes, but not the book that it was taken from.
    """
    documents = list(documents)
    if not documents:
        return []
    longest_first = sorted(range(len(documents)), key=lambda i: -len(documents[i].text))
    progress = tqdm(longest_first, desc="comparing", delay=1)
    sketches = [_shingles(documents[i].text) for i in progress]
    owner = np.repeat(np.arange(len(sketches)), [len(sketch) for sketch in sketches])
    _, first, which = np.unique(np.concatenate(sketches), return_index=True, return_inverse=True)
    seen = owner[first][which] < owner
    share = np.bincount(owner, seen) / np.bincount(owner)
    keep = sorted(i for i, s in zip(longest_first, share, strict=True) if s < threshold)
    return [documents[i] for i in keep]


def _shingles(text: str) -> np.ndarray:
    """Hashes of one in eight distinct 32-byte windows; by value, so that all texts agree on which.

    Sampling by value estimates containment, which a MinHash of fixed size does not ("FracMinHash",
    Irber et al. 2022).
    """
    data = " ".join(text.lower().split()).encode().ljust(32)
    hashes = np.frombuffer(data, np.uint8).astype(np.uint64)
    for width in (1, 2, 4, 8, 16):  # two neighbors of one width make one of twice that width
        left, right = hashes[:-width], hashes[width:]
        hashes = left * np.uint64(0x9E3779B97F4A7C15) + (right ^ (right >> np.uint64(29)))
    chosen = hashes[hashes < 2**61]
    return np.unique(chosen) if chosen.size else hashes.min(keepdims=True)
