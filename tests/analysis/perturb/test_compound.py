"""Perturbations made of others or of a function, and noise on the output in their place."""

import json

import numpy as np
import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.measure.intervene import perturbed
from analysis.measure.shard import measure
from analysis.perturb.base import Identity
from analysis.perturb.catalogue import perturbation_from_dict
from analysis.perturb.compound import Compose, Custom, ResidualNoise
from analysis.perturb.condition import POINTS, Condition
from analysis.perturb.context import SiteStats
from analysis.perturb.decisions import DropSlots, Lag, NoRouted, TopK, UniformWeights
from analysis.perturb.flips import Worst
from analysis.perturb.logits import GaussianNoise, Quantize, RandomRouting, SwapRanks
from analysis.perturb.masks import DropExperts, DropTop, DropUnchosen
from analysis.perturb.source import code_sha256
from cartmoe.hooks import capture_routing

from ..routers import OPTIONS, TOKENS_BL, decide, router_of, routings

POINT = pytest.mark.parametrize("point", POINTS)


# ---- Compose


@POINT
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_after_the_other(context_of, options, point):
    router, logits_TE = router_of(**options), torch.randn(50, 6)
    _, both = decide(router, Compose((DropTop(1), SwapRanks(1, 3))), logits_TE, context_of, point)
    clean, ctx = context_of(router, logits_TE)
    first = Condition(DropTop(1), point=point).apply(clean, router, ctx)
    second = Condition(SwapRanks(1, 3), point=point).apply(first, router, ctx)
    assert all(map(torch.equal, both, second))


def test_the_order_counts(context_of):
    router, logits_TE = router_of(), torch.randn(50, 6)
    a = decide(router, Compose((DropTop(1), SwapRanks(1, 2))), logits_TE, context_of)[1]
    b = decide(router, Compose((SwapRanks(1, 2), DropTop(1))), logits_TE, context_of)[1]
    assert not a.ids_TK.equal(b.ids_TK)


def test_each_part_takes_the_decision_so_far_for_the_clean_one(context_of):
    """ "Chosen" are those that are in use after the mask."""
    p = Compose((DropTop(2), GaussianNoise(1.0, scale="absolute", within="chosen")))
    router, logits_TE = router_of(), torch.randn(50, 6)
    _, dropped = decide(router, DropTop(2), logits_TE, context_of)
    _, got = decide(router, p, logits_TE, context_of)
    moved_TE = (got.logits_TE != logits_TE) & (got.logits_TE != -torch.inf)
    assert moved_TE.equal(DenseRouting(dropped).used_TE)


def test_parts_draw_independently(context_of):
    """Two draws of sigma 1 are one of sqrt 2, not one of 2."""
    logits_TE, unit = torch.zeros(4000, 6), GaussianNoise(1.0, scale="absolute")
    _, got = decide(router_of(), Compose((unit, unit)), logits_TE, context_of)
    assert got.logits_TE.std().item() == pytest.approx(2**0.5, rel=0.02)
    _, ctx = context_of(router_of(), logits_TE)
    first, second = (unit(logits_TE, ctx_of) for ctx_of in parts_of(ctx, 2))
    assert got.logits_TE.equal(first + second)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.02


def parts_of(ctx, number):
    from dataclasses import replace

    return [replace(ctx, noise=ctx.noise.stream(i)) for i in range(number)]


def test_nested_draws_are_independent_too(context_of):
    unit = GaussianNoise(1.0, scale="absolute")
    nested = Compose((Compose((unit, unit)), Compose((unit, unit))))
    _, got = decide(router_of(), nested, torch.zeros(4000, 6), context_of)
    assert got.logits_TE.std().item() == pytest.approx(2.0, rel=0.02)


def test_what_compose_says_of_itself():
    p = Compose((DropTop(1), Compose((GaussianNoise(0.5), UniformWeights()))))
    assert p.expects == "selection"
    assert Compose((UniformWeights(), NoRouted())).expects == "weights"
    assert Compose((Identity(), DropUnchosen())).expects == "none"
    assert p.label == "Compose(parts=DropTop 1+Compose parts=GaussianNoise 0.5+UniformWeights 1)"
    assert p == perturbation_from_dict(json.loads(json.dumps(p.to_dict())))
    assert p.identity() == Compose((DropTop(0), Compose((GaussianNoise(0.0), UniformWeights(0.0)))))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((DropSlots(), DropTop()), "parts has DropTop after DropSlots, which it would undo"),
        ((UniformWeights(), TopK(3)), "parts has TopK after UniformWeights"),
        ((Lag(), Custom(lambda z, ctx: -z, title="mine")), "parts has mine after Lag"),
        ((Compose((DropTop(), NoRouted())), GaussianNoise()), "GaussianNoise after NoRouted"),
        ((Worst(), DropTop()), "parts has DropTop after Worst"),
    ],
)
def test_what_would_be_undone_is_refused(parts, message):
    with pytest.raises(ValueError, match=f"{message}.*; put it before"):
        Compose(parts)


def test_with_statistics(context_of):
    stats = SiteStats(torch.randn(50, 6), 1.5, torch.arange(6) / 15)
    p = Compose(
        (DropExperts(1 / 3, "least_used"), RandomRouting(), Quantize("fp8"), DropSlots(0.5))
    )
    for point in POINTS:
        _, got = decide(router_of(), p, torch.randn(90, 6), context_of, point, stats=stats)
        used_TE = DenseRouting(got).used_TE
        assert not used_TE[:, :2].any()
        assert 0 < used_TE.sum() < 180


def test_compose_with_a_search_in_it(model_of, shard):
    """Flips found on the clean run, in the decision that the mask has left."""
    p = Compose((DropTop(1), Worst(1)))
    model = model_of("smoe_share")
    _, dropped, both = measure(model, [Condition(DropTop(1)), Condition(p)], shard)
    assert both.losses.nll_sum.sum() != dropped.losses.nll_sum.sum()
    assert np.isfinite(both.losses.nll_sum).all()


# ---- Custom


def flatten(logits_TE, ctx):
    """Of this module, so that it has a name to be imported by."""
    return logits_TE / 2


class Shift:
    """A callable object."""

    def __call__(self, logits_TE, ctx):
        return logits_TE + 1


def test_custom_is_its_function(context_of):
    logits_TE = torch.randn(20, 6)
    for function in (flatten, Shift(), lambda z, ctx: -z):
        p = Custom(function, title="mine")
        _, got = decide(router_of(), p, logits_TE, context_of)
        assert got.logits_TE.equal(function(logits_TE, None))
        assert json.dumps(p.to_dict())
        assert p.identity() == Identity()


def test_custom_by_name(tmp_path, monkeypatch, context_of):
    (tmp_path / "my_routing.py").write_text(
        "class Tools:\n    @staticmethod\n    def negate(z, ctx):\n        return -z\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    p = Custom("my_routing:Tools.negate", title="negate", version=2, changes="selection")
    assert p.to_dict() == {
        "name": "Custom",
        "function": "my_routing:Tools.negate",
        "source": code_sha256(p.function),
        "title": "negate",
        "version": 2,
        "changes": "selection",
    }
    assert (p.label, p.expects) == ("negate", "selection")
    again = perturbation_from_dict(json.loads(json.dumps(p.to_dict())))
    assert again == p
    assert again.function is p.function
    _, got = decide(router_of(), again, torch.randn(5, 6), context_of)
    assert got.logits_TE.equal(-decide(router_of(), Identity(), -got.logits_TE, context_of)[1][0])


def test_custom_is_known_by_function_title_and_version():
    a, b = Custom(flatten, title="mine"), Custom(flatten, title="mine")
    assert a == b
    assert a != Custom(lambda z, ctx: z, title="mine")  # a study refuses both beside each other
    assert a != Custom(flatten, title="mine", version=1)
    assert a != Custom(flatten, title="other")


# ---- ResidualNoise


@pytest.fixture
def stage_outputs():
    """stage_outputs(model, p, **options) -> by site, what the stage adds to the stream."""

    def run(model, p, **options):
        seen = {}

        def look(output_TD, site):
            seen[site] = output_TD

        options = dict(sequence_ids=torch.arange(len(TOKENS_BL))) | options
        with torch.no_grad(), perturbed(model, p, **options), model.hooked(output=look):
            model.model(TOKENS_BL)
        return seen

    return run


@pytest.mark.parametrize("kind", ["smoe", "smoe_share", "top_p", "cartesian", "hash"])
@pytest.mark.parametrize(
    "of", [DropTop(1), GaussianNoise(2.0), NoRouted(), Compose((DropTop(1), DropSlots(0.5)))]
)
def test_the_noise_is_as_long_as_the_intended_change(model_of, stage_outputs, kind, of):
    """Token by token, at a site whose input is the clean one; another direction."""
    model = model_of(kind)
    site = model.sites()[1]
    clean, noisy, changed = (
        stage_outputs(model, p, where=site)[site] for p in (Identity(), ResidualNoise(of), of)
    )
    added_TD, intended_TD = noisy - clean, changed - clean
    lengths = [d.norm(dim=-1) for d in (added_TD, intended_TD)]
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=1e-5)
    moved_T = lengths[1] > 1e-3
    cosine_T = torch.cosine_similarity(added_TD, intended_TD, dim=-1)[moved_T]
    assert cosine_T.abs().mean() < 0.5
    assert cosine_T.mean().abs() < 0.2  # any direction: 1 / sqrt(48 tokens * 16) is 0.04


def test_the_routing_stays(model_of):
    """And what is captured is the decision that was taken, once a site."""
    model = model_of("cartesian")
    site = model.sites()[0]
    _, clean = routings(model, Identity(), where=site)
    _, noisy = routings(model, ResidualNoise(DropTop(2)), where=site)
    assert all(map(torch.equal, clean[site], noisy[site]))


def test_noise_where_and_with_the_effect_of_the_condition(model_of, stage_outputs):
    model = model_of("smoe_share")
    site = model.sites()[0]

    def lengths(p, **options):
        clean = stage_outputs(model, Identity(), where=site)[site]
        return (stage_outputs(model, p, **options)[site] - clean).norm(dim=-1)

    for options in (
        dict(where="layer 0 positions 2:4"),
        dict(where=site, effect="no_refill"),
        dict(where=site, point="scores", seed=3),
    ):
        noise_T, change_T = lengths(ResidualNoise(), **options), lengths(DropTop(1), **options)
        torch.testing.assert_close(noise_T, change_T, rtol=1e-3, atol=1e-5)
        assert noise_T.any()


@pytest.mark.parametrize("kind", ["cartesian", "top_p"])
def test_measured_noise_has_the_dose_of_what_it_imitates(model_of, shard, kind):
    """`output_change` at the first site agrees; the routing there is as it was."""
    model = model_of(kind)
    conditions = [Condition(p, "layer 0 stage 0") for p in (DropTop(1), ResidualNoise())]
    for reuse in ((), conditions):
        _, dropped, noisy = measure(model, conditions, shard, reuse=reuse)
        a, b = (c.routing[c.routing.layer == 0] for c in (dropped, noisy))
        np.testing.assert_allclose(a.output_change, b.output_change, rtol=1e-3)
        assert (b[["flips", "mass_moved"]] == 0).all(axis=None)
        assert noisy.losses.kl_sum.sum() > 0


def test_noise_of_a_search(model_of, shard):
    model = model_of("smoe_share")
    conditions = [Condition(p, "layer 2") for p in (Worst(1), ResidualNoise(Worst(1)))]
    _, worst, noisy = measure(model, conditions, shard)
    np.testing.assert_allclose(worst.routing.output_change, noisy.routing.output_change, rtol=1e-3)


def test_the_direction_depends_on_the_seed_and_the_site(model_of, stage_outputs):
    model = model_of("cartesian")
    first, second = model.sites()[:2]
    clean = stage_outputs(model, Identity())
    added = [
        stage_outputs(model, ResidualNoise(), where=first, seed=seed)[first] - clean[first]
        for seed in (0, 1, 0)
    ]
    assert added[0].equal(added[2])
    assert torch.cosine_similarity(added[0], added[1], dim=-1).mean().abs() < 0.2
    there = stage_outputs(model, ResidualNoise(), where=second)[second] - clean[second]
    assert torch.cosine_similarity(added[0], there, dim=-1).mean().abs() < 0.2


def test_nothing_intended_is_nothing_added(model_of, stage_outputs):
    model = model_of("cartesian")
    clean = stage_outputs(model, Identity())
    for p in (ResidualNoise(DropTop(0)), ResidualNoise(Identity())):
        noisy = stage_outputs(model, p)
        assert all(noisy[site].equal(clean[site]) for site in clean)


def test_noise_beside_another_perturbation(model_of, stage_outputs):
    """The other block's decision is kept, whichever was entered first."""
    model = model_of("smoe_share")
    site = model.sites()[0]
    ids = torch.arange(len(TOKENS_BL))
    dropped = stage_outputs(model, DropTop(2), where=site)[site]
    with perturbed(model, DropTop(2), site, sequence_ids=ids), capture_routing(model.model) as seen:
        noisy = stage_outputs(model, ResidualNoise(DropTop(1)), where=site)[site]
    assert (seen[site][0].logits_TE == -torch.inf).sum(-1).eq(2).all()
    further = stage_outputs(model, DropTop(3), where=site)[site]
    torch.testing.assert_close(
        (noisy - dropped).norm(dim=-1), (further - dropped).norm(dim=-1), rtol=1e-3, atol=1e-5
    )
