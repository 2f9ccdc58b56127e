"""Composed experts and substitution, against the matmuls and the forwards that they stand for.

Composites: one batch of `CompositeStream` at nano size (d 128, E 16, half width 256), with sums of
squares, their null and the comparison of pairs, against the matmuls alone, in the same blocks of
rows, of E + E^2 experts of half width on the same tokens.

Substitution: the linear estimates for all pairs of one site, from documents to the table, against
E^2 forwards of the whole model, with head and losses, each with one swap. All of these cost the
same, so one is timed.
"""

from __future__ import annotations

from typing import Any

import torch

from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics.base import Probe
from analysis.overlap.metrics.composite import BLOCK_ROWS, TOKENS, CompositeStream
from benchmarks.sweeps import build
from benchmarks.timing import Row, interleaved, milliseconds


def rows():
    """Rows of the bench table."""
    yield _composites()
    yield _substitution()


def _composites() -> Row:
    model, _ = build("nano")
    first, second = model.sites()[:2]
    E, D = first.num_experts, model.model.config.d_model
    gate_EFD = model.expert_weights(first)[0]
    width = gate_EFD.shape[1]
    u_TD = torch.randn(TOKENS, D)
    stream = CompositeStream(model, first, second, 1)
    nothing: dict[str, Any] = dict.fromkeys(Probe._fields)
    probe = Probe(**nothing | dict(unit=0, stream_TD=u_TD))
    in_ECD, out_EDF = torch.randn(E, 2 * width, D), torch.randn(E, D, width)
    x_RD, h_RF = torch.randn(BLOCK_ROWS, D), torch.randn(BLOCK_ROWS, width)
    z_RC, y_RD = torch.empty(BLOCK_ROWS, 2 * width), torch.empty(BLOCK_ROWS, D)

    def matmuls() -> None:
        for _ in range(TOKENS * (E + 1) // BLOCK_ROWS):  # E blocks of rows for B, and one for A
            for e in range(E):
                torch.mm(x_RD, in_ECD[e].T, out=z_RC)
                torch.mm(h_RF, out_EDF[e].T, out=y_RD)

    times = interleaved({"composites": lambda: stream.add(probe), "matmuls": matmuls}, repeats=11)
    what = f"composites, E {E}, {TOKENS} tokens / matmuls of E + E^2 half-width experts"
    return Row(what, times["composites"] / times["matmuls"], "<= 1.20", milliseconds(times))


def _substitution() -> Row:
    model, docs = build("nano")
    site = model.sites()[0]

    def moved(routing, router, at, x_TD):
        return routing._replace(ids_TK=torch.where(routing.ids_TK == 3, 5, routing.ids_TK))

    def swap() -> None:
        with model.hooked(router=moved, where=site.__eq__):
            model.model.losses(docs.tokens_SL, docs.targets_SL)

    def linear() -> None:
        measure_overlap(model, docs, "substitution", site, batch_size=len(docs), progress=False)

    times = interleaved({"linear": linear, "swap": swap}, repeats=7, warm_up=1)
    E = site.num_experts
    what = f"{E * E} forwards with a swap / linear substitution matrix, E {E}, one site"
    return Row(what, E * E * times["swap"] / times["linear"], ">= 30", milliseconds(times))
