"""Recorded routing: what a model, or a serving engine, decided for every token.

It lies on the disk (see `trace_files`) and is mapped from there, so its size does not matter.
Shapes: N recorded tokens, T tokens asked for, L layers, E experts, K slots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.adapters import owning, routed_adapter
from analysis.perturb.trace_arrays import Uncaptured, read_arrays
from analysis.perturb.trace_files import (
    META,
    PARTS,
    SEQUENCES,
    TOKENS,
    batches_of_model,
    check_trace,
    file_of,
    site_of,
    trace_sha256,
    width_of,
    write_trace,
)
from cartmoe.data import Sequences
from cartmoe.files import path_of
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
    sequence_id_S, offset_S, length_S   the recorded sequences: where each begins, its tokens
    tokens_N     their ids, one sequence after the other; None where only decisions were recorded
    uncaptured   by (layer, stage), of how many tokens there is no decision
    origin       SHA-256 of the model and the documents, where it was recorded here
    len          tokens recorded

    It is pickled as its path and SHA-256 alone.
    """

    def __init__(self, path: str | Path, sha256: str | None = None):
        """Without reading all of it: `load` does. Raises `ValueError` where there is none, or
        another one than that of the SHA-256."""
        self.path = path_of("path", path)
        self.name, found = self.path.resolve().name, trace_sha256(self.path)
        if found is None or sha256 not in (None, found):
            what = "no trace" if found is None else f"another one, of SHA-256 {found}"
            raise ValueError(f"the trace that was at {path} is gone; now there is {what}")
        self.sha256 = found
        meta = json.loads((self.path / META).read_text(encoding="utf-8"))
        self.origin: dict[str, Any] = meta["origin"]
        self.places = [site_of(**place) for place in meta["places"]]
        self._places = {site.place: site for site in self.places}
        self.uncaptured = dict(zip(self._places, meta["uncaptured"], strict=True))
        index_S3 = self._map(SEQUENCES, "<i8").reshape(-1, 3)
        order_S = index_S3[:, 0].argsort()
        self.sequence_id_S, self.offset_S, self.length_S = index_S3[order_S].T.copy()
        # All now: what another process puts in the folder's place later does not matter.
        self.tokens_N = self._map(TOKENS, "<i4")
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
        return int(self.length_S.sum())

    def __repr__(self) -> str:
        lost = max(self.uncaptured.values())
        size = f"{len(self)} tokens of {len(self.sequence_id_S)} sequences"
        left_out = f", up to {lost} tokens of a site not captured" if lost else ""
        return f"Trace({self.name}: {size}, {len(self.places)} sites{left_out})"

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
        """All that is recorded of one router, mapped, token by token in the order of recording; a
        token that was not captured has ids -1 and weights 0."""
        return self._recorded[self.place(site).place]

    def lookup(
        self, site: RouterSite | tuple[int, int], sequence_T: Tensor, position_T: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (T, K) int64 and weights (T, K) fp32 (None: not recorded), on the tensors' device.

        Where there is no decision, as behind the last recorded token of a sequence and where an
        engine captured none, ids are -1 and weights 0. Raises `ValueError` for a site that was not
        recorded, and saying how many of the sequences were not.
        """
        recorded, (row_T, known_T) = self.routing(site), self._rows(sequence_T, position_T)
        ids_TK = recorded.ids_NK[row_T].astype(np.int64)
        ids_TK[~known_T] = -1
        found = [ids_TK]
        if recorded.weights_NK is not None:
            found.append(recorded.weights_NK[row_T] * known_T[:, None])
        ids, *weights = (torch.from_numpy(a).to(sequence_T.device) for a in found)
        return ids, weights[0] if weights else None

    def known(
        self,
        sequence_T: Tensor,
        position_T: Tensor,
        token_ids_T: Tensor,
        sites: Iterable[RouterSite | tuple[int, int]] = (),
    ) -> Tensor:
        """(T,) bool: for which tokens there is a decision, at all of these sites. Where the
        recording knows its tokens, they must be these. Raises `ValueError` for sequences that were
        not recorded."""
        row_T, known_T = self._rows(sequence_T, position_T)
        for site in sites:
            known_T &= self.routing(site).ids_NK[row_T, 0] >= 0
        if self.tokens_N is not None:
            known_T &= self.tokens_N[row_T] == token_ids_T.cpu().numpy()
        return torch.from_numpy(known_T).to(sequence_T.device)

    def _rows(self, sequence_T: Tensor, position_T: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(T,) rows, 0 where there is none; (T,) where there is one."""
        ids_T, at_T = sequence_T.cpu().numpy(), position_T.cpu().numpy()
        number_T = self.sequence_id_S.searchsorted(ids_T).clip(max=len(self.sequence_id_S) - 1)
        found_T = self.sequence_id_S[number_T] == ids_T
        if not found_T.all():
            asked, missing = len(np.unique(ids_T)), len(np.unique(ids_T[~found_T]))
            raise ValueError(
                f"trace {self.name} has not recorded {missing} of these {asked} sequences "
                f"({(~found_T).sum()} positions); record it on the same documents"
            )
        known_T = at_T < self.length_S[number_T]
        return np.where(known_T, self.offset_S[number_T] + at_T, 0), known_T

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Every byte is checked. Raises `FileNotFoundError` where there is no folder, `ValueError`
        naming the file that is not what was written."""
        check_trace(path_of("path", path))
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
        write_trace(path_of("path", path), model.sites(), found, origin)
        return cls(path)

    @classmethod
    def from_arrays(
        cls,
        routed_experts: Iterable[Any],
        sequence_ids: Iterable[int],
        path: str | Path,
        *,
        places: Sequence[tuple[int, int] | None] | None = None,
        num_experts: int | None = None,
        weights: Iterable[Any] | None = None,
        uncaptured: Uncaptured = "refuse",
    ) -> Trace:
        """What serving engines return: for each sequence an integer array (tokens, layers, K), or a
        tuple of them that follow each other (prompt, decoding).

        sequence_ids   a number for each, as documents have them (`Sequences.sequence_id_S`)
        places         (layer, stage) of each position in the middle axis, None to leave it out;
                       default: layers 0, 1, ... without those that have no decision in the first
                       sequence (an engine's zeros for dense layers), which a warning names
        num_experts    of every router, to check the ids, and the model they are imposed on, by
        weights        arrays of the same shapes; without them an expert's weight is what the
                       router that replays gives it
        uncaptured     "refuse" a token without a decision, or "leave out": it is kept as one (see
                       `Trace.uncaptured`). That is a token with an id of -1 or NaN, with an expert
                       twice, as in an engine's zeros, and with weights that are NaN or all 0. Of
                       K = 1 zeros are expert 0

        Numbers may be of any type that holds them, ids whole ones. The array of a text may be
        shorter than it: of the last token engines have no decision. Arrays may come from a
        generator: one is held at a time. Raises `ValueError` for other shapes, ids that are none of
        the experts, weights that are negative or infinite, and equal sequence ids.
        """
        sites, found = read_arrays(
            routed_experts, sequence_ids, places, num_experts, weights, uncaptured
        )
        write_trace(path_of("path", path), sites, found, {})
        return cls(path)
