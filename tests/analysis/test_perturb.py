"""Perturbations: the contract that every one of them keeps, and what each does."""

import math

import pytest
import torch

from analysis.conditions import POINTS, Condition
from analysis.context import SiteStats
from analysis.doses import DenseRouting, flip_share
from analysis.intervene import calibrate, perturbed
from analysis.perturb import (
    PERTURBATIONS,
    DropChosen,
    DropTop,
    DropUnchosen,
    GaussianNoise,
    Identity,
    NoRouted,
    RandomRouting,
    chosen_mask,
    perturbation_from_dict,
)
from cartmoe.hooks import capture_routing, router_sites
from cartmoe.routing import Router, Routing

# Arguments of every perturbation in the catalogue; the tests below fail for one without any.
EXAMPLES = {
    "Identity": [Identity()],
    "DropTop": [DropTop(), DropTop(2), DropTop(ratio=0.5)],
    "DropChosen": [DropChosen(), DropChosen(2)],
    "DropUnchosen": [DropUnchosen(), DropUnchosen(3)],
    "GaussianNoise": [
        GaussianNoise(2.0),
        GaussianNoise(3.0, scale="site"),
        GaussianNoise(4.0, scale="absolute", within="chosen"),
    ],
    "RandomRouting": [RandomRouting(), RandomRouting(0.5), RandomRouting(draw="permute")],
    "NoRouted": [NoRouted()],
}
KINDS = ["smoe", "smoe_share", "hash", "fine_grained", "top_p", "cartesian", "sigmoid", "top1"]
EACH = pytest.mark.parametrize("p", [p for name in PERTURBATIONS for p in EXAMPLES[name]], ids=str)
KIND = pytest.mark.parametrize("kind", KINDS)
POINT = pytest.mark.parametrize("point", POINTS)
TOKENS_BL = torch.randint(1, 13, (6, 8), generator=torch.Generator().manual_seed(1))
IDS_B = torch.tensor([4, 8, 15, 16, 23, 42])


def routings(model, p, tokens_BL=TOKENS_BL, ids_B=IDS_B, **options):
    """(output, decisions by site) under the perturbation."""
    with (
        perturbed(model, p, sequence_ids=ids_B, **options),
        capture_routing(model.model) as captured,
        torch.no_grad(),
    ):
        out = model.model(tokens_BL)
    return out, {site: routing for site, (routing,) in captured.items()}


def decide(router, p, logits_TE, context, point="logits", effect="full"):
    """(decision without, decision with)"""
    clean, ctx = context(router, logits_TE)
    return clean, Condition(p, point=point, effect=effect).apply(clean, router, ctx)


def router_of(E=6, K=2, **options) -> Router:
    return Router(None, E, K, **options)


def same_sets(a: Routing, b: Routing) -> torch.Tensor:
    """(T,) whether both use the same experts."""
    return (chosen_mask(a) == chosen_mask(b)).all(-1)


# ---- the contract


@EACH
@KIND
def test_contract(model_of, calibration_of, kind, p):
    """Pure and total: shapes and dtypes stay, inputs stay as they are, nothing becomes NaN."""
    model = model_of(kind)
    for point in POINTS:
        check_contract(model, p, point, calibration_of(model))


def check_contract(model, p, point, stats):
    seen = []

    def spy(routing, router, site, x_TD):
        before = [t.clone() for t in routing]
        seen.append((routing, before))

    with model.edit(spy):  # hooked first, so it sees what the perturbation is given
        out, decisions = routings(model, p, point=point, stats=stats)
    for (given, before), changed in zip(seen, decisions.values(), strict=True):
        assert all(map(torch.equal, given, before))
        for a, b in zip(given, changed, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert not any(t.isnan().any() for t in changed)
        assert (changed.weights_TK >= 0).all()
        assert (changed.logits_TE < math.inf).all()
    assert out.isfinite().all()


@EACH
@KIND
def test_identity_is_exact(model_of, kind, p):
    model = model_of(kind)
    with torch.no_grad():
        clean = model.model(TOKENS_BL)
    for point in POINTS:
        out, _ = routings(model, p.identity(), point=point)
        assert out.equal(clean)


@EACH
def test_identity_returns_the_very_input(context_of, p):
    routing, ctx = context_of(router_of(), torch.randn(5, 6))
    assert p.identity()(routing.logits_TE, ctx) is routing.logits_TE


@EACH
@POINT
@pytest.mark.parametrize("kind", ["hash", "top_p", "cartesian"])
def test_draws_do_not_depend_on_the_batch(model_of, calibration_of, kind, p, point):
    """The same decisions for a row alone, in any batch, in any order (inputs agree up to
    rounding, and so do decisions but for near ties)."""
    model = model_of(kind)
    stats = calibration_of(model)
    _, whole = routings(model, p, point=point, stats=stats)
    site = next(iter(whole))  # later ones magnify the rounding
    for order in ([3, 0, 5], [2]):
        ids_B = IDS_B[order]
        _, some = routings(model, p, TOKENS_BL[order], ids_B, point=point, stats=stats)
        for a, b in zip(whole[site], some[site], strict=True):
            a = a.view(6, 8, -1)[order].flatten(0, 1)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@EACH
@KIND
def test_changes_what_it_expects(model_of, calibration_of, kind, p):
    model = model_of(kind)
    stats = calibration_of(model)
    _, before = routings(model, Identity(), where="layer 0 stage 0")
    _, after = routings(model, p, where="layer 0 stage 0", stats=stats)
    before, after = next(iter(before.values())), next(iter(after.values()))
    if p.expects == "selection":
        assert flip_share(DenseRouting(before), DenseRouting(after)).mean() > 0.05
        return
    if kind != "top_p" or p.expects == "weights":
        assert after.ids_TK.equal(before.ids_TK)
    if p.expects == "weights":
        assert not after.weights_TK.equal(before.weights_TK)
    elif kind not in ("top_p", "top1"):  # the others renormalize, up to rounding
        torch.testing.assert_close(after.weights_TK, before.weights_TK)


def test_every_perturbation_has_examples():
    assert EXAMPLES.keys() == PERTURBATIONS.keys()
    for name, cls in PERTURBATIONS.items():
        assert cls.__name__ == name
        assert cls.__doc__
        assert cls.expects in ("none", "weights", "selection")


@EACH
def test_dict_round_trip(p):
    assert perturbation_from_dict(p.to_dict()) == p
    assert type(p)() == perturbation_from_dict({"name": type(p).__name__})
    assert p.identity().strength in (0, pytest.approx(math.nan, nan_ok=True))


def test_labels_and_strengths():
    assert (DropTop(3).label, DropTop(3).strength) == ("DropTop", 3)
    assert (DropTop(ratio=0.25).label, DropTop(ratio=0.25).strength) == ("DropTop(ratio)", 0.25)
    assert GaussianNoise(2, scale="site").label == "GaussianNoise(scale=site)"
    assert GaussianNoise(2).label == "GaussianNoise"
    assert math.isnan(NoRouted().strength)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropTop(-1), "m is -1; it must be finite and at least 0"),
        (lambda: DropTop(1.5), "m is 1.5; it must be a whole number"),
        (lambda: DropTop(True), "m is True"),
        (lambda: DropTop("2"), "m is '2'"),
        (lambda: DropTop(ratio=1.5), "ratio is 1.5; it must lie in 0..1"),
        (lambda: DropTop(ratio="half"), "ratio is 'half'; it must be a number"),
        (lambda: DropTop(2, ratio=0.5), "give one of them"),
        (lambda: DropChosen(-1), "m is -1"),
        (lambda: DropUnchosen(None), "m is None"),
        (lambda: GaussianNoise(-0.1), "sigma is -0.1"),
        (lambda: GaussianNoise(math.nan), "sigma is nan"),
        (lambda: GaussianNoise(math.inf), "sigma is inf"),
        (lambda: GaussianNoise(scale="row"), "scale is 'row'; choose one of 'token', 'site'"),
        (lambda: GaussianNoise(within="some"), "within is 'some'"),
        (lambda: RandomRouting(1.1), "share is 1.1; it must lie in 0..1"),
        (lambda: RandomRouting(draw="x"), "draw is 'x'; choose one of 'reservoir', 'permute'"),
        (lambda: perturbation_from_dict({"name": "DropTpo"}), "choose one of 'Identity', 'DropTop"),
        (
            lambda: perturbation_from_dict({"name": "DropTop", "k": 1}),
            "parameter of DropTop is 'k'",
        ),
    ],
)
def test_wrong_parameters(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


# ---- DropTop


def test_drop_top_is_a_mask(context_of):
    router = router_of()
    logits_TE = torch.tensor([[0.0, 5, 1, 4, 2, 3], [2.0, 2, 2, 2, 1, 0]])
    _, got = decide(router, DropTop(2), logits_TE, context_of)
    inf = -math.inf
    masked_TE = torch.tensor([[0.0, inf, 1, inf, 2, 3], [inf, inf, 2, 2, 1, 0]])
    assert got.logits_TE.equal(masked_TE)  # ties: the lower index is dropped first
    assert got.ids_TK.tolist() == [[5, 4], [2, 3]]
    assert all(map(torch.equal, got, router.route(masked_TE)))


@pytest.mark.parametrize(("ratio", "m"), [(0.0, 0), (0.25, 2), (0.5, 3), (2 / 3, 4), (1.0, 6)])
def test_drop_top_by_ratio(context_of, ratio, m):
    router, logits_TE = router_of(), torch.randn(20, 6)
    a = decide(router, DropTop(ratio=ratio), logits_TE, context_of)[1]
    b = decide(router, DropTop(m), logits_TE, context_of)[1]
    assert all(map(torch.equal, a, b))


def test_drop_more_than_there_are(context_of):
    with pytest.raises(ValueError, match="m is 7; router has only 6 experts"):
        decide(router_of(), DropTop(7), torch.randn(2, 6), context_of)


@POINT
@pytest.mark.parametrize(
    "options", [{}, dict(renormalize=False), dict(top_p=0.4), dict(score="sigmoid")], ids=str
)
def test_dropping_all_leaves_nothing(context_of, point, options):
    router = router_of(**options)
    _, got = decide(router, DropTop(6), torch.randn(4, 6), context_of, point)
    assert (got.weights_TK == 0).all()
    _, got = decide(router, DropTop(5), torch.randn(4, 6), context_of, point)
    assert ((got.weights_TK > 0).sum(-1) == 1).all()


def test_golden_top1_disabled(golden):
    """Against outputs of the authors' code, with the router's first choice masked everywhere."""
    from cartmoe.reference import from_reference

    weights, config, expected = golden
    model = from_reference(weights, config)
    with perturbed(model, DropTop(1)):
        got = model(expected["input_ids"])
    torch.testing.assert_close(got, expected["logits_disable_top1"], rtol=0, atol=1e-5)


# ---- the controls


def test_drop_chosen_and_unchosen(context_of):
    router, logits_TE = router_of(), torch.randn(400, 6)
    clean, inside = decide(router, DropChosen(1), logits_TE, context_of)
    _, outside = decide(router, DropUnchosen(3), logits_TE, context_of)
    used_TE = chosen_mask(clean)
    dropped_in, dropped_out = inside.logits_TE == -math.inf, outside.logits_TE == -math.inf
    assert (dropped_in.sum(-1) == 1).all()
    assert not (dropped_in & ~used_TE).any()
    assert (dropped_out.sum(-1) == 3).all()
    assert not (dropped_out & used_TE).any()
    first_T = dropped_in.gather(-1, clean.ids_TK[:, :1]).float()
    assert first_T.mean() == pytest.approx(0.5, abs=0.1)  # any one in use, not the best
    shares_E = dropped_out.sum(0) / (~used_TE).sum(0)
    torch.testing.assert_close(shares_E, torch.full((6,), 0.75), atol=0.1, rtol=0)


def test_fewer_than_m_to_drop(context_of):
    router, logits_TE = router_of(), torch.randn(50, 6)
    clean, got = decide(router, DropChosen(5), logits_TE, context_of)
    assert (got.logits_TE == -math.inf).equal(chosen_mask(clean))
    clean, got = decide(router, DropUnchosen(5), logits_TE, context_of)
    assert (got.logits_TE == -math.inf).equal(~chosen_mask(clean))
    assert got.ids_TK.equal(clean.ids_TK)
    clean, got = decide(router, DropChosen(50), logits_TE, context_of)
    assert (got.logits_TE == -math.inf).equal(chosen_mask(clean))


def test_chosen_leaves_out_unused_slots(context_of):
    """With top_p all experts have a slot; only those with weight are chosen."""
    router = router_of(top_p=0.4)
    logits_TE = torch.tensor([[9.0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 0]])
    clean, got = decide(router, DropChosen(6), logits_TE, context_of)
    assert chosen_mask(clean).sum(-1).tolist() == [1, 2]
    assert (got.logits_TE == -math.inf).sum(-1).tolist() == [1, 2]


# ---- noise


def test_gaussian_noise_scales(context_of):
    router, logits_TE = router_of(16), 3 * torch.randn(3000, 16) + 7
    clean, ctx = context_of(router, logits_TE)
    unit_TE = ctx.noise.normal(16)
    stats = SiteStats(logits_TE, 2.5, torch.ones(16) / 16)
    _, with_stats = context_of(router, logits_TE, stats=stats)
    for p, context, scale in [
        (GaussianNoise(0.5), ctx, logits_TE.std(-1, correction=0, keepdim=True)),
        (GaussianNoise(0.5, scale="absolute"), ctx, 1.0),
        (GaussianNoise(0.5, scale="site"), with_stats, 2.5),
    ]:
        torch.testing.assert_close(p(logits_TE, context), logits_TE + 0.5 * scale * unit_TE)
    within = GaussianNoise(0.5, within="chosen")(logits_TE, ctx)
    assert (within == logits_TE).equal(~chosen_mask(clean))
    with pytest.raises(ValueError, match=r"needs statistics .*analysis\.calibrate"):
        GaussianNoise(0.5, scale="site")(logits_TE, ctx)


def test_strengths_share_their_noise(context_of):
    router, logits_TE = router_of(), torch.zeros(9, 6)
    _, ctx = context_of(router, logits_TE)
    one, two = (GaussianNoise(s, scale="absolute")(logits_TE, ctx) for s in (1.0, 2.0))
    assert two.equal(2 * one)


def test_noise_keeps_masked_experts_out(context_of):
    logits_TE = torch.randn(5, 6).index_fill(1, torch.tensor([2]), -math.inf)
    _, ctx = context_of(router_of(), logits_TE)
    noisy = GaussianNoise(3.0)(logits_TE, ctx)
    assert (noisy == -math.inf).equal(logits_TE == -math.inf)
    assert not noisy.isnan().any()


# ---- random routing


def test_random_routing_needs_statistics(model_of):
    with pytest.raises(ValueError, match=r"RandomRouting.*pass stats=analysis\.calibrate"):
        routings(model_of("cartesian"), RandomRouting())


@POINT
@pytest.mark.parametrize("kind", ["smoe_share", "top_p", "sigmoid", "raw"])
def test_random_routing_keeps_the_marginal_load(model_of, shard, kind, point):
    """Tokens get decisions that other tokens really got, weights included."""
    model = model_of(kind)
    stats = calibrate(model, shard)
    site, router = next(iter(router_sites(model.model).items()))
    tokens_BL = torch.randint(0, 13, (200, 8), generator=torch.Generator().manual_seed(2))
    _, after = routings(
        model, RandomRouting(), tokens_BL, torch.arange(200), point=point, stats=stats
    )
    expected = DenseRouting(router.route(stats.sites[site].reservoir_RE))
    got = DenseRouting(after[site])
    load_E = got.used_TE.double().mean(0)
    torch.testing.assert_close(load_E, expected.used_TE.double().mean(0), atol=0.05, rtol=0)
    apart = (got.weights_TE[:, None] - expected.weights_TE).abs().amax(-1)
    assert apart.amin(-1).max() < 1e-5


def test_share_of_tokens(context_of):
    router, logits_TE = router_of(), torch.randn(2000, 6)
    stats = SiteStats(torch.randn(50, 6), 1.0, torch.ones(6) / 6)
    _, ctx = context_of(router, logits_TE, stats=stats)
    for share in (0.25, 0.75):
        moved_T = (RandomRouting(share)(logits_TE, ctx) != logits_TE).any(-1)
        assert moved_T.double().mean() == pytest.approx(share, abs=0.03)
    permuted = RandomRouting(draw="permute")(logits_TE, ctx)
    assert permuted.sort().values.equal(logits_TE.sort().values)
    assert (permuted != logits_TE).any(-1).double().mean() > 0.99


# ---- the point


def test_masks_are_exact_after_the_score(context_of):
    """Scores of the others stay, bit by bit: nothing is normalized anew."""
    for options in ({}, dict(top_p=0.4), dict(renormalize=False), dict(score="sigmoid")):
        router, logits_TE = router_of(**options), torch.randn(50, 6)
        clean, got = decide(router, DropTop(1), logits_TE, context_of, "scores")
        best_T1 = clean.scores_TE.argmax(-1, keepdim=True)
        assert got.scores_TE.equal(clean.scores_TE.scatter(-1, best_T1, 0))
        assert got.logits_TE is clean.logits_TE


def test_a_score_of_zero_stays(context_of):
    logits_TE = torch.tensor([[500.0, 0, 1, 2, 3, -500]])  # zeros after a softmax
    for p in (DropTop(1), GaussianNoise(1.0), DropUnchosen(2)):
        _, got = decide(router_of(), p, logits_TE, context_of, "scores")
        assert not got.scores_TE.isnan().any()
        assert (got.scores_TE[0, 1:] == 0).all()


@EACH
@pytest.mark.parametrize("kind", ["smoe", "smoe_share", "hash", "fine_grained", "cartesian"])
def test_points_agree_where_weights_are_renormalized(model_of, calibration_of, kind, p):
    """paper.md: K > 1, renormalized, softmax. Experts of almost equal score may change places."""
    model = model_of(kind)
    stats = calibration_of(model)
    before, a = routings(model, p, stats=stats)
    after, b = routings(model, p, stats=stats, point="scores")
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    for x, y in zip(a.values(), b.values(), strict=True):
        torch.testing.assert_close(
            DenseRouting(x).weights_TE, DenseRouting(y).weights_TE, rtol=1e-3, atol=1e-4
        )


def test_points_differ_with_top_p(context_of):
    """On random logits: 2.6 experts clean, 2.95 masked before, 4.39 after the softmax (E 16)."""
    router = router_of(16, top_p=0.4)
    logits_TE = torch.randn(4000, 16)
    clean, before = decide(router, DropTop(1), logits_TE, context_of)
    _, after = decide(router, DropTop(1), logits_TE, context_of, "scores")
    active = [DenseRouting(r).count_T.double().mean().item() for r in (clean, before, after)]
    assert active == pytest.approx([2.6, 2.95, 4.39], abs=0.1)
