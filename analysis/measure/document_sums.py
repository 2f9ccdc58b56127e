"""Sums over the tokens of documents, and means with intervals over the documents from them.

Shapes: S sequences, L length, T = S * L tokens, C columns, D documents, M rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.stats import Bootstrap
from cartmoe.data import IGNORE, Sequences


class DocumentSums:
    """Sums of the same columns for each of several rows, by document.

    keys   what the parts of a row's key are called: columns of the table
    """

    def __init__(self, *keys: str):
        self.keys = keys
        self.columns: list[str] = []
        self._sums: dict[tuple, dict[str, np.ndarray]] = {}

    def add(
        self,
        batch: Sequences,
        key: tuple,
        per_token: Mapping[str, Tensor],
        used_T: Tensor | None = None,
    ) -> None:
        """Add the tokens of a batch to a row.

        per_token   (T,) of each column, the same ones every time
        used_T      the tokens that count; by default those with a target
        """
        self.columns = list(per_token)
        used_SL = batch.targets_SL != IGNORE
        used_SL = used_SL if used_T is None else used_T.view_as(used_SL)
        used_T, values = used_SL.flatten(), per_token.values()
        kept = [torch.where(used_T, v.double(), 0.0).view_as(used_SL).sum(-1) for v in values]
        sums_SC = torch.stack([*kept, used_SL.sum(-1).double()], -1).cpu().numpy()
        row = self._sums.setdefault(key, {})
        for document, sums_C in zip(batch.document_id, sums_SC, strict=True):
            row[document] = row.get(document, 0.0) + sums_C

    def table(self, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
        """A row a key, in the order of their first `add`: the keys, num_documents, num_tokens, and
        of each column its mean per token with BCa bounds over documents, NAME, NAME_low, NAME_high.

        A mean that is not defined (NaN) has bounds that are not.
        """
        rows: list[dict[str, Any]] = []
        for key, sums in self._sums.items():
            *sums_CD, tokens_D = np.array(list(sums.values())).T
            row = dict(zip(self.keys, key, strict=True))
            rows.append(row | {"num_documents": len(sums), "num_tokens": int(tokens_D.sum())})
            defined = [np.isfinite(sums_D).all() for sums_D in sums_CD]
            found_C3 = np.full((len(defined), 3), np.nan)
            if any(defined):
                sums_CD = np.array(sums_CD)[defined]
                weights_CD = np.broadcast_to(tokens_D, sums_CD.shape)
                found_C3[defined] = np.transpose(bootstrap.intervals(sums_CD, weights_CD))
            for name, values in zip(self.columns, found_C3.tolist(), strict=True):
                rows[-1] |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        return pd.DataFrame(rows)
