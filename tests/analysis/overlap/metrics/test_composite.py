"""Composed experts: against the layer itself, against loops, and in planted cases."""

import copy
import importlib
import itertools

import numpy as np
import pytest
import torch

from analysis.adapters.base import State, as_adapter
from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics import composite
from analysis.overlap.metrics.base import Probe, estimate
from analysis.overlap.metrics.composed import Layer
from analysis.overlap.metrics.composite import (
    METRICS,
    CompositeStream,
    SecondStage,
    mean_cosines,
    related,
    two_way,
)
from analysis.overlap.metrics.outputs import hsic, linear_cka

E = 6
SITES = [name for name, metric in METRICS.items() if metric.table == "sites"]
LAYERS = {
    "cartesian": dict(),
    "routed only": dict(shared_experts=False),
    "parallel": dict(composition="parallel"),
}


@pytest.fixture(params=LAYERS)
def model(tiny_model, request):
    return own(tiny_model, **LAYERS[request.param])


def own(tiny_model, **options):
    """A model of one's own, to change; no two of its norms are alike."""
    model = copy.deepcopy(tiny_model("cartesian", **options))
    for block in model.trunk.blocks:
        for norm in getattr(block.ffn, "norms", ()):
            norm.weight.data.uniform_(0.5, 2)
    return as_adapter(model)


def stream(tokens=200):
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def composed_outputs(model, first, second, u_TD):
    """(A, B, T, D) that each composed expert adds to the stream u."""
    layer = Layer(model, first, second)
    block = layer.block(u_TD, layer.first_outputs(u_TD))
    return torch.stack([block.rows_ATD + block.routed(j) for j in range(second.num_experts)], 1)


def probe(u_TD, unit=0):
    return Probe(unit, *[None] * 7, stream_TD=u_TD)


def metrics_of(model, *streams):
    """By name (value, null) over batches, each a unit."""
    first, second = model.sites()[:2]
    summed = CompositeStream(model, first, second, len(streams))
    for unit, u_TD in enumerate(streams):
        summed.add(probe(u_TD, unit))
    found = {name: estimate(METRICS[name], summed.sums()) for name in SITES}
    return {name: (e.value.item(), e.null.item()) for name, e in found.items()}


def test_outputs_are_those_of_the_layer(model):
    """The model's own segments, every token sent to a_i and b_j with weight 1."""
    tokens_BL = torch.randint(1, 13, (2, 9), generator=torch.Generator().manual_seed(1))
    first, second = model.sites()[2:]
    assert first.layer == second.layer == 2
    state = State(None, tokens_BL)
    segments = iter(model.segments())
    for segment in segments:
        if first in segment.sites:
            break
        state = segment.run(state)
    layer = [segment, *(s for s in segments if second in s.sites)]
    u_TD = state.hidden_BLD.flatten(0, 1)
    found = composed_outputs(model, first, second, u_TD)
    assert found.shape == (E, E, 18, 16)
    for i, j in itertools.product(range(E), range(E)):

        def force(routing, router, site, x_TD, chosen=(i, j)):
            ids_TK = torch.full_like(routing.ids_TK[:, :1], chosen[site.stage])
            return routing._replace(ids_TK=ids_TK, weights_TK=torch.ones(len(ids_TK), 1))

        after = state
        with torch.no_grad(), model.hooked(router=force, where=lambda site: site.layer == 2):
            for segment in layer:
                after = segment.run(after)
        change_TD = (after.hidden_BLD - state.hidden_BLD).flatten(0, 1)
        torch.testing.assert_close(found[i, j], change_TD, atol=2e-5, rtol=1e-5)


def test_sums_of_squares_against_loops():
    y = np.random.default_rng(0).normal(size=(3, 4, 5, 2)) + 7
    expected = np.zeros(3)
    total = 0.0
    for t, d in itertools.product(range(5), range(2)):
        cells = y[:, :, t, d]
        grand = sum(cells.flatten()) / 12
        row = [sum(cells[i]) / 4 for i in range(3)]
        column = [sum(cells[:, j]) / 3 for j in range(4)]
        for i, j in itertools.product(range(3), range(4)):
            expected[0] += (row[i] - grand) ** 2
            expected[1] += (column[j] - grand) ** 2
            expected[2] += (cells[i, j] - row[i] - column[j] + grand) ** 2
            total += (cells[i, j] - grand) ** 2
    found = two_way(torch.from_numpy(y)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.sum() == pytest.approx(total, rel=1e-12)


def test_the_stream_sums_what_the_outputs_give(model, monkeypatch):
    """In blocks and without keeping outputs; the null, B fed the mean over i of v_i, and the
    cosines are those of the first blocks, until there are enough tokens."""
    monkeypatch.setattr(composite, "BLOCK_ROWS", 40 * E)
    first, second = model.sites()[:2]
    u_TD = stream()
    few = 80  # PAIR_TOKENS is 64
    summed = CompositeStream(model, first, second, 2)
    summed.add(probe(u_TD[:150], 0))
    summed.add(probe(u_TD[150:], 1))
    sums = summed.sums()
    reference = own_double(model)
    outputs = composed_outputs(reference, first, second, u_TD.double())
    expected = torch.stack([two_way(outputs[:, :, :150]), two_way(outputs[:, :, 150:])])
    torch.testing.assert_close(sums["squares"], expected, rtol=1e-5, atol=1e-6)
    parts = u_TD[:few].double(), u_TD[150:].double()
    null = torch.stack([two_way(fed_the_mean(reference, part)) for part in parts])
    torch.testing.assert_close(sums["null"], null, rtol=1e-5, atol=1e-6)
    assert (null[:, 2] < 1e-20).all()
    cosine_RT = mean_cosines(outputs)
    cosines = torch.stack([cosine_RT[:, :few].sum(1), cosine_RT[:, 150:].sum(1)])
    torch.testing.assert_close(sums["cosine"], cosines, rtol=1e-5, atol=1e-4)
    assert sums["tokens"].tolist() == [few, 50]
    # As everywhere, an HSIC counts as much as the tokens that it is made of.
    pairs = outputs.flatten(0, 1)
    expected = torch.stack([few * hsic(pairs[:, :few]), 50 * hsic(pairs[:, 150:])])
    torch.testing.assert_close(sums["hsic"], expected, rtol=1e-3, atol=1e-3)


def test_sums_are_not_in_half_precision(model):
    """What is left to bf16 is the model's own; its outputs are the reference."""
    model = as_adapter(model.model.bfloat16())
    first, second = model.sites()[:2]
    u_TD = stream(150).bfloat16()
    summed = CompositeStream(model, first, second, 1)
    summed.add(probe(u_TD))
    outputs = composed_outputs(model, first, second, u_TD)
    assert outputs.dtype == torch.float32
    squares, cosine = (summed.sums()[name][0] for name in ("squares", "cosine"))
    torch.testing.assert_close(squares, two_way(outputs), rtol=1e-3, atol=1e-3)
    expected = mean_cosines(outputs.double()).sum(1)
    torch.testing.assert_close(cosine, expected, rtol=1e-3, atol=1e-2)
    exact = mean_cosines(outputs.bfloat16().double()).float()
    torch.testing.assert_close(mean_cosines(outputs.bfloat16()), exact, rtol=0, atol=1e-5)


def test_pairs_are_of_the_first_experts(tiny_model, monkeypatch):
    monkeypatch.setattr(composite, "PAIR_EXPERTS", 4)
    model, u_TD = own(tiny_model), stream(composite.PAIR_TOKENS)
    few = composed_outputs(model, *model.sites()[:2], u_TD)[:4, :4]
    found = metrics_of(model, u_TD)
    for number, relation in enumerate(composite.RELATIONS):
        expected = mean_cosines(few)[number].mean().item()  # about the mean of these
        assert found[f"composite_cosine_{relation}"][0] == pytest.approx(expected, abs=1e-5)
        cka = linear_cka(few.flatten(0, 1))[related(4)[number]].mean().item()
        assert found[f"composite_cka_{relation}"][0] == pytest.approx(cka, abs=1e-4)
        for kind in ("cka", "cosine"):
            about = METRICS[f"composite_{kind}_{relation}"].about
            assert "those of the first 16 experts of each stage" in about


def own_double(model):
    double = as_adapter(copy.deepcopy(model.model).double())
    assert double.sites() == model.sites()
    return double


def fed_the_mean(model, u_TD):
    """(A, B, T, D) a_i + combine(x, F_j(x)) with x of the mean over i of v_i, one by one."""
    first, second = model.sites()[:2]
    h_TD = model.stage_input(first, u_TD)
    f_ETD = model.expert_outputs(first, h_TD)
    a_ETD = torch.stack([model.combine(first, h_TD, f_TD) for f_TD in f_ETD])
    x_TD = model.stage_input(second, u_TD + a_ETD.mean(0))
    if any(len(segment.sites) == 2 for segment in model.segments()):
        x_TD = h_TD
    b_ETD = torch.stack(
        [model.combine(second, x_TD, f_TD) for f_TD in model.expert_outputs(second, x_TD)]
    )
    return (a_ETD[:, None] + b_ETD).detach()


def test_a_parallel_layer_has_no_interaction(tiny_model):
    found = metrics_of(own(tiny_model, composition="parallel"), stream(64))
    assert found["composite_interaction"][0] == pytest.approx(0, abs=1e-12)
    for name in ("composite_a", "composite_b"):
        value, null = found[name]
        assert value == pytest.approx(null, rel=1e-6)
        assert 0.1 < value < 0.9


def test_a_sequential_layer_has_some(tiny_model):
    found = metrics_of(own(tiny_model), stream())
    value, null = found["composite_interaction"]
    assert value > 0.01
    assert null == pytest.approx(0, abs=1e-12)
    shares = [found[f"composite_{part}"] for part in ("a", "b", "interaction")]
    assert np.sum(shares, axis=0) == pytest.approx([1, 1])


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_of_equal_experts_has_no_share(model, stage):
    for weight in model.expert_weights(model.sites()[stage]):
        weight.data[:] = weight.data[:1].clone()
    found = metrics_of(model, stream())
    constant, other = ("a", "b") if stage == 0 else ("b", "a")
    assert found[f"composite_{constant}"][0] == pytest.approx(0, abs=1e-10)
    assert found["composite_interaction"][0] == pytest.approx(0, abs=1e-6)
    assert found[f"composite_{other}"][0] == pytest.approx(1)
    # Those that differ in the constant stage alone are the same function.
    same, apart = ("column", "row") if stage == 0 else ("row", "column")
    for kind in ("cka", "cosine"):
        assert found[f"composite_{kind}_{same}"][0] == pytest.approx(1, abs=1e-4)
        assert found[f"composite_{kind}_{apart}"][0] < 0.95
        other = found[f"composite_{kind}_unrelated"][0]
        assert found[f"composite_{kind}_{apart}"] == pytest.approx((other, other), abs=1e-4)


def experts_cka(model, u_TD):
    """The metric of pairs at both stages, and its null at each."""
    first, second = model.sites()[:2]
    summed = CompositeStream(model, first, second, 1)
    summed.add(probe(u_TD))
    stages = summed, SecondStage(summed)
    return [estimate(METRICS["composite_cka"], stage.sums()) for stage in stages]


def test_experts_of_each_stage_against_loops(model):
    u_TD = stream(composite.PAIR_TOKENS)
    outputs = composed_outputs(own_double(model), *model.sites()[:2], u_TD.double())
    expected = np.zeros((2, E, E))
    for i, j, other in itertools.product(range(E), repeat=3):
        a = linear_cka(torch.stack([outputs[i, other], outputs[j, other]]))
        b = linear_cka(torch.stack([outputs[other, i], outputs[other, j]]))
        expected[:, i, j] += np.array([a[0, 1], b[0, 1]]) / E
    found = metrics_of(model, u_TD)
    for got, values, relation in zip(
        experts_cka(model, u_TD), expected, ("column", "row"), strict=True
    ):
        np.testing.assert_allclose(got.value, values, atol=2e-5)
        pairs = got.value[~np.eye(E, dtype=bool)]
        assert pairs.mean() == pytest.approx(found[f"composite_cka_{relation}"][0])
        assert got.null == pytest.approx(found["composite_cka_unrelated"][0])


@pytest.mark.parametrize("stage", [0, 1])
def test_duplicated_experts_make_equal_composites(model, stage):
    for weight in model.expert_weights(model.sites()[stage]):
        weight.data[4] = weight.data[1].clone()
    here, other = experts_cka(model, stream())[:: 1 - 2 * stage]
    assert here.value[1, 4] == pytest.approx(1, abs=1e-4)
    assert here.value[1, 3] < 0.95
    assert (other.value[~np.eye(E, dtype=bool)] < 0.95).all()


def test_relations_against_loops():
    found = related(3)
    for p, q in itertools.product(range(9), range(9)):
        row, column = p // 3 == q // 3, p % 3 == q % 3
        assert found[:, p, q].tolist() == [
            row and not column,
            column and not row,
            not row and not column,
        ]


def test_pairs_against_loops(model):
    first, second = model.sites()[:2]
    u_TD = stream(composite.PAIR_TOKENS)
    outputs = composed_outputs(own_double(model), first, second, u_TD.double())
    y = (outputs - outputs.mean((0, 1))).flatten(0, 1).detach().numpy()
    cka = linear_cka(outputs.flatten(0, 1)).numpy()
    sums = {kind: {"row": [], "column": [], "unrelated": []} for kind in ("cka", "cosine")}
    for p, q in itertools.permutations(range(E * E), 2):
        row, column = p // E == q // E, p % E == q % E
        relation = "row" if row else "column" if column else "unrelated"
        cosine_T = (y[p] * y[q]).sum(-1)
        cosine_T /= np.linalg.norm(y[p], axis=-1) * np.linalg.norm(y[q], axis=-1)
        sums["cosine"][relation].append(cosine_T.mean())
        sums["cka"][relation].append(cka[p, q])
    found = metrics_of(model, u_TD)
    for kind, by_relation in sums.items():
        null = np.mean(by_relation["unrelated"])
        for relation, values in by_relation.items():
            value, its_null = found[f"composite_{kind}_{relation}"]
            assert value == pytest.approx(np.mean(values), abs=2e-5)
            if relation == "unrelated":
                assert np.isnan(its_null)
            else:
                assert its_null == pytest.approx(null, abs=2e-5)


def test_relabelling_experts_changes_nothing(model):
    before = metrics_of(model, stream())
    for site, order in zip(model.sites(), ([3, 1, 5, 0, 2, 4], [5, 4, 3, 2, 0, 1]), strict=False):
        for weight in model.expert_weights(site):
            weight.data.copy_(weight.data[order].clone())
    after = metrics_of(model, stream())
    for name, values in before.items():
        assert after[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True)


def test_some_tokens_stand_for_a_batch(tiny_model):
    """What comes behind the first ones (their order is random) costs nothing."""
    model = own(tiny_model)
    u_TD = stream(composite.TOKENS + 30)
    whole, part = metrics_of(model, u_TD), metrics_of(model, u_TD[: composite.TOKENS])
    assert all(part[name] == pytest.approx(whole[name], rel=0, nan_ok=True) for name in SITES)


def test_pairs_alone_take_fewer_tokens(model_of, shard):
    """And are the same as with all that is measured."""
    model = model_of("cartesian")
    options = dict(batch_size=3, progress=False)
    alone = measure_overlap(model, shard, "composite_cka", **options).pairs
    both = measure_overlap(model, shard, ["composite_cka", "composite_a"], **options).pairs
    np.testing.assert_allclose(alone.value, both.value, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_blocks_on_several_cores(model, threads, monkeypatch):
    """The same sums, and as many threads as before."""
    monkeypatch.setattr(composite, "BLOCK_ROWS", 20 * E)
    one = metrics_of(model, stream())
    torch.set_num_threads(threads)
    try:
        several = metrics_of(model, stream())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    for name, values in one.items():
        assert several[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True)


def test_too_few_tokens_for_cka_add_nothing(tiny_model):
    model = own(tiny_model)
    whole, with_few = metrics_of(model, stream(64)), metrics_of(model, stream(64), stream(3))
    for relation in composite.RELATIONS:
        name = f"composite_cka_{relation}"
        assert with_few[name] == pytest.approx(whole[name], nan_ok=True)
    assert np.isnan(metrics_of(model, stream(3))["composite_cka_row"][0])


def test_the_table(model_of, shard):
    model = model_of("cartesian")
    found = measure_overlap(model, shard, list(METRICS), batch_size=3, progress=False)
    table, pairs = found.sites, found.pairs
    assert len(table) == 2 * len(SITES)  # of the first stage of each layer
    assert (table.stage == 0).all()
    shares = table[table.metric.isin(["composite_a", "composite_b", "composite_interaction"])]
    assert shares.groupby("layer").value.sum().to_numpy() == pytest.approx([1, 1])
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()
    assert pairs.groupby(["layer", "stage"]).size().to_dict() == {
        (layer, stage): E * (E - 1) for layer in (0, 2) for stage in (0, 1)
    }
    assert (pairs.low <= pairs.value).all()
    with pytest.raises(ValueError, match="metric for these sites of cartesian is 'composite_cka'"):
        measure_overlap(model, shard, "composite_cka", "stage 1", progress=False)
    with pytest.raises(ValueError, match="metric for these sites of smoe is 'composite_a'"):
        measure_overlap(model_of("smoe"), shard, "composite_a", progress=False)


def test_cosines_of_planted_outputs():
    """Orthogonal effects of equal size: x_i + y_j, cosine 1/2 with one in common, then less."""
    outputs = torch.zeros(2, 2, 1, 2)
    for i, j in itertools.product(range(2), range(2)):
        outputs[i, j, 0] = torch.tensor([5 + (-1.0) ** i, -3 + (-1.0) ** j])
    assert mean_cosines(outputs)[:, 0].tolist() == pytest.approx([0, 0, -1])


def test_cosines_of_stages_of_unequal_size():
    y_ABTD = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    n_ABTD = torch.nn.functional.normalize(y_ABTD - y_ABTD.mean((0, 1)), dim=-1)
    a, b = (list(itertools.permutations(range(n), 2)) for n in (3, 4))
    row = [n_ABTD[i, j] * n_ABTD[i, k] for i in range(3) for j, k in b]
    column = [n_ABTD[i, j] * n_ABTD[k, j] for j in range(4) for i, k in a]
    expected_2T = torch.stack([torch.stack(some).sum(-1).mean(0) for some in (row, column)])
    torch.testing.assert_close(mean_cosines(y_ABTD)[:2], expected_2T)


def test_shares_of_squares_take_more_tokens_than_pairs(model_of, shard, monkeypatch):
    module, seen = importlib.import_module("analysis.overlap.metrics.streams"), []
    real = module.CompositeStream
    monkeypatch.setattr(
        module, "CompositeStream", lambda *given: seen.append(given[-1]) or real(*given)
    )
    for metric in ("composite_interaction", "composite_cka_row"):
        measure_overlap(model_of("cartesian"), shard, metric, "layer 0", progress=False)
    assert seen == [composite.TOKENS, composite.PAIR_TOKENS]
