"""Recorded routing: what a model, or a serving engine, decided for every token.

It lies on the disk (see `trace_files`) and is mapped from there, so its size does not matter.
Shapes: N recorded tokens, T tokens asked for, L layers, E experts, K slots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.adapters import owning, routed_adapter
from analysis.perturb.trace_files import (
    META,
    PARTS,
    SEQUENCES,
    TOKENS,
    batches_of_arrays,
    batches_of_model,
    check_trace,
    file_of,
    site_of,
    trace_sha256,
    width_of,
    write_trace,
)
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite


class Recorded(NamedTuple):
    """One router's recorded decisions, mapped from the disk; None for what was not recorded."""

    ids_NK: np.ndarray
    weights_NK: np.ndarray | None
    logits_NE: np.ndarray | None


class Trace:
    """Made by `record` or `from_arrays`, opened by `load`.

    path, name   its folder, and that folder's name
    sha256       of all that is recorded: its identity
    places       its routers, a `RouterSite` each (num_experts None where nobody said how many)
    origin       SHA-256 of the model and the documents, where it was recorded here
    len          tokens recorded

    It is pickled as its path and SHA-256 alone.
    """

    def __init__(self, path: str | Path, sha256: str | None = None):
        """Without reading all of it: `load` does. Raises `ValueError` where there is none, or
        another one than that of the SHA-256."""
        self.path = Path(path)
        self.name, found = self.path.resolve().name, trace_sha256(self.path)
        if found is None or sha256 not in (None, found):
            what = "no trace" if found is None else f"another one, of SHA-256 {found}"
            raise ValueError(f"the trace that was at {path} is gone; now there is {what}")
        self.sha256 = found
        meta = json.loads((self.path / META).read_text(encoding="utf-8"))
        self.origin: dict[str, Any] = meta["origin"]
        self.places = [site_of(**place) for place in meta["places"]]
        self._places = {site.place: site for site in self.places}
        index_S3 = self._map(SEQUENCES, "<i8").reshape(-1, 3)
        order_S = index_S3[:, 0].argsort()
        self._ids_S, self._offset_S, self._length_S = index_S3[order_S].T.copy()
        # All now: what another process puts in the folder's place later does not matter.
        self._tokens_N = self._map(TOKENS, "<i4")
        self._recorded = {
            place: Recorded(*(self._map(file_of(s, x), PARTS[x], width_of(s, x)) for x in PARTS))
            for place, s in self._places.items()
        }

    def _map(self, file: str, dtype: str, width: int | None = None) -> Any:
        path = self.path / file
        if not path.exists():
            return None
        mapped = np.memmap(path, dtype, "r")
        return mapped.reshape(-1, width) if width else mapped

    def __len__(self) -> int:
        return int(self._length_S.sum())

    def __repr__(self) -> str:
        sites = len(self.places)
        return (
            f"Trace({self.name}: {len(self)} tokens of {len(self._ids_S)} sequences, {sites} sites)"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self):
        return Trace, (str(self.path), self.sha256)

    @property
    def sites(self) -> list[tuple[int, int]]:
        """(layer, stage) of its routers, in order."""
        return list(self._places)

    def place(self, site: RouterSite | tuple[int, int]) -> RouterSite:
        """What is known of the router at a site, or at (layer, stage); `ValueError` listing the
        recorded ones if it is none of them."""
        layer, stage = (site.layer, site.stage) if isinstance(site, RouterSite) else site
        if (layer, stage) not in self._places:
            have = ", ".join(map(str, self.places))
            raise ValueError(
                f"trace {self.name} has no router at layer {layer} stage {stage}; it has {have}"
            )
        return self._places[layer, stage]

    def routing(self, site: RouterSite | tuple[int, int]) -> Recorded:
        """All that is recorded of one router, mapped, token by token in the order of recording."""
        return self._recorded[self.place(site).place]

    def lookup(
        self, site: RouterSite | tuple[int, int], sequence_T: Tensor, position_T: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (T, K) int64 and weights (T, K) fp32 (None: not recorded), on the tensors' device.

        Behind the last recorded token of a sequence stands padding, which has no decision: its ids
        are -1 and its weights 0. Raises `ValueError` for a site that was not recorded, and saying
        how many of the sequences were not.
        """
        recorded, (row_T, known_T) = self.routing(site), self._rows(sequence_T, position_T)
        ids_TK = recorded.ids_NK[row_T].astype(np.int64)
        ids_TK[~known_T] = -1
        found = [ids_TK]
        if recorded.weights_NK is not None:
            found.append(recorded.weights_NK[row_T] * known_T[:, None])
        ids, *weights = (torch.from_numpy(a).to(sequence_T.device) for a in found)
        return ids, weights[0] if weights else None

    def known(self, sequence_T: Tensor, position_T: Tensor, token_ids_T: Tensor) -> Tensor:
        """(T,) bool: for which tokens there is a decision. Where the recording knows its tokens,
        they must be these. Raises `ValueError` for sequences that were not recorded."""
        row_T, known_T = self._rows(sequence_T, position_T)
        if self._tokens_N is not None:
            known_T &= self._tokens_N[row_T] == token_ids_T.cpu().numpy()
        return torch.from_numpy(known_T).to(sequence_T.device)

    def _rows(self, sequence_T: Tensor, position_T: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(T,) rows, 0 where there is none; (T,) where there is one."""
        ids_T, at_T = sequence_T.cpu().numpy(), position_T.cpu().numpy()
        number_T = self._ids_S.searchsorted(ids_T).clip(max=len(self._ids_S) - 1)
        found_T = self._ids_S[number_T] == ids_T
        if not found_T.all():
            asked, missing = len(np.unique(ids_T)), len(np.unique(ids_T[~found_T]))
            raise ValueError(
                f"trace {self.name} has not recorded {missing} of these {asked} sequences "
                f"({(~found_T).sum()} positions); record it on the same documents"
            )
        known_T = at_T < self._length_S[number_T]
        return np.where(known_T, self._offset_S[number_T] + at_T, 0), known_T

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Every byte is checked. Raises `FileNotFoundError` where there is no folder, `ValueError`
        naming the file that is not what was written."""
        check_trace(Path(path))
        return cls(path)

    @classmethod
    @owning
    def record(
        cls,
        model: object,
        docs: Sequences,
        path: str | Path,
        *,
        logits: bool = False,
        batch_size: int = 16,
        progress: bool = True,
    ) -> Trace:
        """Record the clean decisions of a model under study, or a `LanguageModel`, on documents.

        logits   keep the router's logits too, E numbers a token and site

        Of each sequence the tokens up to its last one with a target are recorded: no padding.
        Raises `FileExistsError` if there is something at the path, `ValueError` for a dense model,
        no documents, and sequences of equal id.
        """

        model = routed_adapter(model)
        origin = {"model": model.identity, "documents": docs.sha256}
        found = batches_of_model(model, docs, batch_size, logits, progress)
        write_trace(Path(path), model.sites(), found, origin)
        return cls(path)

    @classmethod
    def from_arrays(
        cls,
        routed_experts: Iterable[Any],
        sequence_ids: Iterable[int],
        path: str | Path,
        *,
        places: Sequence[tuple[int, int]] | None = None,
        num_experts: int | None = None,
        weights: Iterable[Any] | None = None,
    ) -> Trace:
        """What serving engines return: for each sequence an integer array (tokens, layers, K).

        sequence_ids   a number for each, as documents have them (`Sequences.sequence_id_S`)
        places         (layer, stage) of each position in the middle axis; default: layers 0, 1, ...
        num_experts    of every router, to check the ids, and the model they are imposed on, by
        weights        arrays of the same shapes; without them an expert's weight is what the
                       router that replays gives it

        Arrays may come from a generator: one is held at a time. Raises `ValueError` for other
        shapes, ids that are no whole numbers or none of the experts, and equal sequence ids.
        """
        arrays = iter(routed_experts)
        first: Any = next(arrays, None)
        if np.ndim(first) != 3:
            raise ValueError(
                f"routed_experts has {type(first).__name__} of shape {np.shape(first)} first; give "
                "an array (tokens, layers, K) for each sequence"
            )
        _, num_layers, slots = np.shape(first)
        places = [(layer, 0) for layer in range(num_layers)] if places is None else list(places)
        if len(places) != num_layers or len(set(places)) != num_layers:
            raise ValueError(
                f"places is {places!r}; give a different (layer, stage) for each of the "
                f"{num_layers} positions of the middle axis"
            )
        sites = [site_of(layer, stage, slots, num_experts) for layer, stage in places]
        weights = None if weights is None else iter(weights)
        found = batches_of_arrays(chain([first], arrays), iter(sequence_ids), weights, sites)
        write_trace(Path(path), sites, found, {})
        return cls(path)
