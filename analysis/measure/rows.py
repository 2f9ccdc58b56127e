"""Sums over the tokens of each sequence, a row each; and means over tokens, with intervals over the
documents, from such rows.

Shapes: S sequences, L length, T = S * L tokens, C columns, D documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.stats import Bootstrap
from cartmoe.data import IGNORE, Sequences

IDS = ("document_id", "sequence_id")


class SequenceRows:
    """Batch after batch; the same columns every time."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Any]] = []

    def add(self, batch: Sequences, per_token: Mapping[str, Tensor], **columns: Any) -> None:
        """A row a sequence: document_id, sequence_id, num_tokens (that have a target), and

        columns     arrays (S,), or one value for all
        per_token   (T,) each: fp64 sums over the tokens that have a target
        """
        used_SL = batch.targets_SL != IGNORE
        values = [value.double().view_as(used_SL) for value in per_token.values()]
        sums_CS = torch.where(used_SL, torch.stack(values), 0.0).sum(-1).cpu().numpy()
        self.append(
            batch,
            **columns,
            num_tokens=used_SL.sum(-1).cpu().numpy(),
            **dict(zip(per_token, sums_CS, strict=True)),
        )

    def append(self, batch: Sequences, **columns: Any) -> None:
        """The same without sums."""
        ids = dict(document_id=batch.document_id, sequence_id=batch.sequence_id_S.cpu().numpy())
        spread = {n: v if np.ndim(v) else np.full(len(batch), v) for n, v in columns.items()}
        self._parts.append(ids | spread)

    def state(self) -> list[dict[str, Tensor]]:
        """Its numbers, for `restore`."""
        return [
            {n: torch.from_numpy(v) for n, v in part.items() if n not in IDS}
            for part in self._parts
        ]

    def restore(self, batch: Sequences, state: List[Mapping[str, Tensor]]) -> None:
        """Those of one batch alone, as they were."""
        for part in state:
            self.append(batch, **{name: values.numpy() for name, values in part.items()})

    def frame(self) -> pd.DataFrame:
        """All of them."""
        parts = self._parts
        names = parts[0] if parts else ()
        return pd.DataFrame(
            {name: np.concatenate([part[name] for part in parts]) for name in names}
        )


def means(rows: pd.DataFrame, keys: List[str], bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
    """A row for each of the keys' values, in the order of their first row: the keys, num_documents,
    num_tokens, and of each other column its mean per token with BCa bounds over documents, NAME,
    NAME_low, NAME_high.

    A mean that is not defined (NaN) has bounds that are not.
    """
    sums = [c for c in rows if c not in (*keys, "document_id", "sequence_id", "num_tokens")]
    found = []
    for key, own in rows.groupby(list(keys), sort=False):
        document, names = pd.factorize(own.document_id)
        tokens_D, *sums_CD = (np.bincount(document, own[c]) for c in ("num_tokens", *sums))
        row = dict(zip(keys, key, strict=True)) | {"num_documents": len(names)}
        row["num_tokens"] = int(tokens_D.sum())
        defined_C = np.isfinite(sums_CD).all(-1)
        found_C3 = np.full((len(sums), 3), np.nan)
        if defined_C.any():
            some_CD = np.array(sums_CD)[defined_C]
            weights_CD = np.broadcast_to(tokens_D, some_CD.shape)
            found_C3[defined_C] = np.transpose(bootstrap.intervals(some_CD, weights_CD))
        for name, values in zip(sums, found_C3.tolist(), strict=True):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        found.append(row)
    return pd.DataFrame(found)
