"""The protocol is one: a model that is no cartmoe's gets all that the compact models get."""

import numpy as np
import pytest
import torch

import analysis as an
from analysis.adapters import DenseRouting, Given, as_adapter, clean_routing, run
from analysis.perturb import PERTURBATIONS, Clean
from cartmoe.data import Sequences

from ..examples import ALL, name_of
from .other_moe import OtherAdapter, build

QUIET = dict(progress=False)


@pytest.fixture(scope="module")
def docs() -> Sequences:
    rows = torch.randint(1, 13, (12, 11), generator=torch.Generator().manual_seed(3))
    names = [f"d{i // 2}" for i in range(12)]
    domains = [f"x{i // 4}" for i in range(12)]
    return Sequences(
        rows[:, :-1], rows[:, 1:], torch.arange(12) + 5, names, domains, torch.full((12,), 10)
    )


def test_it_derives_from_nothing_of_ours():
    assert OtherAdapter.__mro__ == (OtherAdapter, object)
    model = build()
    assert as_adapter(model) is model
    assert type(model.router(model.sites()[0])).__mro__[1:] == (object,)


def test_segments_are_the_model(docs):
    model = build()
    hidden_BLD = run(model.segments(), docs.tokens_SL).hidden_BLD
    with torch.no_grad():
        torch.testing.assert_close(model.logits(hidden_BLD), model.model(docs.tokens_SL))


def test_a_sweep_with_controls(docs):
    model = build()
    before = clean_routing(model, docs.tokens_SL)
    asked = [an.DropTop(1), an.GaussianNoise(1.0), an.TopK(3), an.Worst(1)]
    results = an.sweep(model, docs, asked, batch_size=4, tokens=True, **QUIET)
    damage = results.damage(full=True).set_index("label")
    assert np.isfinite(damage.delta_nats).all()
    assert damage.delta_nats["Identity"] == damage.kl["Identity"] == 0
    # Groups, bias and scale included: the best expert of the chosen group is never used again.
    assert damage.mass_lost["DropTop(1)"] > 0.3
    assert damage.active["TopK(3)"] == 3
    assert damage.delta_nats["Worst(1)"] > 0
    assert (results.clean().family == "other").all()
    after = clean_routing(model, docs.tokens_SL)
    assert all(map(torch.equal, before[model.sites()[1]], after[model.sites()[1]]))
    assert not any(model._hooks())
    residual = [an.DropTop(1), an.ResidualNoise(an.DropTop(1))]
    first = an.sweep(model, docs, residual, where="layer 0", controls=False, **QUIET).damage(
        full=True
    )
    assert first.output_change[0] == pytest.approx(first.output_change[1], rel=1e-4)


# (One names layers that this model does not have.)
@pytest.mark.parametrize("p", [p for p in ALL if "layer 2" not in p.label], ids=name_of)
def test_every_perturbation_acts(docs, p):
    model = build()
    # Noise on log scores has no bound where weights are not renormalized.
    points = ("logits",) if isinstance(p, an.GaussianNoise | an.GumbelNoise) else p.points
    conditions = [
        an.Condition(p, point=point, downstream=downstream)
        for point in points
        for downstream in ("reroute", "replay")
    ]
    damage = an.sweep(model, docs, conditions, controls=False, batch_size=4, **QUIET).damage(
        full=True
    )
    assert np.isfinite(damage.delta_nats).all()
    dose = {"selection": "changed", "weights": "mass_moved", "output": "output_change"}
    if p.expects in dose:
        assert (damage[dose[p.expects]] > 0).all()
    assert type(p).__name__ in PERTURBATIONS


def test_a_mask_leaves_nobody_who_was_masked(docs):
    """Where a whole group is masked too."""
    model = build()
    site = model.sites()[0]
    router = model.router(site)
    logits_TE = torch.randn(50, 6)
    logits_TE[:, [0, 1, 2, 4]] = -torch.inf
    routing = router.decide(logits_TE, router.score(logits_TE))
    used_TE = DenseRouting(routing).used_TE
    assert not used_TE[:, [0, 1, 2, 4]].any()
    assert used_TE.any(-1).all()


def test_a_split_and_a_cascade(docs):
    drop = an.DropTop(1)
    arms = [*an.split_arms(drop), *an.cascade_arms(drop), *an.site_arms(build(), drop)]
    results = an.sweep(build(), docs, arms, controls=False, batch_size=4, **QUIET)
    split = results.split("DropTop(1)").set_index("part").delta_nats
    assert split[["set", "weights", "mass"]].sum() == pytest.approx(split["full"])
    assert split["full"] != 0
    assert set(results.cascade().part) == {"reroute", "replay", "cascade"}
    assert set(results.additivity().part) >= {"layer 0 stage 0", "layer 1 stage 0", "joint"}


def test_overlap_and_its_relation(docs):
    model = build()
    overlap = an.measure_overlap(model, docs, batch_size=2, **QUIET)
    measured = {*overlap.pairs.metric, *overlap.experts.metric, *overlap.sites.metric}
    fitting = {n for n, m in an.METRICS.items() if m.kind not in ("function", "composite")}
    assert measured == fitting
    cka_EE = overlap.matrix("cka", 1)
    assert np.isfinite(cka_EE[~np.eye(6, dtype=bool)]).all()
    relation = an.relate(model, docs, ["cka", "lift", "router_cosine"], batch_size=4, **QUIET)
    assert np.isfinite(relation.experts.damage).all()
    pairs = an.substitution(model, docs, model.sites()[1], lowest=3, random=27, **QUIET)
    assert an.calibration(pairs).rank_correlation.iloc[0] > 0.8


def test_other_measurements(docs, tmp_path):
    model = build()
    trace = an.Trace.record(model, docs, tmp_path / "trace", batch_size=4, **QUIET)
    replayed = an.sweep(build(1), docs, [an.Replay(trace)], controls=False, **QUIET).damage(
        full=True
    )
    assert replayed.flips.iloc[0] > 0
    same = an.sweep(model, docs, [an.Replay(trace)], controls=False, **QUIET).damage(full=True)
    assert same.delta_nats.iloc[0] == pytest.approx(0, abs=1e-6)
    regret = an.regret(model, docs, model.sites()[0], n=4, batch_size=4, **QUIET)
    assert (regret.regret.diff().dropna() >= 0).all()
    flips = an.flip_prediction(model, docs, 1.0, draws=4, batch_size=4)
    assert set(flips.predicted_by) == {"simulation"}
    comparison = an.compare({"a": model, "b": build(1)}, docs, [an.GateSwap("a")], **QUIET)
    assert comparison.drift().flips.iloc[0] > 0
    text = an.generation_agreement(model, docs, an.DropTop(1), prompt=4, new=4, **QUIET)
    assert text["equal"].between(0, 1).all()
    assert isinstance(an.sweep(model, docs, []).losses.perturbation.iloc[0], str)
    assert Clean().label == "clean"


def test_with_a_block_of_ones_own(docs):
    model = build()
    with torch.no_grad(), an.perturbed(model, an.DropTop(1), "layer 1") as fired:
        for hook, _ in model._forward:
            hook(Given.whole(docs.tokens_SL), None)
        changed = run(model.segments(), docs.tokens_SL).decisions
    clean = clean_routing(model, docs.tokens_SL)
    assert list(fired.values()) == [1]
    assert changed[0].ids_TK.equal(clean[model.sites()[0]].ids_TK)
    assert not changed[1].ids_TK.equal(clean[model.sites()[1]].ids_TK)
