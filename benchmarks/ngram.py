"""python -m benchmarks.ngram: what simple models know of the text that trained models are measured
on, in bits per byte.

An interpolated byte n-gram model after Witten and Bell (IEEE Trans. Inf. Theory 37, 1991),

    p_n(s | c) = (count(c s) + T(c) p_{n-1}(s | c')) / (count(c) + T(c)),

c being the n - 1 bytes before, T(c) how many different bytes follow it in training, c' the context
without its first byte, and p_0 = 1 / 256; and general compressors. Shapes: N training tokens, S
windows, L tokens of each.
"""

from __future__ import annotations

import gzip
import lzma

import numpy as np
import pandas as pd

import analysis as an
from cartmoe.data import IGNORE, Sequences, prepare

ORDERS = range(1, 7)


def ngram_bits(train_N: np.ndarray, docs: Sequences) -> dict[int, float]:
    """By order, bits per byte on the windows, of which each is all that is known before a byte."""
    rows = zip(docs.tokens_SL.numpy(), docs.targets_SL.numpy(), strict=True)
    windows = [np.append(i[: (t != IGNORE).sum()], t[t != IGNORE][-1:]) for i, t in rows]
    ends = np.cumsum([len(window) for window in windows])
    text = np.concatenate(windows)
    place = np.arange(len(text)) - np.repeat(
        ends - [len(w) for w in windows], np.diff(ends, prepend=0)
    )
    probability, found = np.full(len(text), 1 / 256), {}
    for order in ORDERS:
        grams, counts = np.unique(_grams(train_N, order), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        followers = np.diff(np.append(first, len(grams)))
        totals = np.add.reduceat(counts, first)
        own = np.flatnonzero(place >= order - 1)  # the context lies within the window
        asked = _grams(text, order)[own - (order - 1)]
        count = _looked_up(grams, counts, asked)
        total, kinds = (
            _looked_up(contexts, of, asked >> np.uint64(8)) for of in (totals, followers)
        )
        known = total > 0
        mixed = (count + kinds * probability[own])[known] / (total + kinds)[known]
        probability[own[known]] = mixed
        found[order] = -np.log2(probability[place > 0]).mean()
    return found


def _grams(text_N: np.ndarray, order: int) -> np.ndarray:
    """(N - order + 1,) each run of so many bytes as one number."""
    grams = np.zeros(len(text_N) - order + 1, np.uint64)
    for i in range(order):
        grams = (grams << np.uint64(8)) | text_N[i : len(text_N) - order + 1 + i].astype(np.uint64)
    return grams


def _looked_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    at = keys.searchsorted(asked).clip(max=len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def baselines() -> pd.DataFrame:
    """A row a model: name, bits_per_byte, on the documents of `analysis.models`."""
    corpus = prepare("stdlib")
    docs = an.documents("stdlib", length=256, limit=300, max_tokens_per_document=1024)
    train_N = np.asarray(corpus.tokens[: corpus.split("train").end.max()])
    rows = {f"{order}-gram": bits for order, bits in ngram_bits(train_N, docs).items()}
    text = docs.targets_SL[docs.targets_SL != IGNORE].numpy().astype(np.uint8).tobytes()
    packed = {
        "gzip -9": gzip.compress(text, 9),
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    rows |= {name: 8 * len(data) / len(text) for name, data in packed.items()}
    return pd.DataFrame({"name": list(rows), "bits_per_byte": list(rows.values())})


if __name__ == "__main__":
    print(baselines().to_string(index=False, float_format="%.3f"))
