"""The driver: every metric on every kind of model, units of documents, tables, errors."""

import copy
import dataclasses
import importlib
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import stdtrit

from analysis import measure_overlap
from analysis.adapters.base import as_adapter
from analysis.overlap import probes
from analysis.overlap.metrics.base import KINDS as METRIC_KINDS
from analysis.overlap.metrics.base import TABLES, Metric, estimate
from analysis.overlap.metrics.catalogue import METRICS
from analysis.overlap.metrics.usage import js_divergence, mutual_information
from analysis.overlap.metrics.usage_stream import UsageStream
from analysis.overlap.probes import Labels, packs_of
from analysis.overlap.tables import KEYS, VALUES, Overlap
from analysis.stats.overlap_tables import SHARED
from cartmoe.data import IGNORE
from cartmoe.hooks import capture_routing

from ..conftest import KINDS

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
            assert name not in {*everything.sites.metric, *everything.pairs.metric}
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
        if metric.kind == "composite" and metric.table == "sites":
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
    with torch.no_grad(), capture_routing(model.model) as captured:
        model.model(shard.tokens_SL)
    has_target_SL = shard.targets_SL >= 0
    options = dict(batch_size=1, progress=False)
    for skip in (False, True):
        load = measure_overlap(model, shard, "load", skip_first=skip, **options).table("load")
        for site, (routing,) in captured.items():
            ids_SLK = routing.ids_TK.unflatten(0, has_target_SL.shape)[:, int(skip) :]
            ids = ids_SLK[has_target_SL[:, int(skip) :]].flatten()
            count_E = torch.bincount(ids, minlength=site.num_experts)
            own = load[load.layer == site.layer].sort_values("expert")
            np.testing.assert_array_equal(own.value, count_E / count_E.sum().double())


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


def test_few_sequences_make_small_batches(model_of, shard):
    """A unit a document, in place of one batch without any interval."""
    rows = measure_overlap(model_of("smoe"), shard, "lift", progress=False).pairs
    assert (rows.num_units == 4).all()
    assert rows.low.notna().any()


def test_labels_are_shuffled_by_document(shard):
    labels = Labels.of(shard, seed=0)
    orders = {tuple(other_S.tolist()) for other_S in labels.other_RS}
    assert len(orders) > 3
    for order in orders:
        assert sorted(order) == list(range(len(shard)))  # no label is lost or used twice
        taken = [shard.document_id[other] for other in order]
        assert len(list(itertools.groupby(taken))) == 4  # and documents stay in one piece


def test_nulls_of_shuffled_labels_by_loops(model_of, shard):
    """A label is that of the same place in another sequence, begun again where that is shorter."""
    model, labels = model_of("smoe"), Labels.of(shard, seed=0)
    found = measure_overlap(model, shard, ["mi_domain", "token_js"], **QUIET)
    lengths = (shard.targets_SL != IGNORE).sum(1).tolist()
    domains = sorted(set(shard.domain))
    with torch.no_grad(), capture_routing(model.model) as captured:
        model.model(shard.tokens_SL)
    for site, (routing,) in captured.items():
        ids_SLK = routing.ids_TK.unflatten(0, shard.tokens_SL.shape)
        information, divergence = [], []
        for other_S in labels.other_RS.tolist():
            domain_EZ = torch.zeros(site.num_experts, len(domains), dtype=torch.float64)
            token_EV = torch.zeros(site.num_experts, 13, dtype=torch.float64)
            for sequence, other in enumerate(other_S):
                for place in range(lengths[sequence]):
                    token = shard.tokens_SL[other, place % lengths[other]]
                    for expert in ids_SLK[sequence, place]:
                        domain_EZ[expert, domains.index(shard.domain[other])] += 1
                        token_EV[expert, token] += 1
            information.append(mutual_information(domain_EZ).item())
            divergence.append(js_divergence(token_EV).numpy())
        row = found.sites.query("layer == @site.layer").squeeze()
        assert row.null == pytest.approx(np.mean(information))
        got_EE = found.matrix("token_js", site.layer, column="null")
        apart = ~np.eye(site.num_experts, dtype=bool)
        np.testing.assert_allclose(got_EE[apart], np.mean(divergence, 0)[apart])


def test_tokens_are_in_a_random_order(model_of, shard):
    """So that a minibatch of HSIC is not of one document."""
    model = model_of("smoe")
    seen = probes.Probes(model, shard, model.sites()[:1], Labels.of(shard, 0))
    ((_, probe),) = seen.of(list(range(7)), 0, (0, 1, 2))
    domain_T = probe.domain_T.tolist()
    assert sum(a != b for a, b in itertools.pairwise(domain_T)) > 10  # 3 as they stand


def test_transition_is_from_the_site_before_also_where_that_is_not_asked_for(model_of, shard):
    model, columns = model_of("smoe"), ["layer", "expert_i", "expert_j", "value"]
    last = model.sites()[-1]
    every, alone = (
        measure_overlap(model, shard, "transition", sites, **QUIET).pairs[columns]
        for sites in (None, last)
    )
    every = every[every.layer == last.layer].reset_index(drop=True)
    pd.testing.assert_frame_equal(every, alone)


def test_batches_beyond_the_most_units_take_turns(model_of, shard, monkeypatch):
    module, one = importlib.import_module("analysis.overlap.measure"), QUIET | dict(batch_size=1)
    named = []
    for most in (3, 4):  # of four batches, of a document each
        monkeypatch.setattr(module, "MAX_UNITS", most)
        rows = measure_overlap(model_of("smoe"), shard, "load", **one).experts
        named.append((rows.unit.iloc[0], rows.num_units.iloc[0]))
    assert named == [("batches of documents", 3), ("batch of documents", 4)]
    monkeypatch.setattr(module, "MAX_UNITS", 2)
    units, real = [], module.Probes.of

    def of(probes, rows, unit, key):
        units.append(unit)
        return real(probes, rows, unit, key)

    monkeypatch.setattr(module.Probes, "of", of)
    measure_overlap(model_of("smoe"), shard, "load", **one)
    assert [unit for unit, _ in itertools.groupby(units)] == [0, 1, 0, 1]


def test_confidence_is_that_of_the_interval(model_of, shard):
    widths = []
    for confidence in (0.95, 0.5):
        rows = measure_overlap(model_of("smoe"), shard, "load", confidence=confidence, **QUIET)
        widths.append((rows.experts.high - rows.experts.low).to_numpy())
    df = rows.experts.num_units.iloc[0] - 1
    np.testing.assert_allclose(widths[0] / widths[1], stdtrit(df, 0.975) / stdtrit(df, 0.75))


def test_targets_masked_at_the_beginning(model_of, shard):
    """As of a prompt: tokens are still those that the experts saw."""
    targets_SL = shard.targets_SL.clone()
    targets_SL[[0, 2], :3] = IGNORE
    model, docs = model_of("smoe"), dataclasses.replace(shard, targets_SL=targets_SL)
    found = measure_overlap(model, docs, "token_js", **QUIET)
    with torch.no_grad(), capture_routing(model.model) as captured:
        model.model(docs.tokens_SL)
    counted_T = (targets_SL != IGNORE).flatten()
    for site, (routing,) in captured.items():
        token_EV = torch.zeros(site.num_experts, 13, dtype=torch.float64)
        tokens_T = docs.tokens_SL.flatten()[counted_T]
        for token, chosen in zip(tokens_T, routing.ids_TK[counted_T], strict=True):
            token_EV[chosen, token] += 1
        expected_EE = js_divergence(token_EV).numpy()
        apart = ~np.eye(site.num_experts, dtype=bool)
        got_EE = found.matrix("token_js", site.layer)
        np.testing.assert_allclose(got_EE[apart], expected_EE[apart])
    # Nor do labels of other documents come from where they have no target.
    empty_SL, rows_S = targets_SL == IGNORE, torch.arange(len(docs))
    places_SL = probes.Probes(model, docs, [], None)._places(rows_S)
    assert not empty_SL.gather(-1, places_SL).any()


def test_rare_tokens_are_one_class(model_of, shard, monkeypatch):
    monkeypatch.setattr(probes, "VOCABULARY", 3)
    labels = Labels.of(shard, seed=0)
    counts_V = torch.bincount(shard.tokens_SL.flatten())
    frequent = labels.class_V < 3
    assert labels.num_classes == 4
    assert sorted(labels.class_V[frequent].tolist()) == [0, 1, 2]
    assert (labels.class_V[~frequent] == 3).all()
    assert counts_V[frequent].min() >= counts_V[~frequent].max()
    found = measure_overlap(model_of("smoe"), shard, "mi_token", **QUIET)
    assert found.sites[["value", "null"]].notna().all(axis=None)


def test_no_null_where_shuffles_change_nothing(model_of, shard):
    """One document has no other labels, and documents of one domain no other domain."""
    of_tokens = ["token_jaccard", "token_js", "vocabulary_specialization", "mi_token"]
    of_domains = ["mi_domain", "mi_domain_given_token"]
    one = shard[:3]
    one_domain = shard.take([0, 1, 2, 5])  # of two documents
    for docs, without in ((one, of_tokens + of_domains), (one_domain, of_domains), (shard, [])):
        for names in (of_tokens + of_domains, ["mi_domain"]):  # with counts by class, and without
            found = measure_overlap(model_of("smoe"), docs, names, progress=False)
            for name in names:
                rows = found.table(name).dropna(subset="value")
                assert len(rows)
                assert (rows.null.isna() == (name in without)).all()


def test_one_unit_has_no_interval(model_of, shard):
    rows = measure_overlap(model_of("smoe"), shard[:3], "lift", progress=False).pairs
    assert rows.low.isna().all()
    assert (rows.num_units == 1).all()


def test_the_jackknife_of_a_ratio():
    """By hand, in another way: pseudo-values of a mean are the values themselves."""
    values = torch.tensor([1.0, 3.0, 4.0, 8.0], dtype=torch.float64)
    sums = {"x": values, "n": torch.ones(4, dtype=torch.float64)}
    metric = Metric("usage", "sites", lambda s: s["x"] / s["n"], "mean")
    found = estimate(metric, sums, confidence=0.95)
    error = values.std().item() / 2
    assert float(found.value) == pytest.approx(4.0)
    assert float(found.high - found.value) == pytest.approx(3.182446 * error, rel=1e-5)


def assert_no_hook(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    for module in model.model.modules():
        assert not any(getattr(module, name) for name in hooks)
        assert "forward" not in vars(module)


def test_no_hook_is_left(model_of, shard, monkeypatch):
    model = as_adapter(copy.deepcopy(model_of("cartesian").model))
    names = ["load", "cka", "substitution"]
    measure_overlap(model, shard, names, **QUIET)
    assert_no_hook(model)
    added = []

    def add(stream, probe):
        added.append(stream)
        if len(added) == len(model.sites()) + 2:  # at the second site of the second batch
            raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(UsageStream, "add", add)
        with pytest.raises(RuntimeError, match="in the middle"):
            measure_overlap(model, shard, names, **QUIET)
    assert_no_hook(model)
    model.router(model.sites()[2]).rows.data[:] = torch.nan
    with pytest.raises(FloatingPointError):  # within the model's forward
        measure_overlap(model, shard, names, **QUIET)
    assert_no_hook(model)


def test_transitions_between_unequal_sites_have_no_shared_expert(tiny_model, shard):
    model, other = (tiny_model("smoe", moe_interval=1, num_experts=E) for E in (6, 4))
    model.trunk.blocks[1].ffn = other.trunk.blocks[1].ffn
    assert [site.num_experts for site in as_adapter(model).sites()] == [6, 4, 6]
    rows = measure_overlap(model, shard, "transition", **QUIET).table("transition")
    for layer, (F, E) in {1: (6, 4), 2: (4, 6)}.items():
        own = rows[rows.layer == layer]
        expected = set(itertools.product(range(F), range(E)))
        assert set(zip(own.expert_i, own.expert_j, strict=True)) == expected


def test_stages_of_unequal_size_are_not_composed(tiny_model, shard):
    model, other = (tiny_model("cartesian", num_experts=E) for E in (4, 6))
    for block, larger in zip(model.trunk.blocks, other.trunk.blocks, strict=True):
        if hasattr(block.ffn, "stages"):
            block.ffn.stages[1] = larger.ffn.stages[1]
    assert {site.num_experts for site in as_adapter(model).sites()} == {4, 6}
    found = measure_overlap(model, shard, **QUIET)
    measured = {*found.sites.metric, *found.pairs.metric}
    assert not [name for name in measured if METRICS[name].kind == "composite"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metrics="cosine"), "metric is 'cosine'; choose one of .*'cka'"),
        (dict(metrics=[]), r"metrics is \[\]; name some of"),
        (dict(metrics=3), r"metrics is 3; name some of co_activation, lift"),
        (dict(metrics=METRICS["cka"]), r"metrics is <outputs, by pairs: .*; name some of"),
        (dict(confidence="x"), "confidence is 'x'; it must lie"),
        (
            dict(metrics="composite_a"),
            "metric for these sites of smoe is 'composite_a'; choose one of",
        ),
        (dict(sites="layer 7"), "sites is 'layer 7'; it must select routers"),
        (dict(sites="positions 0:3"), "sites is 'positions 0:3'"),
        (dict(probe="none"), "probe is 'none'; choose one of 'all', 'routed', 'either'"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(minibatch=3), "minibatch is 3; it must be at least 4"),
        (dict(seed=-1), "seed is -1; it must be at least 0"),
        (
            dict(metrics="transition", sites="layer 0"),
            "metric for these sites of smoe is 'transition'",
        ),
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
    with pytest.raises(ValueError, match=r"docs is a str; give what analysis\.documents returns"):
        measure_overlap(model_of("smoe"), "stdlib")
    of_others = dataclasses.replace(shard, tokens_SL=shard.tokens_SL + 13)
    with pytest.raises(ValueError, match=r"docs has token 2.*, and smoe a vocabulary of 13: take"):
        measure_overlap(model_of("smoe"), of_others)
    without = dataclasses.replace(shard, targets_SL=torch.full_like(shard.targets_SL, IGNORE))
    with pytest.raises(ValueError, match="docs has no token to measure on, which is"):
        measure_overlap(model_of("smoe"), without)
    single = shard[6:]  # one sequence of one token
    measure_overlap(model_of("smoe"), single, "load", **QUIET)
    with pytest.raises(ValueError, match=r"has no token .* a target: skip_first leaves"):
        measure_overlap(model_of("smoe"), single, "load", skip_first=True, **QUIET)
    with pytest.raises(ValueError, match="metric for these sites of hash is 'router_cosine'"):
        measure_overlap(model_of("hash"), shard, "router_cosine")


def test_a_line_says_what_it_is(model_of, shard):
    assert repr(shard) == "Sequences(7 x 8, 41 tokens of 4 documents; domains x, y)"
    found = measure_overlap(model_of("smoe"), shard, ["load", "gini"], **QUIET)
    sites, experts = len(found.sites), len(found.experts)
    assert repr(found) == (
        f"Overlap of smoe: {experts} rows of experts, {sites} rows of sites, 0 rows of pairs; "
        "metrics load, gini"
    )


def test_join_tells_models_apart(model_of, shard):
    own = [measure_overlap(model_of("smoe"), shard, name, **QUIET) for name in ("load", "gini")]
    assert set(Overlap.join(own).experts.metric) == {"load"}  # of one model, in two parts
    with pytest.raises(ValueError, match="overlaps has two of 'smoe', train_seed 0, with the same"):
        Overlap.join([own[0], own[0]])
    with pytest.raises(ValueError, match="overlaps is empty"):
        Overlap.join([])


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
    early, late = (everything.pairs.assign(step=step) for step in (100, 200))
    none = everything.experts[:0]
    np.testing.assert_array_equal(Overlap(none, none, early).matrix("cka", 0), square)
    run = Overlap(none, none, pd.concat([early, late]))
    with pytest.raises(ValueError, match=r"step has several values, \[100, 200\]; take one"):
        run.matrix("cka", 0)
