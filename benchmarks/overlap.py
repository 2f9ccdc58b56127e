"""What experts have in common: what its metrics cost against the work that they cannot do without.

`python -m benchmarks.overlap DOCUMENTS` prints the peak resident bytes of a process that measures
the overlap on so many documents, above what it had before.

Shapes: E experts, T tokens, D model, F expert width, B minibatch.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from analysis.overlap.metrics.base import MAX_UNITS, Probe
from analysis.overlap.metrics.outputs import cka_of, hsic, hsic_sums, swiglu
from analysis.overlap.metrics.weights import ExpertWeights, matched_cosine
from benchmarks.memory import resident
from benchmarks.sweeps import build
from benchmarks.timing import Row, interleaved, milliseconds

E, D, F, T, B = 64, 512, 256, 4096, 256


def rows():
    """Rows of the bench table."""
    with torch.no_grad():
        yield from _cka()
        for width in (128, D):
            yield _matching(width)
        yield _usage()
    yield _memory()


def experts(width: int = D) -> ExpertWeights:
    """Random ones, scaled as at the start of training."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((E, F, width), (E, F, width), (E, width, F))
    return ExpertWeights(
        *(torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    )


def _cka():
    w, x_TD = experts(), torch.randn(T, D)
    minibatches = [swiglu(w, x_BD) for x_BD in x_TD.split(B)]
    square = torch.randn(2048, 2048)
    runs = {
        "CKA": lambda: [hsic(outputs_EBD) for outputs_EBD in minibatches],
        "forward": lambda: [swiglu(w, x_BD) for x_BD in x_TD.split(B)],
        "GEMM": lambda: square @ square,
    }
    times = interleaved(runs, repeats=9, warm_up=2)
    detail = milliseconds(times)
    what = "all-pairs debiased CKA / the forward that makes its inputs, E 64"
    yield Row(what, times["CKA"] / times["forward"], "<= 0.50", detail)
    rate = 2 * T * B * E * (D + E) / times["CKA"]
    largest = 2 * len(square) ** 3 / times["GEMM"]
    detail = f"{rate / 1e9:.0f} of {largest / 1e9:.0f} GFLOP/s"
    yield Row("all-pairs CKA: share of the GEMM rate", rate / largest, ">= 0.60", detail)
    outputs_EBD = minibatches[0]
    runs = {"at once": lambda: hsic(outputs_EBD), "pairwise": lambda: pairwise_cka(outputs_EBD)}
    times = interleaved(runs, repeats=3, warm_up=1)
    what = "CKA pair by pair / all pairs at once, one minibatch"
    yield Row(what, times["pairwise"] / times["at once"], ">= 100", milliseconds(times))
    few = slice(None, None, 4)
    got_EE = cka_of(hsic_sums(outputs_EBD))[few, few]
    error = (got_EE - pairwise_cka(outputs_EBD[few].double())).abs().max().item()
    yield Row("all-pairs CKA: error against fp64, in 1e-5", error / 1e-5, "<= 1", f"{error:.1e}")


def pairwise_cka(outputs_ETD: Tensor) -> Tensor:
    """As libraries do it: two Gram matrices and HSIC_1 (Song et al. 2012, eq. 5) for each pair."""
    E, T, _ = outputs_ETD.shape

    def gram(x_TD: Tensor) -> Tensor:
        return (x_TD @ x_TD.T).fill_diagonal_(0)

    def hsic_1(K: Tensor, L: Tensor) -> Tensor:
        KL = K @ L
        middle = K.sum() * L.sum() / ((T - 1) * (T - 2))
        return (KL.trace() + middle - 2 / (T - 2) * KL.sum()) / (T * (T - 3))

    cka_EE = torch.empty(E, E, dtype=outputs_ETD.dtype)
    for i in range(E):
        K = gram(outputs_ETD[i])
        KK = hsic_1(K, K)
        for j in range(E):
            L = gram(outputs_ETD[j])
            cka_EE[i, j] = hsic_1(K, L) / (KK * hsic_1(L, L)).sqrt()
    return cka_EE


def _matching(width: int) -> Row:
    w = experts(width)
    gate_EFD, up_EFD, down_EFD = w.gate_EFD, w.up_EFD, w.down_EDF.mT
    size_EF1 = (up_EFD.norm(dim=-1) / down_EFD.norm(dim=-1)).sqrt()[..., None]
    rest_EFC = torch.cat([up_EFD / size_EF1, down_EFD * size_EF1], -1)

    def similarity(i: int, j: int) -> np.ndarray:
        inner_FF = (rest_EFC[i] @ rest_EFC[j].T).abs() + gate_EFD[i] @ gate_EFD[j].T
        return inner_FF.double().numpy()

    def assign(matrix_FF: np.ndarray):
        return linear_sum_assignment(matrix_FF, maximize=True)

    def seconds_assigning() -> float:
        """The matrices of a few pairs at a time are made outside the clock."""
        pairs, seconds = list(combinations(range(E), 2)), 0.0
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for first in range(0, len(pairs), 252):
                matrices = [similarity(*pair) for pair in pairs[first : first + 252]]
                start = time.perf_counter()
                list(pool.map(assign, matrices))
                seconds += time.perf_counter() - start
        return seconds

    def seconds_matching() -> float:
        start = time.perf_counter()
        matched_cosine(w)
        return time.perf_counter() - start

    turns = np.array([(seconds_matching(), seconds_assigning()) for _ in range(4)])[1:]
    matching, assigning = np.median(turns, axis=0).tolist()
    detail = f"{matching:.2f} s, {assigning:.2f} s"
    what = f"matched cosine, E 64, F 256, D {width} / linear_sum_assignment alone"
    return Row(what, matching / assigning, "<= 1.15", detail)


def _usage() -> Row:
    from analysis.measure.clean import CleanPass
    from analysis.overlap.metrics.usage_stream import UsageStream
    from analysis.overlap.probes import Labels

    model, shard = build("nano", "smoe_share")
    labels = Labels.of(shard, 0)
    sites, L = model.sites(), shard.tokens_SL.shape[1]
    tokens_T = labels.class_V[shard.tokens_SL.flatten()]
    domain_T = labels.domain_S.repeat_interleave(L)
    other_tokens_RT = labels.class_V[shard.tokens_SL[labels.other_RS].flatten(1)]
    other_domain_RT = labels.domain_S[labels.other_RS].repeat_interleave(L, 1)
    sizes = (labels.num_classes, len(labels.domains))
    streams = {site: UsageStream(site, 2, *sizes) for site in sites}

    def evaluate() -> CleanPass:
        return CleanPass.of(model, shard)

    def measure() -> None:
        clean, before = evaluate(), None
        stream_TD = clean.states[-1].hidden_BLD.flatten(0, 1)
        labelled = (tokens_T, domain_T, other_tokens_RT, other_domain_RT)
        for site in sites:
            routing = clean.routings[site]
            streams[site].add(Probe(0, stream_TD, routing, *labelled, before, stream_TD))
            before = routing

    times = interleaved({"with usage": measure, "alone": evaluate}, repeats=15, warm_up=3)
    what = "evaluation with usage metrics / alone, nano"
    return Row(what, times["with usage"] / times["alone"], "<= 1.05", milliseconds(times))


def _memory() -> Row:
    """From as many documents on as there are units, of which there are sums."""
    peaks = []
    for documents in (MAX_UNITS, 10 * MAX_UNITS):
        command = [sys.executable, "-m", "benchmarks.overlap", str(documents)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    detail = ", ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks)
    what = "peak memory of measure_overlap, 10x the probe tokens / once"
    return Row(what, peaks[1] / peaks[0], "flat", detail)


def peak(documents: int) -> int:
    """Bytes above those of the process before it measures."""
    from analysis.overlap.measure import measure_overlap

    model, shard = build("nano")
    rows = shard.take([number % len(shard) for number in range(documents)])
    names = [f"document {number}" for number in range(documents)]
    docs = replace(rows, sequence_id_S=torch.arange(documents), document_id=names)
    before = resident("VmRSS")
    measure_overlap(model, docs, batch_size=1, progress=False)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak(int(sys.argv[1])))
