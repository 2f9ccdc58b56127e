"""Similarity of experts' parameters: planted experts, and every metric the slow way."""

from itertools import permutations
from threading import Thread

import numpy as np
import pytest
import torch

from analysis.overlap.metrics import weights
from analysis.overlap.metrics.base import estimate
from analysis.overlap.metrics.weights import (
    METRICS,
    ExpertWeights,
    effective_rank,
    flat_cosine,
    matched_cosine,
    router_cosine,
)


def draw(E: int, F: int, D: int, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((E, F, D), (E, F, D), (E, D, F), (E, D))
    return ExpertWeights(*(torch.randn(shape, generator=generator) for shape in shapes))


def planted(change) -> ExpertWeights:
    """An expert, what a change makes of it, and another one."""
    w = draw(2, 24, 16)
    changed = change(w.gate_EFD[0], w.up_EFD[0], w.down_EDF[0])
    return ExpertWeights(
        *(torch.stack([own[0], new, own[1]]) for own, new in zip(w[:3], changed, strict=True))
    )


def shuffled(gate_FD, up_FD, down_DF):
    order = torch.randperm(24)
    return gate_FD[order], up_FD[order], down_DF[:, order]


def scaled(gate_FD, up_FD, down_DF):
    a_F = torch.randn(24).exp() * torch.randn(24).sign()
    return gate_FD, a_F[:, None] * up_FD, down_DF / a_F


def torn(gate_FD, up_FD, down_DF):
    order = torch.randperm(24)
    return gate_FD[order], up_FD, down_DF


CASES = {  # change: matched cosine, flat cosine
    "duplicate": (lambda g, u, d: (g, u, d), 1, 1),
    "permuted": (shuffled, 1, 0),
    "scaled and flipped": (scaled, 1, 0.15),
    "both": (lambda g, u, d: scaled(*shuffled(g, u, d)), 1, 0),
    "gate and up permuted apart": (torn, 0.7, 2 / 3),
    "gate flipped": (lambda g, u, d: (-g, u, d), 0.4, 1 / 3),
}


@pytest.mark.parametrize("name", CASES)
def test_planted(name):
    change, matched, flat = CASES[name]
    w = planted(change)
    got_EE = matched_cosine(w)
    assert got_EE[0, 1].item() == pytest.approx(matched, abs=1e-6 if matched == 1 else 0.1)
    assert flat_cosine(w)[0, 1].item() == pytest.approx(flat, abs=1e-6 if flat == 1 else 0.1)
    assert (got_EE[2, :2] < 0.4).all()
    assert (got_EE == got_EE.T).all()
    assert (got_EE.diagonal() == 1).all()


def brute_force(one, other) -> float:
    """The best of all orders and signs, in fp64; (gate, up, down) are (F, D), (F, D), (D, F)."""

    def neurons(gate_FD, up_FD, down_DF):
        for g, u, d in zip(gate_FD, up_FD, down_DF.T, strict=True):
            a = np.sqrt(np.linalg.norm(d) / np.linalg.norm(u))
            yield np.concatenate([g, a * u, d / a]), np.concatenate([g, -a * u, -d / a])

    own = [plain for plain, _ in neurons(*one)]
    choices = list(neurons(*other))
    norm = np.linalg.norm(own) * np.linalg.norm([plain for plain, _ in choices])
    return (
        max(
            sum(max(n @ plain, n @ flipped) for n, (plain, flipped) in zip(own, order, strict=True))
            for order in permutations(choices)
        )
        / norm
    )


@pytest.mark.parametrize("seed", range(3))
def test_matched_cosine_by_brute_force(seed):
    w = draw(4, 5, 3, seed)
    experts = list(zip(*(matrix.double().numpy() for matrix in w[:3]), strict=True))
    expected = [[brute_force(one, other) for other in experts] for one in experts]
    np.testing.assert_allclose(matched_cosine(w), expected, atol=1e-6)


def test_cosines_by_hand():
    w = draw(5, 4, 3)
    flat = [np.concatenate([m[e].double().numpy().ravel() for m in w[:3]]) for e in range(5)]
    for got_EE, vectors in ((flat_cosine(w), flat), (router_cosine(w), w.router_ED.numpy())):
        expected = [
            [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in vectors] for a in vectors
        ]
        np.testing.assert_allclose(got_EE, expected, atol=1e-6)


def test_relabelling():
    w = draw(11, 6, 5)  # more than are compared at a time
    order = torch.randperm(11)
    moved = ExpertWeights(*(matrix[order] for matrix in w))
    for function in (flat_cosine, matched_cosine, router_cosine):
        expected = function(w)[order][:, order]
        torch.testing.assert_close(function(moved), expected, atol=1e-6, rtol=0)


def test_neurons_and_experts_of_zeros():
    w = draw(4, 6, 5)
    w.up_EFD[0, :3] = 0  # they compute nothing: as if down were zero too
    w.down_EDF[1, :, 2] = 0
    for matrix in w:
        matrix[3] = 0
    dead = ExpertWeights(*(matrix.clone() for matrix in w[:3]))
    dead.down_EDF[0, :, :3] = 0
    for function in (flat_cosine, matched_cosine, router_cosine):
        got_EE = function(w)
        assert got_EE.isfinite().all()
        assert got_EE[3].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(matched_cosine(dead), matched_cosine(w), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    w = ExpertWeights(*(matrix.to(dtype) for matrix in draw(3, 6, 5)))
    same = ExpertWeights(*(matrix.float() for matrix in w))
    for name, metric in METRICS.items():
        np.testing.assert_allclose(metric.of(w), metric.of(same), atol=1e-6, err_msg=name)


def test_threads_are_left_as_they_were():
    threads = torch.get_num_threads()
    w = draw(5, 40, 8)
    try:
        torch.set_num_threads(2)
        two_EE = matched_cosine(w)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(two_EE, matched_cosine(w), atol=1e-6, rtol=0)


def test_weights_that_are_not_finite():
    threads = torch.get_num_threads()
    for matrix in range(3):
        for bad in (torch.nan, torch.inf):
            w = draw(5, 6, 5)
            w[matrix][3, 2, 1] = bad
            with pytest.raises(ValueError, match=r"weights are not finite: those of experts 3$"):
                matched_cosine(w)
    assert torch.get_num_threads() == threads


def test_arrays_and_errors_that_teach():
    w = draw(3, 6, 5)
    arrays = ExpertWeights(*(matrix.numpy() for matrix in w[:3]))
    assert torch.equal(matched_cosine(arrays), matched_cosine(w))
    assert torch.equal(flat_cosine(arrays), flat_cosine(w))
    assert torch.equal(effective_rank(arrays.gate_EFD), effective_rank(w.gate_EFD))
    with pytest.raises(ValueError, match=r"w is a tuple; give ExpertWeights\(gate_EFD, up_EFD"):
        flat_cosine(tuple(w))
    with pytest.raises(ValueError, match=r"gate_EFD has shape \(6, 5\); it must be \(experts, neu"):
        flat_cosine(w._replace(gate_EFD=w.gate_EFD[0]))
    with pytest.raises(
        ValueError, match=r"shapes \(3, 6, 5\), \(3, 4, 5\), \(3, 5, 6\); they must"
    ):
        matched_cosine(w._replace(up_EFD=w.up_EFD[:, :4]))
    w.up_EFD[2, 0, 0] = torch.nan
    for function in (flat_cosine, lambda w: effective_rank(w.up_EFD)):
        with pytest.raises(ValueError, match="weights are not finite: those of experts 2"):
            function(w)


def test_threads_are_left_as_they_were_by_an_error(monkeypatch):
    """Threads to come start with the last number that any thread set."""

    def fails(similarity_FF):
        raise MemoryError

    monkeypatch.setattr(weights, "_assigned", fails)
    threads, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        with pytest.raises(MemoryError):
            matched_cosine(draw(5, 6, 5))
        thread = Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert seen == [2]


def test_null_of_matches_has_the_root_mean_square_of_spreads():
    w = draw(6, 16, 24)
    w.gate_EFD[3:] *= 5
    std_E11 = w.gate_EFD.std((1, 2), keepdim=True)
    even = w._replace(gate_EFD=w.gate_EFD / std_E11 * std_E11.square().mean().sqrt())
    null = METRICS["matched_cosine"].null
    torch.testing.assert_close(null(w), null(even))


def test_null_of_ranks_does_not_know_the_experts():
    """Also where the first one has been pruned."""
    w = ExpertWeights(*planted(lambda *matrices: matrices)[:3])
    pruned = ExpertWeights(*(torch.cat([torch.zeros_like(m[:1]), m]) for m in w[:3]))
    for name in ("effective_rank_gate", "effective_rank_up", "effective_rank_down"):
        null = METRICS[name].null
        assert torch.isfinite(null(w)).all()
        assert torch.equal(null(pruned), null(w))
        assert torch.equal(null(ExpertWeights(*(3 * m.flip(0) for m in w[:3]))), null(w))


def test_effective_rank():
    rotation_XX = torch.linalg.qr(torch.randn(7, 7)).Q
    values_S = torch.tensor([4.0, 2.0, 1.0, 1.0])
    known_XY = rotation_XX[:, :4] * values_S @ torch.linalg.qr(torch.randn(6, 4)).Q.T
    p = np.array([4, 2, 1, 1]) / 8
    one_XY = torch.outer(torch.randn(7), torch.randn(6))
    got = effective_rank(torch.stack([rotation_XX[:, :6], one_XY, known_XY]))
    np.testing.assert_allclose(got, [6, 1, np.prod(p**-p)], rtol=1e-5)


def test_effective_rank_by_eigenvalues():
    matrix_EXY = torch.randn(3, 9, 5)
    grams = matrix_EXY.double().mT @ matrix_EXY.double()
    values = np.sqrt(np.linalg.eigvalsh(grams.numpy()))
    p = values / values.sum(1, keepdims=True)
    expected = np.exp(-(p * np.log(p)).sum(1))
    np.testing.assert_allclose(effective_rank(matrix_EXY), expected, rtol=1e-5)


def test_nulls_are_what_random_experts_have():
    w = draw(6, 16, 24)
    w.gate_EFD.mul_(3)
    for name, metric in METRICS.items():
        value, _, _, null = estimate(metric, w)
        assert len(np.unique(null)) == 1
        if metric.table == "pairs":
            value = value[~np.eye(6, dtype=bool)]
        error = value.std(ddof=1) / (6 if name != "matched_cosine" else 2)
        assert abs(value.mean() - null.mean()) < 4 * error + 0.02 * np.abs(value).max(), name
        np.testing.assert_array_equal(null, estimate(metric, w).null)  # no draw of its own
    assert METRICS["matched_cosine"].null(w) > 0.1


def test_the_order_of_experts_does_not_matter_to_nulls():
    w = draw(6, 16, 24)
    w.gate_EFD[3:] *= 5
    order = torch.arange(5, -1, -1)
    other = ExpertWeights(*(matrix[order] for matrix in w[:3]))
    for name, metric in METRICS.items():
        if name != "router_cosine":
            null, same = (estimate(metric, experts).null for experts in (w, other))
            np.testing.assert_allclose(null, same, rtol=1.3e-6, atol=1e-5)


def test_reinitialized_keeps_the_spread_of_each_matrix():
    w = draw(3, 40, 30)
    w.up_EFD[1] *= 5
    again = w.reinitialized(1, 2)
    assert again.router_ED is None
    for old, new in zip(w[:3], again[:3], strict=True):
        torch.testing.assert_close(old.std((1, 2)), new.std((1, 2)), rtol=0.1, atol=0)
        assert flat_cosine(ExpertWeights(old[:2], new[:2], old[:2].mT))[0, 1].abs() < 0.5
    assert torch.equal(again.up_EFD, w.reinitialized(1, 2).up_EFD)
    assert not torch.equal(again.up_EFD, w.reinitialized(1, 3).up_EFD)


@pytest.mark.parametrize("kind", ["cartesian", "smoe", "hash", "fine_grained"])
def test_of_a_model(model_of, kind):
    model = model_of(kind)
    site = model.sites()[-1]
    w = ExpertWeights.of(model, site)
    matrices, shared = model.expert_weights(site), model.shared_weights(site)
    same = shared is not None and shared[0].shape[0] == matrices[0].shape[1]
    for got, own in zip(w[:3], matrices, strict=True):
        assert torch.equal(got[: site.num_experts], own)
        assert not got.requires_grad
        assert len(got) == site.num_experts + same
    if same:
        assert torch.equal(w.down_EDF[-1], shared[2])
    assert (w.router_ED is None) == (kind == "hash")
    if kind == "hash":
        with pytest.raises(ValueError, match="router_ED"):
            router_cosine(w)
    else:
        assert router_cosine(w).shape == (site.num_experts, site.num_experts)
    assert matched_cosine(w).shape == (len(w.gate_EFD),) * 2


def test_one_expert():
    w = draw(1, 4, 3)
    assert matched_cosine(w).tolist() == flat_cosine(w).tolist() == [[1]]
