"""The driver: every metric on every kind of model, units of documents, tables, errors."""

import copy
import itertools

import numpy as np
import pytest
import torch

from analysis import measure_overlap
from analysis.adapters.base import as_adapter
from analysis.measure_overlap import Labels, packs_of
from analysis.overlap import METRICS
from analysis.overlap.base import KINDS as METRIC_KINDS
from analysis.overlap.base import TABLES, Metric, estimate
from analysis.overlap.tables import KEYS, SHARED, VALUES
from cartmoe.hooks import capture_routing

from .conftest import KINDS

QUIET = dict(batch_size=2, minibatch=16, progress=False)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def overlap_of(model_of, shard):
    """overlap_of(kind) -> all metrics that fit the model, damage too."""
    found = {}

    def measure(kind):
        if kind not in found:
            model = model_of(kind)
            fits = {n: m for n, m in METRICS.items() if m.kind == "function"}
            everything = measure_overlap(model, shard, **QUIET)
            damage = measure_overlap(model, shard, list(fits), **QUIET)
            found[kind] = everything, damage
        return found[kind]

    return measure


def test_the_dict():
    assert {metric.kind for metric in METRICS.values()} == set(METRIC_KINDS)
    assert {metric.table for metric in METRICS.values()} == set(TABLES)
    assert all(metric.about for metric in METRICS.values())


@every_kind
def test_every_metric_on_every_kind_of_model(kind, model_of, overlap_of):
    model = model_of(kind)
    cartesian = kind in ("cartesian", "parallel")
    everything, damage = overlap_of(kind)
    for name, metric in METRICS.items():
        if metric.kind == "composite" and not cartesian:
            assert name not in set(everything.sites.metric)
            continue
        if name == "router_cosine" and kind == "hash":
            assert name not in set(everything.pairs.metric)
            continue
        overlap = damage if metric.kind == "function" else everything
        rows = overlap.table(name)
        assert list(rows.columns[: len(KEYS)]) == KEYS
        assert set(VALUES) <= set(rows.columns)
        assert (rows.model == model.name).all()
        sites = {(site.layer, site.stage) for site in model.sites()}
        found = set(zip(rows.layer, rows.stage, strict=True))
        if metric.kind == "composite":
            assert found == {(layer, stage) for layer, stage in sites if stage == 0}
        elif name == "transition":
            assert found == sites - {(0, 0)}
        else:
            assert found == sites
        bounded = rows.low.notna()
        assert (rows.low[bounded] <= rows.value[bounded]).all()
        assert (rows.value[bounded] <= rows.high[bounded]).all()
        if metric.table == "pairs" and name != "transition":
            assert (rows.expert_i != rows.expert_j).all()


@every_kind
def test_usage_is_that_of_the_real_run(kind, model_of, shard, overlap_of):
    model = model_of(kind)
    with torch.no_grad(), capture_routing(model.model) as captured:
        model.model(shard.tokens_SL)
    inside_T = (shard.targets_SL >= 0).flatten()
    load = overlap_of(kind)[0].table("load")
    for site, (routing,) in captured.items():
        ids_TK, weights_TK = routing.ids_TK[inside_T], routing.weights_TK[inside_T]
        count_E = torch.bincount(ids_TK[weights_TK != 0], minlength=site.num_experts)
        own = load[(load.layer == site.layer) & (load.stage == site.stage)].sort_values("expert")
        assert np.allclose(own.value, count_E / count_E.sum())


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.kind in ("usage", "function")])
def test_batches_do_not_matter(name, model_of, shard):
    """But for rounding, in what has no minibatches."""
    model = model_of("cartesian")
    one, two = (
        measure_overlap(model, shard, name, batch_size=size, progress=False).table(name)
        for size in (1, 8)
    )
    assert np.allclose(one.value, two.value, rtol=1e-5, atol=1e-6, equal_nan=True)


def relabelled(model, order):
    """The same model with expert order[e] as its e-th."""
    changed = copy.deepcopy(model.model)
    for stage in changed.modules():
        if hasattr(stage, "experts"):
            with torch.no_grad():
                for weight in (*stage.experts.parameters(), stage.router.gate.weight):
                    weight.copy_(weight[order].clone())
    return as_adapter(changed)


@pytest.mark.parametrize("probe", ["all", "routed", "either"])
def test_relabelling_experts_relabels_the_result(model_of, shard, probe):
    """Everything but nulls that draw at random by the number of an expert."""
    model = model_of("cartesian")
    order = torch.randperm(model.sites()[0].num_experts, generator=torch.Generator().manual_seed(1))
    names = [n for n, m in METRICS.items() if n != "cka_permuted"]
    options = QUIET | dict(probe=probe)
    before = measure_overlap(model, shard, names, **options)
    after = measure_overlap(relabelled(model, order), shard, names, **options)
    number = {e: int(order[e]) for e in range(len(order))} | {SHARED: SHARED}
    for table in TABLES:
        old, new = getattr(before, table), getattr(after, table)
        index = [c for c in old.columns if c.startswith("expert")]
        new[index] = new[index].map(number.get)
        keys = [*KEYS, *index, *(["domain"] if "domain" in old else [])]
        both = old.merge(new, on=keys, how="outer", indicator=True)
        assert (both._merge == "both").all()
        assert np.allclose(both.value_x, both.value_y, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_sites_are_chosen(model_of, shard):
    model = model_of("cartesian")
    first, second, *_ = model.sites()
    for asked, expected in [
        ("stage 1", {site for site in model.sites() if site.stage == 1}),
        (first, {first}),
        ([first, second], {first, second}),
    ]:
        rows = measure_overlap(model, shard, "load", asked, progress=False).experts
        assert set(zip(rows.layer, rows.stage, strict=True)) == {
            (s.layer, s.stage) for s in expected
        }


def test_the_first_token_can_be_left_out(model_of, shard):
    model = model_of("smoe")
    whole, less = (
        measure_overlap(model, shard, "load", skip_first=skip, progress=False).experts.value
        for skip in (False, True)
    )
    assert not np.allclose(whole, less)


def test_packs_are_whole_documents(shard):
    for size in (1, 2, 3, 100):
        packs = list(packs_of(shard, size, seed=0))
        assert sorted(itertools.chain(*packs)) == list(range(len(shard)))
        own = [{shard.document_id[row] for row in pack} for pack in packs]
        assert sum(map(len, own)) == 4  # no document is in two of them
        assert all(
            len(pack) <= size or len(documents) == 1
            for pack, documents in zip(packs, own, strict=True)
        )
    assert len(list(packs_of(shard, 100, seed=0))) == 1


def test_labels_are_shuffled_by_document(shard):
    labels = Labels.of(shard, seed=0)
    documents = np.array(shard.document_id)
    for other_S in labels.other_RS:
        taken = {d: set(documents[other_S][documents == d]) for d in set(documents)}
        assert all(len(others) == 1 for others in taken.values())
        assert {next(iter(others)) for others in taken.values()} == set(documents)


def test_one_unit_has_no_interval(model_of, shard):
    rows = measure_overlap(model_of("smoe"), shard, "lift", batch_size=100, progress=False).pairs
    assert rows.low.isna().all()
    assert (rows.num_units == 1).all()


def test_the_jackknife_of_a_ratio():
    """By hand, in another way: pseudo-values of a mean are the values themselves."""
    values = torch.tensor([1.0, 3.0, 4.0, 8.0], dtype=torch.float64)
    sums = {"x": values, "n": torch.ones(4, dtype=torch.float64)}
    metric = Metric("usage", "sites", lambda s: s["x"] / s["n"], None, "mean")
    found = estimate(metric, sums, confidence=0.95)
    error = values.std().item() / 2
    assert float(found.value) == pytest.approx(4.0)
    assert float(found.high - found.value) == pytest.approx(3.182446 * error, rel=1e-5)


def test_no_hook_is_left(model_of, shard):
    model = model_of("cartesian")
    measure_overlap(model, shard, ["load", "cka", "substitution"], **QUIET)
    with pytest.raises(ValueError, match="metric is 'nothing'"):
        measure_overlap(model, shard, "nothing", **QUIET)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert all(not getattr(m, name) for m in model.model.modules() for name in hooks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metrics="cosine"), "metric is 'cosine'; choose one of .*'cka'"),
        (dict(metrics=[]), r"metrics is \[\]; name some of"),
        (dict(metrics="composite_a"), "metric for smoe is 'composite_a'; choose one of"),
        (dict(sites="layer 7"), "sites is 'layer 7'; it must select routers"),
        (dict(sites="positions 0:3"), "sites is 'positions 0:3'"),
        (dict(probe="none"), "probe is 'none'; choose one of 'all', 'routed', 'either'"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(minibatch=3), "minibatch is 3; it must be at least 4"),
        (dict(confidence=1.0), "confidence is 1.0"),
    ],
)
def test_errors_teach(model_of, shard, options, message):
    with pytest.raises(ValueError, match=message):
        measure_overlap(model_of("smoe"), shard, progress=False, **options)


def test_what_cannot_be_measured(model_of, shard):
    with pytest.raises(ValueError, match="it is dense"):
        measure_overlap(model_of("dense"), shard)
    with pytest.raises(ValueError, match="docs has no sequence"):
        measure_overlap(model_of("smoe"), shard[:0])
    with pytest.raises(ValueError, match="metric for hash is 'router_cosine'"):
        measure_overlap(model_of("hash"), shard, "router_cosine")


def test_tables_answer(overlap_of):
    everything, _ = overlap_of("smoe_share")
    square = everything.matrix("cka", 0)
    assert square.shape == (7, 7)  # of six experts and, last, the shared one
    assert np.isnan(np.diag(square)).all()
    assert np.allclose(square, square.T, equal_nan=True)
    with pytest.raises(ValueError, match=r"\(layer, stage\) is \(9, 0\)"):
        everything.matrix("cka", 9)
    with pytest.raises(ValueError, match="metric is 'load', which is not of pairs"):
        everything.matrix("load", 0)
    with pytest.raises(ValueError, match="metric is 'substitution'; choose one of"):
        everything.table("substitution")
