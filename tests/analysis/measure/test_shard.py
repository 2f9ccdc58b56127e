"""`measure` against the same computed slowly: whole forwards under `perturbed`, one at a time."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import cartmoe.losses
from analysis.adapters import DenseRouting, as_adapter
from analysis.measure import losses
from analysis.measure.calibrate import calibrate
from analysis.measure.intervene import Intervention, perturbed
from analysis.measure.shard import measure
from analysis.measure.sweep import sweep
from analysis.perturb.base import Identity, Perturbation
from analysis.perturb.compound import Compose, Custom, ResidualNoise
from analysis.perturb.condition import CLEAN, Condition
from analysis.perturb.context import Tokens
from analysis.perturb.decisions import Lag, NoRouted
from analysis.perturb.flips import Worst
from analysis.perturb.logits import GaussianNoise, RandomRouting, SwapRanks
from analysis.perturb.masks import DropChosen, DropExperts, DropTop, DropUnchosen
from analysis.stats import damage_by, difference
from cartmoe.data import IGNORE
from cartmoe.hooks import capture_routing, router_sites

KINDS = [
    *("smoe", "smoe_share", "hash", "fine_grained", "top_p", "cartesian"),
    *("parallel", "sigmoid", "top1", "raw"),
]
CONDITIONS = [
    Condition(Identity()),
    Condition(DropTop(1)),
    Condition(DropTop(1), "layer 2"),
    Condition(DropTop(2), "stage 0", "scores"),
    Condition(DropTop(ratio=0.5), effect="no_refill"),
    Condition(DropTop(1), effect="selection"),
    Condition(GaussianNoise(1.5), effect="weights", eval_seed=2),
    Condition(GaussianNoise(1.0, scale="site"), "positions 2:5"),
    Condition(DropChosen(1), "layer 0 stage 0"),
    Condition(DropUnchosen(2)),
    Condition(RandomRouting(0.5)),
    Condition(NoRouted(), "layer 2 stage 0"),
    Condition(DropTop(1), downstream="replay"),
    Condition(GaussianNoise(2.0), "layer 2", downstream="replay", effect="no_refill"),
]
KEYS = ["document_id", "domain", "sequence_id", "num_tokens", "num_bytes"]
SITE = ["layer", "stage"]


def slow(model, condition, shard, calibration):
    """(nll, KL, agreement) by token, 0 at padding: whole forwards, in fp64 from the logits on."""
    with torch.no_grad(), capture_routing(model.model) if model.sites() else nullcontext() as taken:
        clean = model.model(shard.tokens_SL).double()
    logits = clean
    if condition:
        recorded = {site: routing for site, (routing,) in taken.items()}
        intervention = Intervention(condition, calibration, recorded)
        intervention.begin(Tokens.of(shard.tokens_SL, shard.sequence_id_S), {})
        with torch.no_grad(), model.hooked(router=intervention):
            logits = model.model(shard.tokens_SL).double()
    used_SL = shard.targets_SL != IGNORE
    nll_SL = F.cross_entropy(logits.transpose(1, 2), shard.targets_SL, reduction="none")
    p, q = clean.log_softmax(-1), logits.log_softmax(-1)
    kl_SL = (p.exp() * (p - q)).sum(-1) * used_SL
    return nll_SL, kl_SL, (p.argmax(-1) == q.argmax(-1)) & used_SL


def assert_losses(cell, expected, shard, atol=1e-5):
    """Within atol nats a token."""
    nll_SL, kl_SL, agree_SL = expected
    frame, used_SL = cell.losses, shard.targets_SL != IGNORE
    tokens = used_SL.sum(-1)
    assert frame.num_tokens.tolist() == tokens.tolist()
    assert frame.sequence_id.tolist() == shard.sequence_id_S.tolist()
    for column, sums in (("nll_sum", nll_SL.sum(-1)), ("kl_sum", kl_SL.sum(-1))):
        got = torch.tensor(frame[column].to_numpy())
        torch.testing.assert_close(got / tokens, sums / tokens, atol=atol, rtol=0)
    assert (torch.tensor(frame.num_agree.to_numpy()) - agree_SL.sum(-1)).abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_whole_forwards(model_of, calibration_of, shard, kind):
    model = model_of(kind)
    calibration = calibration_of(model)
    conditions = [c for c in CONDITIONS if any(map(c.where, model.sites()))]
    cells = measure(model, conditions, shard, batch_size=len(shard), calibration=calibration)
    assert [cell.condition for cell in cells] == [CLEAN, *conditions]
    for cell in cells:
        assert_losses(cell, slow(model, cell.condition, shard, calibration), shard)


@pytest.mark.parametrize("condition", [CLEAN, CONDITIONS[1], CONDITIONS[6]], ids=str)
def test_batches_only_round(model_of, calibration_of, shard, condition):
    model = model_of("cartesian")
    calibration = calibration_of(model)
    expected = slow(model, condition, shard, calibration)
    conditions = [condition] if condition else []
    for batch_size in (1, 3):
        cell = measure(model, conditions, shard, batch_size=batch_size, calibration=calibration)[-1]
        assert_losses(cell, expected, shard)


def test_losses_in_small_chunks(model_of, calibration_of, shard, monkeypatch):
    """Logits are made a few rows at a time."""
    model = model_of("smoe_share")
    calibration = calibration_of(model)
    monkeypatch.setattr(cartmoe.losses, "CHUNK_LOGITS", 40)
    for kept in (0, 2**25):  # clean log probabilities made anew for each condition, or kept
        monkeypatch.setattr(losses, "KEEP_LOGITS", kept)
        for cell in measure(model, CONDITIONS[:2], shard, calibration=calibration):
            assert_losses(cell, slow(model, cell.condition, shard, calibration), shard)


@pytest.mark.parametrize("kind", ["cartesian", "top_p", "parallel"])
def test_reuse_changes_no_bit(model_of, shard, kind):
    """A condition that begins at a late segment, against one said to begin at the first."""
    model = model_of(kind)

    def late(logits_TE, ctx):
        if ctx.site.layer < 2:
            return logits_TE
        return DropTop(1)(logits_TE, ctx)

    _, reused, whole = measure(model, [Condition(DropTop(1), "layer 2"), Condition(late)], shard)
    pd.testing.assert_frame_equal(reused.losses, whole.losses, check_exact=True)
    rows = whole.routing[whole.routing.layer == 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(reused.routing, rows, check_exact=True)


# ---- what is exact


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_exactly_nothing(model_of, calibration_of, shard, kind):
    model = model_of(kind)
    identities = [
        Condition(p.identity(), point=point, downstream=downstream)
        for p in (Identity(), DropTop(1), GaussianNoise(1.0), RandomRouting())
        for point, downstream in (("logits", "reroute"), ("scores", "replay"))
    ]
    clean, *cells = measure(model, list(dict.fromkeys(identities)), shard, batch_size=3)
    for cell in cells:
        assert (cell.losses.kl_sum == 0).all()
        pd.testing.assert_frame_equal(cell.losses, clean.losses, check_exact=True)
        assert (
            cell.routing[["flips", "flips_total", "changed", "mass_moved", "mass_lost"]] == 0
        ).all(axis=None)


@pytest.mark.parametrize("reuse", [(), CONDITIONS], ids=["direct", "reused"])
def test_conditions_do_not_touch_each_other(model_of, calibration_of, shard, reuse):
    """Bit for bit the same alone, among others, and in another order, expert by expert or from a
    table."""
    model = model_of("cartesian")
    options = dict(batch_size=3, calibration=calibration_of(model), reuse=reuse)
    together = measure(model, CONDITIONS, shard, **options)
    backwards = measure(model, CONDITIONS[::-1], shard, **options)
    for cell, again in zip(together[1:], backwards[:0:-1], strict=True):
        alone = measure(model, [cell.condition], shard, **options)[1]
        for other in (again, alone):
            pd.testing.assert_frame_equal(cell.losses, other.losses, check_exact=True)
            pd.testing.assert_frame_equal(cell.routing, other.routing, check_exact=True)
    for other in (backwards[0], measure(model, [], shard, **options)[0]):
        pd.testing.assert_frame_equal(together[0].losses, other.losses, check_exact=True)
        pd.testing.assert_frame_equal(together[0].routing, other.routing, check_exact=True)


def test_the_model_stays_as_it_is(model_of, calibration_of, shard):
    model = model_of("cartesian")
    weights = {name: t.clone() for name, t in model.model.state_dict().items()}
    with torch.no_grad():
        before = model.model(shard.tokens_SL)
        measure(model, CONDITIONS, shard, calibration=calibration_of(model))
        assert model.model(shard.tokens_SL).equal(before)
    assert all(t.equal(weights[name]) for name, t in model.model.state_dict().items())


def test_a_class_of_yours_prepares_itself(model_of, shard):
    """Once a batch, from the clean pass; what it becomes is measured under its own name."""

    @dataclass(frozen=True)
    class OfTheBatch(Perturbation):
        def prepare(self, model, clean, condition):
            assert condition.perturbation is self
            return DropTop(1 + int(clean.losses.nll_T.max() < 0))

    conditions = [Condition(OfTheBatch()), Condition(DropTop(1))]
    _, own, plain = measure(model_of("cartesian"), conditions, shard, reuse=())
    pd.testing.assert_frame_equal(own.losses, plain.losses)
    assert own.condition == conditions[0]


def test_padding_is_ignored(model_of, calibration_of, shard, rows_of):
    """Whatever stands behind the last token changes nothing."""
    model = model_of("cartesian")
    options = dict(batch_size=7, calibration=calibration_of(model))
    cells = measure(model, CONDITIONS, shard, **options)
    other = rows_of(shard, list(range(7)))
    other.tokens_SL[other.targets_SL == IGNORE] = 12
    for a, b in zip(cells, measure(model, CONDITIONS, other, **options), strict=True):
        for name in ("losses", "routing"):
            mine, others = getattr(a, name), getattr(b, name)
            pd.testing.assert_frame_equal(mine, others, rtol=1e-4, atol=1e-4)


# ---- tables


def test_columns_of_losses(model_of, shard):
    clean, cell = measure(model_of("cartesian"), [Condition(DropTop(1))], shard, batch_size=4)
    for frame in (clean.losses, cell.losses):
        assert frame.document_id.tolist() == shard.document_id
        assert frame.domain.tolist() == shard.domain
        assert frame.num_bytes.tolist() == shard.num_bytes_S.tolist()
        assert list(frame) == [*KEYS, "nll_sum", "kl_sum", "num_agree", "num_touched", "delta_max"]
    assert (clean.losses.kl_sum == 0).all()
    assert (clean.losses.num_agree == clean.losses.num_tokens).all()
    assert cell.seconds > 0


@pytest.mark.parametrize("kind", ["cartesian", "top_p", "fine_grained"])
def test_doses_by_hand(model_of, shard, kind):
    """One site perturbed: R is the clean decision there."""
    model = model_of(kind)
    where = "layer 0 stage 0"
    condition = Condition(DropTop(1), where)
    cell = measure(model, [condition], shard, batch_size=3)[1]
    with torch.no_grad(), capture_routing(model.model) as captured:
        model.model(shard.tokens_SL)
        with perturbed(model, DropTop(1), where):
            model.model(shard.tokens_SL)
    before, after = captured[model.sites()[0]]
    used_SL = shard.targets_SL != IGNORE

    def by_sequence(values):
        return [sum(row[: int(n)]) for row, n in zip(values, used_SL.sum(-1), strict=True)]

    S, L = used_SL.shape
    expected = {
        name: [[0.0] * L for _ in range(S)] for name in ("flips", "moved", "lost", "active")
    }
    columns = (before.ids_TK, before.weights_TK, after.ids_TK, after.weights_TK)
    for t, rows in enumerate(zip(*columns, strict=True)):
        ids, weights, new_ids, new_weights = (row.tolist() for row in rows)
        old = {i: w for i, w in zip(ids, weights, strict=True) if w}
        new = {i: w for i, w in zip(new_ids, new_weights, strict=True) if w}
        s, pos = divmod(t, L)
        gone = old.keys() - new.keys()
        expected["flips"][s][pos] = len(gone) / len(old)
        expected["moved"][s][pos] = (
            sum(abs(old.get(e, 0) - new.get(e, 0)) for e in old.keys() | new.keys()) / 2
        )
        expected["lost"][s][pos] = sum(old[e] for e in gone)
        expected["active"][s][pos] = len(new)
    frame = cell.routing
    assert list(zip(frame.layer, frame.stage, strict=True)) == [(0, 0)] * S
    for column, name in [
        ("flips", "flips"),
        ("flips_total", "flips"),
        ("mass_moved", "moved"),
        ("mass_lost", "lost"),
        ("active", "active"),
    ]:
        assert frame[column].tolist() == pytest.approx(by_sequence(expected[name]), abs=1e-5)
    assert frame.changed.tolist() == frame.num_tokens.tolist()
    assert frame.num_tokens.tolist() == used_SL.sum(-1).tolist()


def test_direct_and_total_flips(model_of, shard):
    """A later site, not perturbed itself, moves only by the cascade; with replay it does not."""
    model = model_of("cartesian")
    cells = measure(
        model,
        [Condition(DropTop(1), downstream=d) for d in ("reroute", "replay")],
        shard,
    )
    reroute, replay = (
        cell.routing.groupby(SITE)[["flips", "flips_total"]].sum() for cell in cells[1:]
    )
    assert (replay.flips == replay.flips_total).all()
    assert reroute.flips.loc[0, 0] == reroute.flips_total.loc[0, 0]
    assert reroute.flips.loc[2, 1] != reroute.flips_total.loc[2, 1]


def test_routing_rows_are_those_of_perturbed_sites(model_of, shard):
    model = model_of("cartesian")
    clean, one, both = measure(
        model, [Condition(DropTop(1), "stage 1"), Condition(DropTop(1), "layer 2")], shard
    )
    places = [set(zip(c.routing.layer, c.routing.stage, strict=True)) for c in (clean, one, both)]
    assert places == [{(0, 0), (0, 1), (2, 0), (2, 1)}, {(0, 1), (2, 1)}, {(2, 0), (2, 1)}]
    assert len(clean.routing) == 4 * len(shard)


@pytest.mark.parametrize("kind", ["cartesian", "smoe", "top_p"])
def test_clean_routing(model_of, shard, kind):
    model = model_of(kind)
    frame = measure(model, [], shard, batch_size=4)[0].routing
    with torch.no_grad(), capture_routing(model.model) as captured:
        model.model(shard.tokens_SL)
    used_SL = shard.targets_SL != IGNORE
    for site, (routing,) in captured.items():
        mine = frame[(frame.layer == site.layer) & (frame.stage == site.stage)]
        entropy_T = torch.distributions.Categorical(routing.scores_TE.double()).entropy()
        active_T = DenseRouting(routing).count_T
        for column, value_T in (("entropy", entropy_T), ("active", active_T)):
            sums = (value_T.view_as(used_SL) * used_SL).sum(-1)
            assert mine[column].tolist() == pytest.approx(sums.tolist(), rel=1e-4)
        assert (mine[["flips", "flips_total", "changed", "mass_moved", "mass_lost"]] == 0).all(
            axis=None
        )
        assert (mine.margin >= 0).all()
        assert (mine.routed_ratio > 0).all()
        full = mine.routed_share == mine.num_tokens
        assert full.all() == (kind == "smoe")


def test_dense_has_its_clean_run(model_of, shard):
    model = model_of("dense")
    (cell,) = measure(model, [], shard)
    assert_losses(cell, slow(model, None, shard, None), shard)
    assert cell.routing.empty


# ---- what is refused or noticed


@pytest.mark.parametrize(
    ("kind", "where", "have"),
    [
        ("smoe_share", "stage 1", "'layer 0 stage 0', 'layer 2 stage 0'"),
        ("cartesian", "layer 1", "'layer 0 stage 0', 'layer 0 stage 1', 'layer 2"),
        ("dense", "all", "none: it is dense"),
    ],
)
def test_where_that_selects_nothing(model_of, shard, kind, where, have):
    with pytest.raises(ValueError, match=rf"where is '{where}'; it must select .*{have}"):
        measure(model_of(kind), [Condition(DropTop(1), where)], shard)


def test_weights_that_are_not_finite(tiny_model, shard):
    model = tiny_model("cartesian")
    router = list(router_sites(model).values())[2]
    with torch.no_grad():
        router.gate.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="layer 2 stage 0"):
        measure(as_adapter(model), [Condition(DropTop(1))], shard)


def test_progress(model_of, shard):
    ticks = []
    measure(model_of("smoe"), CONDITIONS[1:3], shard, batch_size=3, progress=ticks.append)
    assert sum(ticks) == 2 * 3


def test_statistics_are_asked_for(model_of, shard):
    with pytest.raises(ValueError, match=r"pass stats=analysis\.calibrate"):
        measure(model_of("smoe"), [Condition(RandomRouting())], shard)


def test_bf16(model_of, shard):
    """Under autocast losses stay fp32, and the identity exact."""
    model = model_of("cartesian")
    with torch.autocast("cpu", torch.bfloat16):
        calibration = calibrate(model, shard)
        clean, same, dropped = measure(
            model,
            [Condition(Identity()), Condition(RandomRouting())],
            shard,
            calibration=calibration,
        )
    pd.testing.assert_frame_equal(clean.losses, same.losses, check_exact=True)
    assert (dropped.losses.nll_sum != clean.losses.nll_sum).all()
    exact = measure(model, [], shard)[0].losses.nll_sum
    assert clean.losses.nll_sum.tolist() == pytest.approx(exact.tolist(), rel=0.05)


# ---- which tokens a condition could change at all


def touched(model, condition, shard, calibration=None):
    _, cell = measure(model, [condition], shard, calibration=calibration)
    return cell.losses.num_touched.tolist()


def test_touched_tokens_are_counted(model_of, shard):
    model = model_of("cartesian")
    used_SL = shard.targets_SL != IGNORE
    at_L = torch.arange(used_SL.shape[1])

    def inside(mask_L):
        return (used_SL & mask_L).sum(1).tolist()

    everywhere = inside(at_L >= 0)
    for p in (Identity(), DropTop(1), NoRouted(), ResidualNoise(), DropExperts(0.0), Lag(0)):
        assert touched(model, Condition(p), shard) == everywhere, p
    assert touched(model, Condition(DropTop(1), "positions 2:5"), shard) == inside(
        (at_L >= 2) & (at_L < 5)
    )
    assert touched(model, Condition(Lag(3)), shard) == inside(at_L >= 3)
    assert touched(model, Condition(Lag(3), "positions 2:5"), shard) == inside(
        (at_L >= 3) & (at_L < 5)
    )
    both = Compose((SwapRanks(), Lag(3)))
    assert touched(model, Condition(both), shard) == everywhere
    lags = Compose((Lag(3), Lag(5)))
    assert touched(model, Condition(lags), shard) == inside(at_L >= 3)
    assert touched(model, Condition(ResidualNoise(Lag(3))), shard) == inside(at_L >= 3)


@pytest.mark.parametrize(
    "condition",
    [
        Condition(DropTop(1), "positions 900:901"),
        Condition(Lag(100)),
        Condition(Lag(9, over="sites")),
        Condition(DropExperts(0.01)),
        Condition(Worst(1), "positions 900:"),
        Condition(DropTop(1), "positions 900:", effect="selection", downstream="replay"),
    ],
    ids=lambda c: f"{c.perturbation.label} {c.where}",
)
def test_what_touches_no_token_is_not_robustness(model_of, shard, condition):
    model = model_of("cartesian")
    assert touched(model, condition, shard) == [0] * len(shard)
    results = sweep(model, shard, [condition, DropTop(1)], controls=False, progress=False)
    with pytest.warns(UserWarning, match="no token could be changed by"):
        damage = results.damage(full=True).set_index("label")
    nothing, other = damage.iloc[0], damage.iloc[1]
    assert nothing.num_touched == 0
    assert (nothing.note, other.note) == ("no token was changed", "few documents")
    assert nothing[["delta_nats", "low", "high", "kl", "agreement", "perplexity"]].isna().all()
    alone = (
        sweep(model, shard, [DropTop(1)], controls=False, progress=False).damage(full=True).iloc[0]
    )
    assert other[["delta_nats", "low", "high"]].equals(alone[["delta_nats", "low", "high"]])
    assert np.isnan(difference(results.losses, "DropTop(1)", damage.index[0]).delta_nats.item())
    with pytest.raises(ValueError, match="which could change no token"):
        results.damage_by("domain", [damage.index[0]])


# ---- perturbations of yours that cannot be repeated


def drawing(logits_TE, ctx):
    return logits_TE + torch.randn_like(logits_TE)


def in_place(logits_TE, ctx):
    return logits_TE.mul_(0.5)


def keyed(logits_TE, ctx):
    return logits_TE + ctx.noise.normal(logits_TE.shape[-1], "mine")


@dataclass(frozen=True)
class Drawing(Perturbation):
    def decide(self, routing, router, ctx):
        return routing._replace(weights_TK=torch.rand_like(routing.weights_TK))


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (Custom(drawing, "Mine"), "Mine gave two answers to one question; .* ctx.noise"),
        (Compose((DropTop(1), Custom(drawing, "Mine"))), "gave two answers to one question"),
        (ResidualNoise(Custom(drawing, "Mine")), "Mine gave two answers"),
        (Drawing(), "Drawing gave two answers"),
        (Custom(in_place, "Mine"), "Mine changes in place what it is given"),
    ],
    ids=lambda v: getattr(v, "label", ""),
)
@pytest.mark.parametrize("point", ["logits", "scores"])
def test_it_is_asked_twice(model_of, shard, p, message, point):
    if point in p.points and not (point == "scores" and "in place" in message):
        with pytest.raises(ValueError, match=message):
            sweep(model_of("cartesian"), shard, p, point=point, controls=False, progress=False)


@pytest.mark.parametrize("p", [Custom(keyed, "Mine"), Compose((Custom(keyed, "Mine"), DropTop(1)))])
def test_keyed_noise_can_be_repeated(model_of, shard, p):
    a, b = (
        sweep(model_of("cartesian"), shard, p, controls=False, batch_size=n, progress=False)
        for n in (2, 7)
    )
    np.testing.assert_allclose(a.losses.nll_sum, b.losses.nll_sum, rtol=1e-5)


def test_a_perturbation_is_asked_twice_at_every_site(model_of, shard):
    """Random numbers at the second router alone are seen, too."""

    def late(logits_TE, ctx):
        return drawing(logits_TE, ctx) if ctx.site.stage == 1 else logits_TE

    with pytest.raises(ValueError, match="Late gave two answers to one question"):
        sweep(model_of("cartesian"), shard, Custom(late, "Late"), progress=False)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (slice(0, 0), "calibration has no sequence"),
        (3, "calibration is a int; give what analysis.documents returns"),
    ],
)
def test_a_calibration_that_is_none(model_of, shard, calibration, message):
    given = shard[calibration] if isinstance(calibration, slice) else calibration
    with pytest.raises(ValueError, match=message):
        sweep(model_of("smoe_share"), shard, DropTop(1), calibration=given, progress=False)


def test_tables_are_the_callers_own(model_of, shard):
    results = sweep(model_of("smoe_share"), shard, DropTop(1), controls=False, progress=False)
    expected = results.damage()
    mine = results.damage(full=True)
    mine["delta_nats"] *= 1000
    pd.testing.assert_frame_equal(results.damage(), expected)


def test_what_touches_nothing_in_one_model_is_told_of_the_other(model_of, shard):
    conditions = [Condition(DropTop(1), "layer 0"), DropTop(1)]
    results = sweep(model_of("smoe_share"), shard, conditions, controls=False, progress=False)
    other = results.losses.assign(model="other", num_touched=0)
    both = pd.concat([results.losses, other], ignore_index=True)
    table = damage_by(both, "domain")
    assert set(table.model) == set(results.losses.model)
    assert len(table) == 2 * len(damage_by(results.losses, "domain", None, ["DropTop(1)"]))
    with pytest.raises(ValueError, match="no condition could change any token"):
        damage_by(pd.concat([other]), "domain")
