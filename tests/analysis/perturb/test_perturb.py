"""The contract that every perturbation of the catalogue keeps.

What each one does is tested in test_masks, test_logits, test_decisions, test_compound, test_worst;
Replay and GateSwap, which need another run, in test_trace.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.measure.shard import measure
from analysis.perturb.base import Identity, Perturbation
from analysis.perturb.catalogue import PERTURBATIONS
from analysis.perturb.compound import Compose
from analysis.perturb.condition import POINTS, Condition
from analysis.perturb.decisions import Lag, TopK, UniformWeights
from analysis.perturb.masks import DropExperts, DropUnchosen, KeepRanks
from cartmoe.routing import Routing

from ..examples import EACH, EACH_MEASURED, EXAMPLES, MEASURED, OWN_EXAMPLES
from ..routers import IDS_B, KINDS, RENORMALIZED, TOKENS_BL, router_of, routings

KIND = pytest.mark.parametrize("kind", KINDS)
POINT = pytest.mark.parametrize("point", POINTS)


def test_every_perturbation_has_examples():
    assert EXAMPLES.keys() | MEASURED.keys() | OWN_EXAMPLES == PERTURBATIONS.keys()
    assert OWN_EXAMPLES.isdisjoint(EXAMPLES)
    for name, cls in PERTURBATIONS.items():
        assert cls.__name__ == name
        assert cls.__doc__
        assert issubclass(cls, Perturbation)


# ---- maps of logits and of decisions


@EACH
@KIND
def test_contract(model_of, calibration_of, kind, p):
    """Pure and total: shapes and dtypes stay, inputs stay as they are, nothing becomes NaN; and it
    changes what it expects to."""
    model = model_of(kind)
    for point in points_of(p):
        pairs = check_contract(model, p, point, calibration_of(model))
        before, after = map(DenseRouting, pairs[-1])  # the last router: some look back
        if has_no_effect(p, kind):
            # Where weights are no shares of the chosen, those of the others are in their sum.
            if point == "scores" or kind in RENORMALIZED:
                torch.testing.assert_close(after.weights_TE, before.weights_TE)
        elif p.expects == "selection":
            assert (before.used_TE != after.used_TE).any(-1).double().mean() > 0.05
        else:
            assert not after.weights_TE.allclose(before.weights_TE, rtol=1e-4)


def points_of(p) -> tuple[str, ...]:
    """A change of the decision knows no point."""
    return POINTS[:1] if hasattr(p, "decide") else POINTS


def has_no_effect(p, kind) -> bool:
    """Where it cannot change what it expects, by its very definition."""
    return {
        UniformWeights: kind == "top1",  # one weight is its own mean
        TopK: kind == "top1" and p == TopK(1),
        KeepRanks: kind == "top1" and p == KeepRanks((1, 3, 4)),
        Lag: kind == "hash" and getattr(p, "over", "") == "sites",  # all layers share one table
        DropUnchosen: True,
        Identity: True,
    }.get(type(p), False)


def check_contract(model, p, point, stats) -> list[tuple[Routing, Routing]]:
    """By site: what the perturbation was given, and what it made of it."""
    seen = []

    def spy(routing, router, site, x_TD):
        seen.append((routing, [t.clone() for t in routing]))

    with model.hooked(router=spy):  # hooked first, so it sees what the perturbation is given
        out, decisions = routings(model, p, point=point, stats=stats)
    assert out.isfinite().all()
    for (given, before), changed in zip(seen, decisions.values(), strict=True):
        assert all(map(torch.equal, given, before))
        for a, b in zip(given, changed, strict=True):
            assert (a.dtype, a.device, len(a)) == (b.dtype, b.device, len(b))
        assert changed.logits_TE.shape == changed.scores_TE.shape == given.logits_TE.shape
        assert changed.ids_TK.shape == changed.weights_TK.shape
        assert ((changed.ids_TK >= 0) & (changed.ids_TK < given.logits_TE.shape[-1])).all()
        assert not any(t.isnan().any() for t in changed)
        assert ((changed.weights_TK >= 0) & changed.weights_TK.isfinite()).all()
        assert (changed.logits_TE < math.inf).all()
    return [(given, changed) for (given, _), changed in zip(seen, decisions.values(), strict=True)]


@KIND
def test_identity_is_exact(model_of, kind):
    model = model_of(kind)
    with torch.no_grad():
        clean = model.model(TOKENS_BL)
    for p in {p.identity(): None for some in EXAMPLES.values() for p in some}:
        for point in points_of(p):
            out, _ = routings(model, p, point=point)
            assert out.equal(clean), p


@EACH
def test_identity_returns_the_very_decision(context_of, p):
    router = router_of()
    clean, ctx = context_of(router, torch.randn(5, 6))
    for point in POINTS:
        assert Condition(p.identity(), point=point).apply(clean, router, ctx) is clean


@EACH
@pytest.mark.parametrize("kind", ["hash", "top_p", "cartesian"])
def test_a_pure_function_of_its_key(model_of, calibration_of, kind, p):
    """Again the same to the last bit, whatever the global generator gives; the same decisions for
    a row in any batch and order (inputs agree up to rounding, and so do decisions but for near
    ties)."""
    for point in points_of(p):
        check_key(model_of(kind), p, point, calibration_of(model_of(kind)))


def check_key(model, p, point, stats):
    _, whole = routings(model, p, point=point, stats=stats)
    torch.manual_seed(123)
    site, *_, last = whole
    _, again = routings(model, p, point=point, stats=stats)
    assert all(map(torch.equal, whole[last], again[last]))
    order = [3, 0, 5]
    _, some = routings(model, p, TOKENS_BL[order], IDS_B[order], point=point, stats=stats)
    for a, b in zip(whole[site], some[site], strict=True):  # later ones magnify the rounding
        a = a.view(6, 8, -1)[order].flatten(0, 1)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("kind", ["top_p", "cartesian", "sigmoid"])
def test_keeps_out_what_a_mask_before_it_has_taken_away(model_of, calibration_of, kind, p):
    """No NaN, and nobody comes back, but where another router's decision is taken over."""
    model = model_of(kind)
    both = Compose((DropExperts(ids=[1, 4]), *(p.parts if isinstance(p, Compose) else (p,))))
    for point in POINTS:
        pairs = check_contract(model, both, point, calibration_of(model))
        for _, changed in pairs:
            if not (isinstance(p, Lag) and p.over == "sites"):
                assert not DenseRouting(changed).used_TE[:, [1, 4]].any()


@EACH
@POINT
def test_all_experts_gone_before_it(context_of, p, point):
    for options in ({}, dict(top_p=0.4), dict(score="sigmoid")):
        router = router_of(**options)
        logits_TE = torch.full((7, 6), -math.inf)
        stats = stats_of(torch.randn(9, 6))
        clean, ctx = context_of(router, logits_TE, stats=stats)
        changed = Condition(p, point=point).apply(clean, router, ctx)
        assert not any(t.isnan().any() for t in changed)
        assert (changed.weights_TK == 0).all()


def stats_of(reservoir_RE):
    from analysis.perturb.context import SiteStats

    E = reservoir_RE.shape[-1]
    return SiteStats(reservoir_RE, 1.0, torch.ones(E) / E)


# ---- through measure


@EACH_MEASURED
@KIND
def test_measured_contract(model_of, calibration_of, shard, kind, p):
    model = model_of(kind)
    calibration = calibration_of(model)
    conditions = [Condition(p, point=point) for point in points_of(p)]
    conditions += [Condition(p.identity(), "layer 0")]
    clean, *cells, identity = measure(model, conditions, shard, calibration=calibration)
    pd.testing.assert_frame_equal(identity.losses, clean.losses, check_exact=True)
    for cell in cells:
        assert np.isfinite(cell.losses[["nll_sum", "kl_sum"]].to_numpy()).all()
        assert np.isfinite(cell.routing.select_dtypes("number").to_numpy()).all()
        dose = {"selection": "flips", "output": "output_change"}[p.expects]
        assert cell.routing[dose].sum() > 0


@EACH_MEASURED
@pytest.mark.parametrize("kind", ["top_p", "cartesian"])
def test_measured_does_not_depend_on_the_batch(model_of, calibration_of, shard, rows_of, kind, p):
    model = model_of(kind)
    options = dict(calibration=calibration_of(model), reuse=())
    condition = Condition(p, "layer 2")
    order = [4, 2, 0, 6, 5, 1, 3]
    _, whole = measure(model, [condition], shard, **options)
    _, again = measure(model, [condition], shard, **options)
    pd.testing.assert_frame_equal(again.losses, whole.losses, check_exact=True)
    _, parts = measure(model, [condition], rows_of(shard, order), batch_size=3, **options)
    for column in ("nll_sum", "kl_sum"):
        np.testing.assert_allclose(
            parts.losses[column], whole.losses[column].to_numpy()[order], rtol=1e-3, atol=1e-4
        )
