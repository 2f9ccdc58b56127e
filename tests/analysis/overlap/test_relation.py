"""Experts dropped one at a time: damage, who takes over, and overlap with those."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from analysis.adapters.base import as_adapter
from analysis.adapters.cartmoe import CartMoEAdapter
from analysis.measure.sweep import sweep
from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics.catalogue import METRICS
from analysis.overlap.relation import PREDICTORS, Relation, _with_heirs, relate
from analysis.overlap.removal import expert_damage, halves, shares_of, takeover
from analysis.perturb.condition import Condition
from analysis.perturb.masks import DropExperts
from analysis.stats.bootstrap import Bootstrap
from analysis.stats.relation import relation as relation_table
from cartmoe.data import IGNORE, Sequences
from cartmoe.ffn import RoutedStage
from cartmoe.hooks import RouterSite, capture_routing, router_sites

QUIET = dict(progress=False)
FEW = dict(progress=False, bootstrap=Bootstrap(resamples=99))
SITE = ["layer", "stage"]
KINDS = ["smoe", "hash", "top_p", "cartesian", "sigmoid", "top1", "raw"]


@pytest.fixture(scope="module")
def docs() -> Sequences:
    """480 tokens in twelve documents, some padded."""
    rows = torch.randint(1, 13, (24, 21), generator=torch.Generator().manual_seed(4))
    padded = torch.arange(20) >= torch.tensor([20, 14] * 12)[:, None]
    names = [f"doc{i // 2}" for i in range(24)]
    return Sequences(
        rows[:, :-1], rows[:, 1:].masked_fill(padded, IGNORE), torch.arange(24), names, names,
        torch.full((24,), 20),
    )  # fmt: skip


def clean_routings(model, docs):
    """By site the clean decision about each token that counts: weights of all experts (T, E), and
    logits (T, E), with a loop over slots."""
    with torch.no_grad(), capture_routing(model.model) as captured:
        model.model(docs.tokens_SL)
    counts_T, found = (docs.targets_SL != IGNORE).flatten(), {}
    for site, (routing,) in captured.items():
        logits_TE, _, ids_TK, weights_TK = (t[counts_T] for t in routing)
        weights_TE = np.zeros(logits_TE.shape)
        for t in range(len(ids_TK)):
            for id, weight in zip(ids_TK[t].tolist(), weights_TK[t].tolist(), strict=True):
                weights_TE[t, id] += weight
        found[site] = weights_TE, logits_TE
    return found


def nll_by_document(model, docs, site=None, change=None) -> pd.Series:
    """With a hook of the test's own on the router."""
    handles = []
    if site is not None:
        router = router_sites(model.model)[site]
        handles.append(router.register_forward_hook(lambda r, a, out: change(router, out)))
    with torch.no_grad():
        logits = model.model(docs.tokens_SL).double()
    for handle in handles:
        handle.remove()
    nll_SL = F.cross_entropy(
        logits.transpose(1, 2), docs.targets_SL, ignore_index=IGNORE, reduction="none"
    )
    return pd.Series(nll_SL.sum(1).numpy()).groupby(docs.document_id).sum()


def refilled(expert):
    def change(router, routing):
        logits_TE = routing.logits_TE.clone()
        logits_TE[:, expert] = -torch.inf
        return router.route(logits_TE)

    return change


def lost(expert):
    def change(router, routing):
        return routing._replace(weights_TK=routing.weights_TK * (routing.ids_TK != expert))

    return change


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_by_hand(kind, refill, model_of, docs):
    model, docs = model_of(kind), docs[:12]
    table = expert_damage(model, docs, refill=refill, batch_size=10, **FEW)
    clean, routings = nll_by_document(model, docs), clean_routings(model, docs)
    tokens = docs.num_tokens
    half_of = halves(docs.document_id)
    tokens_of = pd.Series((docs.targets_SL != IGNORE).sum(1).numpy()).groupby(docs.document_id)
    tokens_of = tokens_of.sum()
    assert len(table) == sum(site.num_experts for site in model.sites())
    for site in model.sites():
        weights_TE = routings[site][0]
        rows = table[(table.layer == site.layer) & (table.stage == site.stage)]
        assert rows.expert.tolist() == list(range(site.num_experts))
        np.testing.assert_allclose(rows.mass, weights_TE.sum(0) / tokens, rtol=1e-5)
        used_E = (weights_TE > 0).sum(0)
        np.testing.assert_allclose(rows.load, used_E / used_E.sum())
        for row in rows.iloc[[0, 3]].itertuples():
            change = (refilled if refill else lost)(row.expert)
            rise = nll_by_document(model, docs, site, change) - clean
            assert row.damage == pytest.approx(rise.sum() / tokens, abs=2e-6)
            mass = weights_TE[:, row.expert].sum()
            if mass > 0:
                assert row.per_mass == pytest.approx(rise.sum() / mass, abs=2e-4)
            for half, name in enumerate("ab"):
                own = [d for d in rise.index if half_of[d] == half]
                expected = rise[own].sum() / tokens_of[own].sum()
                assert getattr(row, f"damage_{name}") == pytest.approx(expected, abs=4e-6)
    assert (table.num_documents == 6).all()
    assert (table.num_tokens == tokens).all()


def test_damage_is_that_of_a_sweep(model_of, docs):
    model = model_of("cartesian")
    table = expert_damage(model, docs, sites="layer 0 stage 1", **QUIET)
    assert table[SITE].drop_duplicates().to_numpy().tolist() == [[0, 1]]
    conditions = [
        Condition(DropExperts(ids=(row.expert,)), "layer 0 stage 1") for row in table.itertuples()
    ]
    damage = sweep(model, docs, conditions, controls=False, progress=False).damage(full=True)
    for name, column in (("delta_nats", "damage"), ("low", "damage_low"), ("high", "damage_high")):
        np.testing.assert_allclose(table[column], damage[name], rtol=1e-12)
    # With top-k nothing but the dropped expert loses its weight for good.
    np.testing.assert_allclose(table.mass, damage.mass_lost, rtol=1e-6)


def test_halves_are_measured_as_if_alone(model_of, docs):
    model, half_of = model_of("smoe"), halves(docs.document_id)
    table = expert_damage(model, docs, **FEW)
    for half, name in enumerate("ab"):
        rows = [i for i, document in enumerate(docs.document_id) if half_of[document] == half]
        assert len(rows) == 12
        own = expert_damage(model, docs.take(rows), **FEW)
        for column in ("damage", "per_mass"):
            np.testing.assert_allclose(table[f"{column}_{name}"], own[column], atol=1e-6)


def test_one_document_has_no_second_half(model_of, docs):
    table = expert_damage(model_of("smoe"), docs[:2], **FEW)
    assert table.damage_a.notna().all()
    nothing = ["damage_b", "per_mass_b", "damage_low", "damage_high"]
    assert table[nothing].isna().all(axis=None)


def test_batches_do_not_matter(model_of, docs):
    a, b = (expert_damage(model_of("smoe"), docs, batch_size=n, **FEW) for n in (5, 24))
    pd.testing.assert_frame_equal(a, b, atol=1e-6)
    a, b = (takeover(model_of("smoe"), docs, batch_size=n) for n in (5, 24))
    pd.testing.assert_frame_equal(a, b, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_takeover_by_a_loop_over_tokens(kind, model_of, docs):
    model = model_of(kind)
    table = takeover(model, docs, batch_size=7)
    assert (table.expert_i != table.expert_j).all()
    sums = table.groupby(["layer", "stage", "expert_i"]).takeover.sum(min_count=1)
    np.testing.assert_allclose(sums.dropna(), 1)
    assert sums.notna().mean() > 0.5
    for site, (weights_TE, logits_TE) in clean_routings(model, docs).items():
        router = router_sites(model.model)[site]
        for dropped in (0, 4):
            gained_E = np.zeros(site.num_experts)
            for w_E, z_E in zip(weights_TE, logits_TE, strict=True):
                if w_E[dropped]:
                    z_E = z_E.clone()
                    z_E[dropped] = -torch.inf
                    _, _, ids, weights = router.route(z_E[None])
                    after_E = np.zeros(site.num_experts)
                    np.add.at(after_E, ids[0].numpy(), weights[0].detach().numpy())
                    gained_E += np.maximum(after_E - w_E, 0)
            rows = table[(table[SITE] == [site.layer, site.stage]).all(axis=1)]
            rows = rows[rows.expert_i == dropped]
            expected = np.delete(gained_E, dropped) / (gained_E.sum() or np.nan)
            np.testing.assert_allclose(rows.takeover, expected, atol=1e-5)


def routed_stages(model):
    return [module for module in model.modules() if isinstance(module, RoutedStage)]


@pytest.fixture
def twins(tiny_model):
    """Expert 4 is a copy of expert 1 in all layers, row of the gate and all."""
    model = tiny_model("smoe", top_k=1, renormalize=True)
    with torch.no_grad():
        for stage in routed_stages(model):
            for weight in (stage.router.gate.weight, *stage.experts.parameters()):
                weight[4] = weight[1]
    return as_adapter(model)


def test_a_copy_takes_over_and_nothing_is_lost(twins, docs):
    table, heirs = expert_damage(twins, docs, **FEW), takeover(twins, docs)
    pair = table.expert.isin([1, 4])
    np.testing.assert_allclose(table[pair].damage, 0, atol=1e-7)
    assert (table[pair].groupby(SITE).mass.sum() > 0).all()
    assert table[~pair].damage.abs().max() > 1e-3
    # Which of them a token prefers is a matter of rounding: one may never be in use.
    for dropped, heir in ((1, 4), (4, 1)):
        own = heirs[(heirs.expert_i == dropped) & heirs.takeover.notna()]
        assert own.takeover.tolist() == [float(j == heir) for j in own.expert_j]
        assert (len(own) > 0) == (table[table.expert == dropped].mass > 0).any()


def test_relabelled_experts(tiny_model, docs):
    model, moved = (tiny_model("smoe") for _ in range(2))
    order = [3, 0, 5, 1, 2, 4]
    with torch.no_grad():
        for stage in routed_stages(moved):
            for weight in (stage.router.gate.weight, *stage.experts.parameters()):
                weight.copy_(weight[order])
    a, b = (expert_damage(m, docs, **FEW) for m in (model, moved))
    b = b.assign(expert=np.take(order, b.expert)).sort_values(["layer", "expert"])
    pd.testing.assert_frame_equal(a, b.reset_index(drop=True), atol=2e-5, rtol=1e-3)
    a, b = (takeover(m, docs) for m in (model, moved))
    b = b.assign(**{e: np.take(order, b[e]) for e in ("expert_i", "expert_j")})
    b = b.sort_values(["layer", "expert_i", "expert_j"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(a, b, atol=1e-6)


@pytest.fixture(scope="module")
def models(tiny_model):
    """Two families, one of which has no rows of a gate; two seeds of one of them."""
    return [
        CartMoEAdapter(tiny_model(family, seed=seed), train_seed=seed)
        for family, seed in (("smoe", 0), ("smoe", 1), ("hash", 0))
    ]


METRIC_NAMES = ("cka", "matched_cosine", "router_cosine", "co_activation", "token_js")


@pytest.fixture(scope="module")
def related(models, docs) -> Relation:
    return relate(iter(models), docs, METRIC_NAMES, **FEW)


def test_overlap_with_those_that_take_over(related, models, docs):
    """In another way: tables of pairs merged, and sums of a group."""
    for model in models:
        own = related.experts[
            (related.experts.model == model.name) & (related.experts.train_seed == model.train_seed)
        ]
        heirs = takeover(model, docs)
        for metric in METRIC_NAMES:
            if metric == "router_cosine" and model.family == "hash":
                assert own[metric].isna().all()
                continue
            pairs = measure_overlap(model, docs, metric, batch_size=16, **QUIET).table(metric)
            both = heirs.merge(pairs, on=[*SITE, "expert_i", "expert_j"], validate="one_to_one")
            both["product"] = (both.takeover * both.value).where(both.takeover != 0, 0.0)
            sums = both.groupby([*SITE, "expert_i"])["product"].sum(skipna=False)
            sign = -1 if metric == "token_js" else 1
            np.testing.assert_allclose(own[metric], sign * sums, rtol=1e-9)


def test_what_it_holds(related, models, docs):
    assert related.metrics == METRIC_NAMES
    experts = related.experts.drop(columns=list(METRIC_NAMES))
    expected = pd.concat([expert_damage(m, docs, **FEW) for m in models], ignore_index=True)
    pd.testing.assert_frame_equal(experts, expected)
    heirs = pd.concat([takeover(m, docs) for m in models], ignore_index=True)
    pd.testing.assert_frame_equal(related.takeover, heirs)
    assert set(related.overlap.pairs.metric) == set(METRIC_NAMES)


def test_its_table(related):
    table = related.table("damage", bootstrap=Bootstrap(resamples=99))
    expected = relation_table(
        related.experts, METRIC_NAMES, "damage", bootstrap=Bootstrap(resamples=99)
    )
    pd.testing.assert_frame_equal(table, expected)
    assert table.model.unique().tolist() == ["all", "smoe", "hash"]
    row = table[(table.model == "all") & (table.metric == "router_cosine")].squeeze()
    assert (row.num_models, row.num_sites, row.min_seeds) == (2, 4, 2)
    hashed = table[(table.model == "hash") & (table.metric == "router_cosine")].squeeze()
    assert np.isnan(hashed.r)
    assert hashed.num_sites == 0
    assert (
        related.table(metrics="cka", bootstrap=Bootstrap(resamples=9)).metric.tolist()
        == ["cka", "load"] * 3
    )


def test_composites_of_many_experts_do_not_fit(tiny_model, docs):
    """Of the first few alone, heirs would not be known."""
    model = tiny_model("cartesian", num_experts=18)
    found = relate(model, docs, ["composite_cka", "flat_cosine"], sites="layer 0", **FEW)
    assert found.experts.composite_cka.isna().all()
    assert set(found.overlap.pairs.metric) == {"flat_cosine"}
    with pytest.raises(ValueError, match="metric for these sites of cartesian is 'composite_cka'"):
        measure_overlap(model, docs, "composite_cka", **QUIET)


def test_one_model_and_what_is_measured_by_default(tiny_model, docs):
    found = relate(tiny_model("cartesian"), docs, sites="layer 0", **FEW)
    assert found.metrics == PREDICTORS
    assert all(METRICS[name].table == "pairs" for name in PREDICTORS)
    assert "function" not in {METRICS[name].kind for name in PREDICTORS}
    assert found.experts[list(PREDICTORS)].notna().any().all()
    assert found.experts[SITE].drop_duplicates().to_numpy().tolist() == [[0, 0], [0, 1]]


def test_twins_have_all_in_common(twins, docs):
    found = relate(twins, docs, ["matched_cosine", "flat_cosine", "router_cosine"], **FEW)
    first = found.experts[found.experts.expert == 1]
    np.testing.assert_allclose(first[list(found.metrics)], 1, atol=1e-5)


def test_one_expert_has_no_heir(tiny_model, docs):
    model = tiny_model("cartesian", num_experts=1, top_k=(1, 1))
    with pytest.raises(ValueError, match="of cartesian: one expert, nobody can take over"):
        relate(model, docs, **FEW)


def test_an_overlap_that_is_not_known_is_not_none():
    """Of those that take over; of those that do not it does not matter."""
    share_EE = shares_of(np.array([[0.0, 1, 1], [1, 0, 0], [1, 1, 0]]))
    overlap_EE = np.array([[np.nan, 0.2, np.nan], [0.4, np.nan, np.nan], [0.6, 0.2, np.nan]])
    overlap = SimpleNamespace(matrix=lambda metric, layer, stage: overlap_EE)
    found_E = _with_heirs({RouterSite("router", 0, 0, 3, 1): share_EE}, overlap, "cka")
    np.testing.assert_allclose(found_E, [np.nan, 0.4, 0.4])


def test_parameters_are_handed_on(model_of, docs):
    model, wide = model_of("smoe"), dict(bootstrap=Bootstrap(confidence=0.5, resamples=99))
    found = relate(model, docs, "cka", probe="routed", refill=False, **wide, **QUIET)
    damage = expert_damage(model, docs, refill=False, **wide, **QUIET)
    pd.testing.assert_frame_equal(found.experts[damage.columns], damage)
    how = dict(probe="routed", confidence=0.5, batch_size=16)
    expected = measure_overlap(model, docs, "cka", **how, **QUIET)
    pd.testing.assert_frame_equal(found.overlap.pairs, expected.pairs)


def test_bad_arguments(models, model_of, docs):
    with pytest.raises(ValueError, match="dense has no router"):
        expert_damage(model_of("dense"), docs)
    with pytest.raises(ValueError, match="docs has no sequence"):
        takeover(models[0], docs[:0])
    with pytest.raises(ValueError, match="sites is 'layer 9'"):
        expert_damage(models[0], docs, sites="layer 9")
    with pytest.raises(ValueError, match="batch_size is 0"):
        takeover(models[0], docs, batch_size=0)
    damaging = [name for name, metric in METRICS.items() if metric.kind == "function"]
    assert damaging
    with pytest.raises(ValueError, match=f"'{damaging[0]}', which is damage itself"):
        relate(models[0], docs, ["cka", damaging[0]])
    with pytest.raises(ValueError, match="metric is 'transition'; choose one of"):
        relate(models[0], docs, "transition")
    with pytest.raises(ValueError, match="metrics is \\(\\); name some of"):
        relate(models[0], docs, ())
    with pytest.raises(ValueError, match="models is empty"):
        relate([], docs)
    with pytest.raises(ValueError, match="models is a dict; give models, or a list of them"):
        relate({"a": models[0]}, docs)
    with pytest.raises(ValueError, match="models has one called 'all'"):
        relate(CartMoEAdapter(models[0].model, name="all"), docs, **FEW)
    with pytest.raises(ValueError, match="models has none that they fit"):
        relate(models[2], docs, "router_cosine", sites="layer 0", **FEW)
    with pytest.raises(ValueError, match="models has two called 'smoe' of train_seed 0"):
        relate([models[0], models[0]], docs, "flat_cosine", sites="layer 0", **FEW)
