"""How recorded routing lies on the disk, and how it is written.

    trace.json                  places, and where it comes from
    sequences.i8                (S, 3) id, offset of its first token, number of tokens
    tokens.i4                   (N,) token ids; not where an engine's arrays were read
    layer2-stage0.ids.i2        (N, K) experts, best first; -1 where there is no decision
    layer2-stage0.weights.f4    (N, K) their weights; likewise optional
    layer2-stage0.logits.f4     (N, E) of the router, if asked for
    manifest.json               size and SHA-256 of each

Numbers are little-endian, row by row. They are appended batch by batch, so memory does not grow
with the number of tokens. Shapes: N recorded tokens, S sequences, E experts, K slots.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from analysis.adapters import Adapter, batches, clean_routing, num_batches
from cartmoe.data import IGNORE, Sequences
from cartmoe.folders import check_new, damage, read_manifest, write_folder
from cartmoe.hooks import RouterSite

KIND = "trace"  # the manifest's key, so that another folder is not taken for one
META, SEQUENCES, TOKENS = "trace.json", "sequences.i8", "tokens.i4"
PARTS = {"ids": "<i2", "weights": "<f4", "logits": "<f4"}
MAX_EXPERTS = 2**15


def site_of(layer: int, stage: int, slots: int, num_experts: Any) -> RouterSite:
    """Where a router stood. num_experts is None where nobody said how many there were."""
    return RouterSite(f"layer {layer} stage {stage}", layer, stage, num_experts, slots)


def file_of(site: RouterSite, part: str) -> str:
    """The name of the file of one of `PARTS`."""
    return f"layer{site.layer}-stage{site.stage}.{part}.{PARTS[part][1:]}"


def width_of(site: RouterSite, part: str) -> int | None:
    """Numbers in a row of that file."""
    return site.num_experts if part == "logits" else site.top_k


class Batch(NamedTuple):
    """What is appended at once: whole sequences, their tokens one after the other.

    ids, weights, logits   an array (n, K), (n, K), (n, E) for each site, in order; None: not kept
    """

    sequence_ids: Sequence[int]
    lengths: Sequence[int]
    tokens_N: np.ndarray | None
    ids: Sequence[np.ndarray]
    weights: Sequence[np.ndarray] | None
    logits: Sequence[np.ndarray] | None


def write_trace(
    path: Path, sites: Sequence[RouterSite], batches: Iterable[Batch], origin: dict[str, Any]
) -> None:
    """Make the folder. Raises `FileExistsError` if there is something at the path, `ValueError`
    for sequences of equal id, and where there is no token at all."""

    def fill(folder: Path) -> None:
        files, rows, offset, uncaptured = {}, [], 0, Counter[RouterSite]()
        with ExitStack() as stack:

            def append(name: str, dtype: str, values: np.ndarray) -> None:
                if name not in files:
                    files[name] = stack.enter_context((folder / name).open("wb"))
                files[name].write(np.ascontiguousarray(values, dtype).data)

            for batch in batches:
                for id, length in zip(batch.sequence_ids, batch.lengths, strict=True):
                    rows.append((id, offset, length))
                    offset += length
                if batch.tokens_N is not None:
                    append(TOKENS, "<i4", batch.tokens_N)
                for part, dtype in PARTS.items():
                    for site, values in zip(sites, getattr(batch, part) or (), strict=False):
                        append(file_of(site, part), dtype, values)
                for site, ids_NK in zip(sites, batch.ids, strict=True):
                    uncaptured[site] += int((ids_NK < 0).any(-1).sum())
            append(SEQUENCES, "<i8", np.reshape(rows, (-1, 3)))
        twice = [id for id, count in Counter(row[0] for row in rows).items() if count > 1]
        if twice:
            raise ValueError(f"sequence ids must differ; {twice[:5]} stand more than once")
        if not offset:
            raise ValueError("there is no token to record")
        meta = {
            "origin": origin,
            "places": [
                dict(layer=s.layer, stage=s.stage, slots=s.top_k, num_experts=s.num_experts)
                for s in sites
            ],
            "uncaptured": [uncaptured[site] for site in sites],
        }
        (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    check_new(path)  # before anything is computed
    write_folder(path, fill, KIND)


def check_trace(path: Path) -> None:
    """Every byte. Raises `FileNotFoundError` where there is no folder, `ValueError` naming the file
    that is not what was written."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no trace at {path}")
    problem = damage(path, key=KIND)
    if problem:
        raise ValueError(f"{path} is not a whole trace: {problem}")


def trace_sha256(path: Path) -> str | None:
    """The identity of what is recorded there, from its manifest; None where there is no trace."""
    if not path.is_dir() or damage(path, [META], KIND):
        return None
    return hashlib.sha256(json.dumps(read_manifest(path), sort_keys=True).encode()).hexdigest()


def batches_of_model(
    model: Adapter, docs: Sequences, batch_size: int, logits: bool, progress: bool
) -> Iterator[Batch]:
    """The clean decisions on documents, of each sequence up to its last token with a target."""
    total = num_batches(docs, batch_size)
    for batch in tqdm(
        batches(model, docs, batch_size), total=total, unit="batch", disable=not progress
    ):
        has_target_SL = batch.targets_SL != IGNORE
        used_SL = has_target_SL.flip(1).cumsum(1).flip(1) > 0  # it, or one after it
        tokens_N = batch.tokens_SL[used_SL].cpu().numpy()
        decisions = list(zip(*clean_routing(model, batch.tokens_SL).values(), strict=True))
        logits_NE, _, ids_NK, weights_NK = (
            [rows_TX[used_SL.flatten()].cpu().numpy() for rows_TX in each] for each in decisions
        )
        ids, lengths = batch.sequence_id_S.tolist(), used_SL.sum(1).tolist()
        yield Batch(ids, lengths, tokens_N, ids_NK, weights_NK, logits_NE if logits else None)
