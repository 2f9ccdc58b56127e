"""Metrics of use, straight from recorded decisions: those that the model itself would give."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import analysis as an
from analysis.overlap import METRICS
from cartmoe.data import IGNORE

QUIET = dict(progress=False)
USAGE = [n for n, m in METRICS.items() if m.kind == "usage" and n != "router_entropy"]


@pytest.fixture
def trace_of(shard, tmp_path):
    """trace_of(model) -> its decisions on the shard."""
    return lambda model: an.Trace.record(model, shard, tmp_path / "t", **QUIET)


@pytest.fixture
def engines(shard, tmp_path):
    """engines(change) -> a trace of arrays, after `change` had them."""

    def build(change=lambda arrays: None, **options):
        rng = np.random.default_rng(0)
        lengths = (shard.targets_SL != IGNORE).sum(1).tolist()
        arrays = [rng.random((n, 3, 6)).argsort(-1)[..., :2] for n in lengths]
        change(arrays)
        options = dict(num_experts=6) | options
        return an.Trace.from_arrays(arrays, shard.sequence_id_S, tmp_path / "e", **options)

    return build


def columns(table):
    return table.drop(columns=["model", "family"])


@pytest.mark.parametrize("kind", ["smoe_share", "top_p", "cartesian", "parallel"])
@pytest.mark.parametrize("options", [{}, dict(skip_first=True, sites="layer 2", batch_size=1)])
def test_as_the_model_itself(model_of, shard, trace_of, kind, options):
    model = model_of(kind)
    expected = an.measure_overlap(model, shard, USAGE, **options, **QUIET)
    found = an.measure_overlap(trace_of(model), shard, USAGE, **options, **QUIET)
    for name, table in expected.tables.items():
        # Recorded in other batches, which round weights otherwise.
        pd.testing.assert_frame_equal(
            columns(found.tables[name]), columns(table), rtol=1e-4, atol=1e-6
        )
        assert (found.tables[name].model == "t").all()


def test_what_a_trace_tells(model_of, shard, trace_of, engines):
    def of(trace, docs=None):
        overlap = an.measure_overlap(trace, docs, **QUIET)
        return {m for table in overlap.tables.values() for m in table.metric}

    trace = trace_of(model_of("smoe_share"))
    assert of(trace, shard) == set(USAGE)
    of_domains = {"domain_specialization", "mi_domain", "mi_domain_given_token"}
    assert of(trace) == set(USAGE) - of_domains
    of_tokens = {"token_jaccard", "token_js", "vocabulary_specialization", "mi_token"}
    engine = set(USAGE) - of_domains - of_tokens - {"routed_weight", "committee"}
    assert of(engines()) == engine


def test_recorded_sequences_as_documents(model_of, shard, trace_of):
    """The same numbers as of documents, each of its own, but what speaks of them."""
    trace = trace_of(model_of("smoe_share"))
    own = an.measure_overlap(trace, None, ["load", "lift"], **QUIET)
    docs = an.measure_overlap(trace, shard, ["load", "lift"], **QUIET)
    for name in ("load", "lift"):
        np.testing.assert_array_equal(own.table(name).value, docs.table(name).value)


def test_against_counting_by_hand(engines):
    trace = engines()
    overlap = an.measure_overlap(trace, None, ["load", "co_activation"], **QUIET)
    ids_NK = trace.routing((1, 0)).ids_NK
    load = overlap.table("load").query("layer == 1").value
    np.testing.assert_allclose(load, np.bincount(ids_NK.ravel(), minlength=6) / ids_NK.size)
    used_NE = (ids_NK[..., None] == np.arange(6)).any(1)
    expected_EE = (used_NE.T @ used_NE.astype(float)) / used_NE.sum(0)[:, None]
    found_EE = overlap.matrix("co_activation", 1)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(found_EE[off], expected_EE[off])


def test_tokens_without_a_decision_are_left_out(shard, engines):
    def lose(arrays):
        arrays[0][:3] = 0
        arrays[1][2, 1] = -1  # at one site: the token counts at none

    trace = engines(lose, uncaptured="leave out")
    with pytest.warns(UserWarning, match="trace e has no decision for 4 of 41 tokens"):
        overlap = an.measure_overlap(trace, shard, "load", **QUIET)
    kept_N = np.ones(41, bool)
    kept_N[[0, 1, 2, 8 + 2]] = False
    for site in trace.places:
        ids_NK = trace.routing(site).ids_NK[kept_N]
        expected = np.bincount(ids_NK.ravel(), minlength=6) / ids_NK.size
        found = overlap.table("load").query(f"layer == {site.layer}").value
        np.testing.assert_allclose(found, expected)


def test_heatmaps(engines):
    overlap = an.measure_overlap(engines(), None, "co_activation", **QUIET)
    an.plots.overlap_heatmap(overlap, "co_activation")


def test_refusals(model_of, shard, engines, trace_of, tmp_path):
    with pytest.raises(ValueError, match=r"does not say how many experts .*num_experts=\.\.\."):
        an.measure_overlap(engines(num_experts=None), **QUIET)
    trace = trace_of(model_of("smoe_share"))
    for metrics in ("cka", "router_entropy", "flat_cosine", "substitution"):
        with pytest.raises(ValueError, match=f"metric for these sites of trace t is {metrics!r}"):
            an.measure_overlap(trace, shard, metrics, **QUIET)
    with pytest.raises(ValueError, match="is 'mi_domain'; choose one of"):
        an.measure_overlap(trace, None, "mi_domain", **QUIET)
    with pytest.raises(ValueError, match="sites is 'layer 7'; it must select routers of t"):
        an.measure_overlap(trace, shard, sites="layer 7", **QUIET)
    with pytest.raises(ValueError, match="docs is a str"):
        an.measure_overlap(trace, "docs", **QUIET)
    with pytest.raises(ValueError, match="docs is a NoneType"):
        an.measure_overlap(model_of("smoe_share"), None, "load", **QUIET)
    other = replace(shard, sequence_id_S=shard.sequence_id_S + 100)
    with pytest.raises(ValueError, match="has not recorded"):
        an.measure_overlap(trace, other, "load", **QUIET)


def test_rows_of_one_expert_are_said():
    with pytest.warns(UserWarning, match="for 2 of 3 tokens one expert in all slots"):
        an.overlap.usage.co_activation([[0, 0], [1, 2], [3, 3]], 4)
