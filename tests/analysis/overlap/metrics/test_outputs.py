"""Similarity of experts' outputs: planted experts, definitions with explicit sums, loops."""

import copy
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.adapters.base import as_adapter
from analysis.overlap.metrics.base import Probe, UnitSums, estimate, total
from analysis.overlap.metrics.output_stream import METRICS, OutputStream
from analysis.overlap.metrics.outputs import (
    biased_cka,
    cosine,
    hsic,
    hsic_sums,
    linear_cka,
    max_output,
    output_norm,
    reap,
    relative_distance,
    swiglu,
)
from analysis.overlap.metrics.weights import ExpertWeights
from cartmoe.routing import Routing

OF_PAIRS = {"linear_cka": linear_cka, "cosine": cosine, "relative_distance": relative_distance}
SHAPES = {"gate": (6, 24, 16), "up": (6, 24, 16), "down": (6, 16, 24)}


def random_experts(seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    return ExpertWeights(*(torch.randn(shape, generator=generator) for shape in SHAPES.values()))


def slow_hsic(x_TD: Tensor, y_TD: Tensor) -> float:
    """HSIC_1 as what it estimates: means of products of kernels over different tokens."""
    K, L = (z.double() @ z.double().T for z in (x_TD, y_TD))
    T = range(len(K))
    two = np.mean([K[i, j] * L[i, j] for i, j in permutations(T, 2)])
    three = np.mean([K[i, j] * L[i, k] for i, j, k in permutations(T, 3)])
    four = np.mean([K[i, j] * L[k, m] for i, j, k, m in permutations(T, 4)])
    return float(two + four - 2 * three)


def fast_hsic(x_TD: Tensor, y_TD: Tensor) -> float:
    """Eq. 5 of Song et al., as it stands there, fp64; of fewer than 4 tokens 0."""
    T = len(x_TD)
    if T < 4:
        return 0.0
    K, L = (z.double() @ z.double().T for z in (x_TD, y_TD))
    K, L = (matrix - torch.diag(matrix.diagonal()) for matrix in (K, L))
    one = torch.ones(T, dtype=torch.float64)
    middle = (one @ K @ one) * (one @ L @ one) / ((T - 1) * (T - 2))
    whole = torch.trace(K @ L) + middle - 2 / (T - 2) * (one @ K @ L @ one)
    return (whole / (T * (T - 3))).item()


def slow_cka(outputs_ETD: Tensor, of=fast_hsic) -> np.ndarray:
    def value(x, y):
        return of(x, y) / np.sqrt(of(x, x) * of(y, y))

    return np.array([[value(x, y) for y in outputs_ETD] for x in outputs_ETD])


@pytest.mark.parametrize("T", [4, 7])
def test_hsic_from_its_definition(T):
    outputs_ETD = torch.randn(3, T, 5) + 2
    expected = [[slow_hsic(x, y) for y in outputs_ETD] for x in outputs_ETD]
    np.testing.assert_allclose(hsic(outputs_ETD), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hsic(outputs_ETD.double()), expected, rtol=1e-12, atol=1e-12)
    again = [[fast_hsic(x, y) for y in outputs_ETD] for x in outputs_ETD]
    np.testing.assert_allclose(again, expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cka_against_fp64(dtype):
    outputs_ETD = (torch.randn(6, 100, 40) + torch.randn(100, 40) + 3 * torch.randn(40)).to(dtype)
    np.testing.assert_allclose(linear_cka(outputs_ETD), slow_cka(outputs_ETD), atol=1e-5)


def test_too_few_tokens():
    with pytest.raises(ValueError, match="3 tokens"):
        linear_cka(torch.randn(2, 3, 5))


def test_vectors_by_loops():
    outputs_ETD = torch.randn(4, 9, 5)
    outputs_ETD[0, 2] = 0
    f = outputs_ETD.double().numpy()
    lengths = np.linalg.norm(f, axis=-1)
    for i in range(4):
        for j in range(4):
            each = [
                f[i, t] @ f[j, t] / lengths[i, t] / lengths[j, t]
                if lengths[i, t] * lengths[j, t]
                else 0
                for t in range(9)
            ]
            assert cosine(outputs_ETD)[i, j].item() == pytest.approx(np.mean(each), abs=1e-12)
            apart = np.linalg.norm(f[i] - f[j]) ** 2
            size = (np.linalg.norm(f[i]) ** 2 + np.linalg.norm(f[j]) ** 2) / 2
            got = relative_distance(outputs_ETD)[i, j].item()
            assert got == pytest.approx(np.sqrt(apart / size), abs=1e-7)
    np.testing.assert_allclose(output_norm(outputs_ETD), lengths.mean(1))
    np.testing.assert_allclose(max_output(outputs_ETD), np.abs(f).max((1, 2)))
    # Expert 3 has a slot of weight 0; expert 1 stands twice at token 1.
    ids_TK = torch.tensor([[0, 1], [1, 1], [2, 3]])
    weights_TK = torch.tensor([[0.7, 0.3], [0.5, 0.2], [1.0, 0.0]])
    routing = Routing(torch.zeros(3, 4), torch.zeros(3, 4), ids_TK, weights_TK)
    n = lengths[:, :3]
    expected = [0.7 * n[0, 0], (0.3 * n[1, 0] + 0.7 * n[1, 1]) / 2, n[2, 2], np.nan]
    np.testing.assert_allclose(reap(outputs_ETD[:, :3], routing), expected, rtol=1e-6)


@pytest.mark.parametrize("function", OF_PAIRS.values(), ids=OF_PAIRS)
def test_duplicates_and_relabelling(function):
    outputs_ETD = torch.randn(5, 40, 12)
    outputs_ETD[3] = outputs_ETD[1]
    got_EE = function(outputs_ETD)
    same = 0 if function is relative_distance else 1
    tolerance = 1e-6 if function is linear_cka else 1e-7
    np.testing.assert_allclose(got_EE.diagonal(), same, atol=tolerance)
    assert got_EE[1, 3].item() == pytest.approx(same, abs=tolerance)
    order = torch.randperm(5)
    torch.testing.assert_close(
        function(outputs_ETD[order]), got_EE[order][:, order], atol=1e-6, rtol=0
    )


def test_outputs_that_are_known():
    x_TD = torch.randn(50, 8)
    rotation_DD = torch.linalg.qr(torch.randn(8, 8)).Q
    outputs_ETD = torch.stack([x_TD, x_TD @ rotation_DD, 3 * x_TD + 1, -x_TD, x_TD.roll(1, -1)])
    np.testing.assert_allclose(linear_cka(outputs_ETD), 1, atol=1e-5)
    halves_ETD = torch.zeros(2, 50, 8)
    halves_ETD[0, :, :4] = halves_ETD[1, :, 4:] = x_TD[:, :4]
    assert cosine(torch.stack([x_TD, -2 * x_TD]))[0, 1].item() == pytest.approx(-1)
    assert relative_distance(torch.stack([x_TD, -x_TD]))[0, 1].item() == pytest.approx(2)
    assert cosine(halves_ETD)[0, 1] == 0
    assert relative_distance(halves_ETD)[0, 1].item() == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    "function", [*OF_PAIRS.values(), output_norm, max_output], ids=lambda f: f.__name__
)
def test_arrays_and_shapes(function):
    outputs_ETD = torch.randn(3, 20, 6)
    assert torch.equal(function(outputs_ETD.numpy()), function(outputs_ETD))
    with pytest.raises(
        ValueError, match=r"outputs_ETD has shape \(20, 6\); it must be \(experts, "
    ):
        function(outputs_ETD[0])


def test_outputs_that_do_not_change():
    """Also of numbers whose mean is not exact in fp32."""
    for constant in (0.0, 0.1, 0.37, 1.7):
        outputs_ETD = torch.randn(3, 256, 64)
        outputs_ETD[1] = constant
        outputs_ETD[2] = 1e-3 * torch.randn(256, 64) + constant  # this one does
        cka_EE = linear_cka(outputs_ETD)
        assert cka_EE[1].isnan().all()
        assert cka_EE[[0, 2]][:, [0, 2]].isfinite().all()


def test_hidden_neurons_that_change_places():
    w = random_experts()
    order = torch.randperm(24)
    a_F = torch.randn(24).exp() * torch.randn(24).sign()
    w.gate_EFD[1] = w.gate_EFD[0, order]
    w.up_EFD[1] = a_F[:, None] * w.up_EFD[0, order]
    w.down_EDF[1] = w.down_EDF[0][:, order] / a_F
    outputs_ETD = swiglu(w, torch.randn(60, 16))
    assert linear_cka(outputs_ETD)[0, 1].item() == pytest.approx(1, abs=1e-6)
    assert cosine(outputs_ETD)[0, 1].item() == pytest.approx(1, abs=1e-6)
    assert relative_distance(outputs_ETD)[0, 1].item() == pytest.approx(0, abs=1e-5)


def test_independent_outputs():
    """Debiased CKA covers 0, as often as it should; the biased one is nowhere near."""
    sums, biased = UnitSums(16), []
    for unit in range(16):
        outputs_ETD = torch.randn(12, 64, 256)
        sums.add(unit, **{f"own.{n}": v for n, v in hsic_sums(outputs_ETD).items()})
        with pytest.warns(UserWarning, match="T is 64 and D 256"):
            biased.append(biased_cka(outputs_ETD))
    found = estimate(METRICS["cka"]._replace(null=None), sums)
    apart = ~np.eye(12, dtype=bool)
    covered = ((found.low <= 0) & (found.high >= 0))[apart]
    assert 0.85 < covered.mean() < 1
    assert np.abs(found.value[apart]).max() < 0.05
    assert min(cka_EE.min() for cka_EE in biased) > 0.2


def test_biased_cka_by_centering():
    outputs_ETD = torch.randn(3, 30, 5) + torch.randn(30, 5)

    def biased(x_TD, y_TD):
        H = torch.eye(30, dtype=torch.float64) - 1 / 30
        x, y = x_TD.double(), y_TD.double()
        return torch.trace(x @ x.T @ H @ y @ y.T @ H).item()

    with pytest.warns(UserWarning, match="biased") as caught:
        got_EE = biased_cka(outputs_ETD)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(got_EE, slow_cka(outputs_ETD, biased), atol=1e-6)


def test_random_experts_on_shared_inputs():
    """Shared inputs alone give 0.01 to 0.12."""
    generator = torch.Generator().manual_seed(1)
    w = ExpertWeights(*(torch.randn(8, 64, 64, generator=generator) for _ in range(3)))
    apart = ~torch.eye(8, dtype=torch.bool)
    values = linear_cka(swiglu(w, torch.randn(512, 64, generator=generator)))[apart]
    assert (values > 0.01).all()
    assert (values < 0.12).all()


def swiglu_by_einsum(gate_FD, up_FD, down_DF, x_TD):
    gate = np.einsum("fd,td->tf", gate_FD, x_TD)
    hidden = gate / (1 + np.exp(-gate)) * np.einsum("fd,td->tf", up_FD, x_TD)
    return np.einsum("df,tf->td", down_DF, hidden)


def test_swiglu():
    w, x_TD = random_experts(), torch.randn(9, 16)
    for e, got in zip([4, 2], swiglu(w, x_TD, [4, 2]), strict=True):
        matrices = [matrix[e].double().numpy() for matrix in w[:3]]
        np.testing.assert_allclose(
            got, swiglu_by_einsum(*matrices, x_TD.double().numpy()), rtol=1e-4, atol=1e-3
        )
    assert swiglu(w, x_TD).shape == (6, 9, 16)


# The stream, on models.


def probe_of(model, site, T: int, unit: int = 0, seed: int = 0) -> Probe:
    """Random tokens, routed as the model would route them."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, model.model.config.d_model, generator=generator)
    tokens_T = torch.zeros(T, dtype=torch.int64)
    with torch.no_grad():
        routing = model.router(site)(x_TD, torch.arange(T) % 13)
    others_RT = tokens_T.expand(2, T)
    return Probe(unit, x_TD, routing, tokens_T, tokens_T, others_RT, others_RT, None, x_TD)


def part(probe: Probe, some: slice, unit: int = 0) -> Probe:
    routing = Routing(*(field[some] for field in probe.routing))
    return probe._replace(unit=unit, x_TD=probe.x_TD[some], routing=routing)


def values_of(stream: OutputStream) -> dict[str, np.ndarray]:
    sums = total(stream.sums())
    return {name: estimate(metric, sums).value for name, metric in METRICS.items()}


def by_loops(model, site, probe: Probe, kind: str, minibatch: int) -> dict[str, np.ndarray]:
    """All but the nulls, expert by expert, pair by pair and token by token, in fp64."""
    matrices = [list(m.detach().double().numpy()) for m in model.expert_weights(site)]
    shared = model.shared_weights(site)
    if shared is not None:
        for own, other in zip(matrices, shared, strict=True):
            own.append(other.detach().double().numpy())
    E, x_TD = len(matrices[0]), probe.x_TD.double().numpy()
    experts = zip(*matrices, strict=True)
    f = [swiglu_by_einsum(gate, up, down, x_TD) for gate, up, down in experts]
    weight = np.zeros((len(x_TD), E))
    for t, (ids, weights) in enumerate(zip(probe.routing.ids_TK, probe.routing.weights_TK)):  # noqa: B905
        for e, w in zip(ids.tolist(), weights.tolist(), strict=True):
            weight[t, e] += w
    weight[:, site.num_experts :] = 1
    pairs = ("cka", "output_cosine", "relative_distance")
    found: dict[str, np.ndarray] = {name: np.full((E, E), np.nan) for name in pairs}
    found |= {name: np.full(E, np.nan) for name in ("output_norm", "reap", "max_output")}
    for i in range(E):
        everything = list(range(len(x_TD)))
        tokens_i = [t for t in everything if weight[t, i]]
        norms = {t: np.linalg.norm(f[i][t]) for t in everything}
        own = everything if kind == "all" else tokens_i
        if tokens_i:
            found["reap"][i] = np.mean([weight[t, i] * norms[t] for t in tokens_i])
            found["output_norm"][i] = np.mean([norms[t] for t in own])
        found["max_output"][i] = np.abs(f[i][own]).max(initial=0)
        for j in range(E):
            if kind == "either":
                tokens = [t for t in everything if weight[t, i] or weight[t, j]]
            else:
                tokens = own
            if not tokens:
                continue
            a, b = f[i][tokens], f[j][tokens]
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            found["output_cosine"][i, j] = np.mean((a * b).sum(1) / lengths)
            apart, energy = ((a - b) ** 2).sum(), ((a**2).sum() + (b**2).sum()) / 2
            found["relative_distance"][i, j] = np.sqrt(apart / energy)
            sums = np.zeros(3)
            for first in range(0, len(tokens), minibatch):
                x, y = (torch.from_numpy(z[first : first + minibatch]) for z in (a, b))
                sums += len(x) * np.array([fast_hsic(x, y), fast_hsic(x, x), fast_hsic(y, y)])
            found["cka"][i, j] = sums[0] / np.sqrt(sums[1] * sums[2]) if sums[1] else np.nan
    return found


@pytest.mark.parametrize("kind", ["all", "routed", "either"])
@pytest.mark.parametrize("family", ["smoe_share", "smoe", "top_p"])
def test_stream_against_loops(model_of, kind, family):
    model = model_of(family)
    site = model.sites()[0]
    stream = OutputStream(model, site, 3, probe=kind, minibatch=16)
    probe = probe_of(model, site, 66)  # a rest of 2 for "all"
    stream.add(probe)
    got = values_of(stream)
    for name, expected in by_loops(model, site, probe, kind, 16).items():
        tolerance = 1e-4 if name == "cka" else 1e-5
        np.testing.assert_allclose(got[name], expected, atol=tolerance, rtol=1e-5, err_msg=name)


def test_an_expert_without_tokens(model_of):
    model = model_of("smoe")
    site = model.sites()[0]
    probe = probe_of(model, site, 20)
    ids_TK = torch.tensor([[0, 1]]).expand(20, 2)
    probe = probe._replace(routing=probe.routing._replace(ids_TK=ids_TK))
    stream = OutputStream(model, site, 1, probe="routed")
    stream.add(probe)
    got = values_of(stream)
    assert np.isnan(got["cka"][2:]).all()
    assert np.isnan(got["reap"][2:]).all()
    assert np.isfinite(got["cka"][:2]).all()


@pytest.mark.parametrize("kind", ["cartesian", "fine_grained", "hash", "parallel"])
def test_batches_that_make_the_same_minibatches(model_of, kind):
    model = model_of(kind)
    site = model.sites()[-1]
    probe = probe_of(model, site, 64)
    values = []
    for sizes in ([64], [32, 32], [16, 48]):
        stream = OutputStream(model, site, 1, minibatch=16)
        for some in torch.arange(64).split(sizes):
            stream.add(part(probe, slice(some[0], some[-1] + 1)))
        values.append(values_of(stream))
        assert set(values[-1]) == set(METRICS)
    for name in METRICS.keys() - {"cka_permuted"}:
        for other in values[1:]:
            np.testing.assert_allclose(other[name], values[0][name], rtol=1e-5, err_msg=name)


def test_sums_have_a_size_of_their_own(model_of):
    model = model_of("smoe_share")
    site = model.sites()[0]
    sizes = []
    for T in (32, 320):
        stream = OutputStream(model, site, 4, minibatch=32)
        stream.add(probe_of(model, site, T))
        sizes.append({name: tuple(value.shape) for name, value in stream.sums().items()})
        assert all(value.dtype == torch.float64 for value in stream.sums().values())
    assert sizes[0] == sizes[1]
    assert all(shape[0] == 4 for name, shape in sizes[0].items() if name != "max")


def test_a_maximum_is_of_all_units_and_has_no_interval(model_of):
    model = model_of("smoe_share")
    site = model.sites()[0]
    stream, alone = OutputStream(model, site, 3, minibatch=8), []
    probe = probe_of(model, site, 48)
    for number in range(6):
        some = part(probe, slice(8 * number, 8 * number + 8), number % 3)
        stream.add(some)
        alone.append(OutputStream(model, site, 3, minibatch=8))
        alone[-1].add(some)
    found = estimate(METRICS["max_output"], stream.sums())
    expected = np.max([values_of(one)["max_output"] for one in alone], 0)
    np.testing.assert_array_equal(found.value, expected)
    assert np.isnan(found.low).all()
    assert np.isfinite(estimate(METRICS["reap"], stream.sums()).low).all()


@pytest.mark.parametrize("kind", ["all", "routed", "either"])
def test_nulls(model_of, kind):
    """Random experts of the same spread on the same tokens; permuted rows around 0."""
    model = model_of("smoe_share")
    site = model.sites()[0]

    def estimates(seed, units=1):
        stream = OutputStream(model, site, units, probe=kind, seed=seed)
        for unit in range(units):
            stream.add(probe_of(model, site, 120, unit, seed=unit))
        return {name: estimate(metric, stream.sums()) for name, metric in METRICS.items()}

    one, again, other, found = estimates(0), estimates(0), estimates(1), estimates(0, units=8)
    apart = ~np.eye(len(found["cka"].value), dtype=bool)
    for name in ("cka", "output_cosine", "relative_distance"):
        np.testing.assert_array_equal(one[name].null, again[name].null)
        assert (one[name].null != other[name].null)[apart].all()
        np.testing.assert_array_equal(one[name].value, other[name].value)
    random = random_null(model, site, [probe_of(model, site, 120, seed=unit) for unit in range(8)])
    assert np.abs(found["cka"].null - random)[apart].mean() < 0.1
    assert np.abs(found["output_cosine"].null[apart].mean()) < 0.15
    assert np.abs(found["relative_distance"].null[apart].mean() - 2**0.5) < 0.3
    permuted = found["cka_permuted"]
    assert (permuted.null == 0).all()
    assert np.abs(permuted.value[apart]).mean() < 0.05
    assert ((permuted.low <= 0) & (permuted.high >= 0))[apart].mean() > 0.8
    for name in ("output_norm", "reap", "max_output"):
        assert np.isnan(found[name].null).all()


def test_the_null_of_the_shared_expert_knows_its_spread_alone(model_of):
    model = as_adapter(copy.deepcopy(model_of("smoe_share").model))
    site = model.sites()[0]
    probe = probe_of(model, site, 120)

    def found():
        stream = OutputStream(model, site, 1)
        stream.add(probe)
        return estimate(METRICS["cka"], stream.sums())

    before = found()
    with torch.no_grad():
        for matrix in model.shared_weights(site):
            order = torch.randperm(matrix.numel(), generator=torch.Generator().manual_seed(0))
            matrix.copy_(matrix.flatten()[order].view_as(matrix))
    after = found()
    assert (before.value[-1] != after.value[-1])[:-1].all()
    np.testing.assert_allclose(before.null, after.null, atol=1e-6)


def random_null(model, site, probes) -> float:
    """Mean CKA of random experts of the same shapes on all tokens."""
    shapes = [matrix.shape for matrix in model.expert_weights(site)]
    generator = torch.Generator().manual_seed(9)
    w = ExpertWeights(*(torch.randn(shape, generator=generator) for shape in shapes))
    cka_EE = linear_cka(swiglu(w, torch.cat([probe.x_TD for probe in probes])))
    return cka_EE[~torch.eye(len(cka_EE), dtype=torch.bool)].mean().item()


def test_the_null_is_of_the_first_minibatch(model_of):
    model = model_of("smoe_share")
    site, found = model.sites()[0], []
    probe = probe_of(model, site, 120)
    for some in (slice(None), slice(30)):
        routing = Routing(*(part[some] for part in probe.routing))
        stream = OutputStream(model, site, 1, minibatch=30)
        stream.add(probe._replace(x_TD=probe.x_TD[some], routing=routing))
        found.append(estimate(METRICS["cka"], stream.sums()).null)
    np.testing.assert_array_equal(*found)


def test_null_experts_are_nobodys_copies(model_of):
    """Those of two sites, and of a site's shared expert, are drawn apart."""

    def normal(expert):
        (w,) = expert.args
        return w.gate_EFD / w.gate_EFD.std((1, 2), keepdim=True)

    model = model_of("smoe_share")
    one, other = (OutputStream(model, site, 1) for site in model.sites()[:2])
    assert not torch.allclose(normal(one._null[0]), normal(other._null[0]), atol=1e-3)
    shared_1FD, first_FD = normal(one._null[-1]), normal(one._null[0])[0]
    rows = min(shared_1FD.shape[1], len(first_FD))
    assert not torch.allclose(shared_1FD[0, :rows], first_FD[:rows], atol=1e-3)
