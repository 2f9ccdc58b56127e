"""Experts in each other's place: linear estimates against autograd, and against real forwards."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from analysis.adapters import Watch, as_adapter
from analysis.measure.shard import measure
from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics.first_order import linear_substitution
from analysis.overlap.removal import expert_damage
from analysis.overlap.substitution import Substitute, _choose, calibration, substitution
from analysis.perturb.condition import Condition
from analysis.stats.bootstrap import Bootstrap
from analysis.stats.columns import SITE
from cartmoe.data import IGNORE, Sequences

QUIET = dict(progress=False, bootstrap=Bootstrap(resamples=99))


def own_copy(model):
    """A model of one's own, to change."""
    return as_adapter(copy.deepcopy(model.model))


def duplicate(model, site, i, j):
    """Expert j becomes a copy of i; the router stays."""
    for weight in model.expert_weights(site):
        weight.data[j] = weight.data[i]


def summed_nll(model, docs):
    logits_TV = model.model(docs.tokens_SL).flatten(0, 1)
    return F.cross_entropy(logits_TV.double(), docs.targets_SL.flatten(), reduction="sum")


def square(model, docs, site, metric="substitution"):
    return measure_overlap(model, docs, metric, site, progress=False).matrix(
        metric, site.layer, site.stage
    )


def test_formula_by_hand():
    slopes_TE = torch.tensor([[1.0, 5.0, 2.0], [3.0, 0.0, -1.0], [7.0, 7.0, 7.0]])
    weights_TE = torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.75, 0.0], [0.0, 1.0, 0.0]])
    expected = torch.tensor(
        [
            [0, (0.5 * 4 + 0.25 * -3) / 2, (0.5 * 1 + 0.25 * -4) / 2],
            [0.75 * 3 / 2, 0, 0.75 * -1 / 2],
            [0.5 * -1, 0.5 * 3, 0],
        ]
    )
    found = linear_substitution(slopes_TE, weights_TE)
    torch.testing.assert_close(found, expected.double(), atol=1e-15, rtol=0)


def test_an_expert_without_tokens_is_nan():
    found = linear_substitution(torch.ones(4, 2), torch.tensor([[1.0, 0.0]] * 4))
    assert found[0].tolist() == [0, 0]
    assert found[1].isnan().all()


@pytest.mark.parametrize("kind", ["smoe_share", "cartesian", "parallel", "top_p", "sigmoid"])
def test_linear_is_the_derivative(model_of, shard, kind):
    """y moves by eps g (f_j - f_i) at the tokens routed to i: d loss / d eps by autograd, fp64."""
    model = own_copy(model_of(kind))
    model.model.double()
    compared = 0
    for site in model.sites()[-2:]:
        found = square(model, shard, site)
        lost = measure_overlap(model, shard, "removal_linear", site, progress=False).experts
        experts = model._stage(site).experts
        for i, j in ((0, 1), (3, 2), (5, 0)):
            # (weights of routing are fp32 all the same)
            eps = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            tokens = []

            def moved(x_TD, routing, at, own, experts=experts, i=i, j=j, eps=eps, tokens=tokens):
                weight_T1 = (routing.weights_TK * (routing.ids_TK == i)).sum(-1, keepdim=True)
                f_i, f_j = model.expert_outputs(site, x_TD, [i, j])  # noqa: B023
                tokens.append((weight_T1[:, 0] != 0).view_as(shard.targets_SL))
                change = eps[0] * weight_T1 * (f_j - f_i) - eps[1] * weight_T1 * f_i
                return type(experts).forward(experts, x_TD, routing) + change

            with model.hooked(experts=moved, where=site.__eq__):
                loss = summed_nll(model, shard)
            (gradient,) = torch.autograd.grad(loss, eps)
            routed = (tokens[0] & (shard.targets_SL != IGNORE)).sum()
            if not routed:
                assert np.isnan(found[i, j])
                continue
            compared += 1
            assert found[i, j] == pytest.approx((gradient[0] / routed).item(), rel=1e-5, abs=2e-8)
            value = lost[lost.expert == i].value.item()
            assert value == pytest.approx((gradient[1] / routed).item(), rel=1e-5, abs=2e-8)
    assert compared >= 4


@pytest.fixture(scope="module")
def docs() -> Sequences:
    """480 tokens in twelve documents of two sequences."""
    rows = torch.randint(1, 13, (24, 21), generator=torch.Generator().manual_seed(3))
    names = [str(i // 2) for i in range(24)]
    return Sequences(
        rows[:, :-1], rows[:, 1:], torch.arange(24), names, names, torch.full((24,), 20)
    )


@pytest.mark.parametrize("kind", ["smoe_share", "cartesian", "parallel"])
def test_a_duplicate_costs_nothing(model_of, docs, kind):
    """Linear and measured, also where both are chosen; other experts do cost something."""
    model = own_copy(model_of(kind))
    site = model.sites()[0]
    duplicate(model, site, 1, 4)
    model.model(docs.tokens_SL)
    flows = Watch()
    with model.hooked(experts=flows):
        model.model(docs.tokens_SL)
    ids_TK = flows[site].routing.ids_TK
    both_T = (ids_TK == 1).any(-1) & (ids_TK == 4).any(-1)
    assert both_T.sum() > 10
    table = substitution(model, docs, site, lowest=0, random=30, **QUIET)
    same = (table.expert_i.isin([1, 4])) & (table.expert_j.isin([1, 4]))
    assert same.sum() == 2
    assert (table[same][["linear", "measured"]].abs() < 1e-6).all(axis=None)
    assert (table[~same][["linear", "measured"]].abs() > 1e-4).all(axis=None)


@pytest.mark.parametrize("downstream", ["reroute", "replay"])
def test_measured_is_what_an_edited_forward_gives(model_of, docs, downstream):
    model = model_of("cartesian")
    site = model.sites()[1]
    table = substitution(
        model, docs, site, lowest=2, random=3, downstream=downstream, batch_size=24, **QUIET
    )
    recorded = {}
    with model.hooked(router=lambda r, router, s, x: recorded.setdefault(s, r)):
        clean = summed_nll(model, docs)
    done = table[table.chosen != ""]
    assert len(done) == 5
    for row in done.itertuples():

        def edit(routing, router, at, x_TD, row=row):
            if downstream == "replay":
                routing = recorded[at]
            if at != site:
                return routing
            ids_TK = routing.ids_TK.clone()
            ids_TK[ids_TK == row.expert_i] = row.expert_j
            return routing._replace(ids_TK=ids_TK)

        with model.hooked(router=edit):
            change = (summed_nll(model, docs) - clean).item()
        assert row.num_tokens == (recorded[site].ids_TK == row.expert_i).sum()
        assert row.measured == pytest.approx(change / row.num_tokens, abs=2e-6)
        assert row.low <= row.measured <= row.high


def test_what_is_chosen(model_of, docs):
    model = model_of("smoe_share")
    table = substitution(model, docs, "layer 0", lowest=4, random=6, **QUIET)
    assert table.shape[0] == 30
    assert (
        table[["model", "layer", "stage", "downstream"]] == ["smoe_share", 0, 0, "reroute"]
    ).all(axis=None)
    order = table.sort_values("linear")
    assert (order.chosen[:4] == "lowest").all()
    assert (order.chosen[4:] == "random").sum() == 6
    assert order.probability.tolist() == [1.0] * 4 + [6 / 26] * 26
    assert (table.measured.notna() == (table.chosen != "")).all()
    again = substitution(model, docs, "layer 0", lowest=4, random=6, **QUIET)
    pd.testing.assert_frame_equal(table, again)
    other = substitution(model, docs, "layer 0", lowest=4, random=6, seed=1, **QUIET)
    assert (other.chosen != table.chosen).any()
    whole = substitution(model, docs, "layer 0", lowest=0, random=99, **QUIET)
    assert (whole.chosen == "random").all()
    assert (whole.probability == 1).all()


def test_linear_becomes_exact_for_small_changes(model_of, docs):
    """Expert j = i + eps (j - i): the ratio of measured to linear tends to 1."""
    apart, slopes = [], []
    for eps in (0.3, 0.03):
        model = own_copy(model_of("cartesian"))
        model.model.double()
        site = model.sites()[-1]  # no router behind it, which might choose otherwise
        for weight in model.expert_weights(site):
            weight.data[1:] = weight.data[:1].lerp(weight.data[1:], eps)
        table = substitution(model, docs, site, lowest=0, random=99, **QUIET)
        apart.append((table.measured / table.linear - 1).abs().median())
        (row,) = calibration(table).to_dict("records")
        slopes.append(row["slope"])
    assert apart[1] < 0.01
    assert apart[1] < apart[0] / 5
    assert abs(slopes[1] - 1) < 0.01


def test_relabelling_experts_relabels_the_result(model_of, docs):
    model = own_copy(model_of("cartesian"))
    site = model.sites()[0]
    before = square(model, docs, site)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for weight in (*model.expert_weights(site), model.router(site).rows):
        weight.data.copy_(weight.data[order].clone())
    after = square(model, docs, site)
    np.testing.assert_allclose(after, before[order][:, order], rtol=1e-4, atol=1e-7)


def test_calibration_of_a_planted_frame():
    linear = np.arange(1.0, 11.0)
    frame = pd.DataFrame({"linear": linear, "measured": 0.25 + 2 * linear})
    frame = frame.assign(chosen=["lowest"] * 4 + ["random"] * 3 + [""] * 3)
    frame = frame.assign(probability=[1.0] * 4 + [0.5] * 6, downstream="reroute")
    frame = frame.assign(**dict(zip(SITE, ["m", "smoe", 0, 2, 1], strict=True)))
    frame.loc[frame.chosen == "", "measured"] = np.nan
    (row,) = calibration(frame).to_dict("records")
    assert (row["layer"], row["stage"]) == (2, 1)
    assert row["slope"] == pytest.approx(2)
    assert row["intercept"] == pytest.approx(0.25)
    assert row["rank_correlation"] == pytest.approx(1)
    assert (row["num_pairs"], row["num_all"]) == (7, 10)
    # The lowest 1..4 stand for themselves, 5, 6 and 7 for two each.
    mean = (10 + 2 * (5 + 6 + 7)) / 10
    assert row["mean_measured"] == pytest.approx(0.25 + 2 * mean)
    assert row["mean_error"] == pytest.approx(0.25 + mean)
    assert row["mean_measured_se"] == pytest.approx(0.6 * np.sqrt(0.5 * 4 / 3))


def test_calibration_is_of_ranks_and_sites_are_drawn_apart():
    linear = np.arange(-6.0, 7.0)
    frame = pd.DataFrame({"linear": linear, "measured": linear**5, "chosen": "random"})
    frame = frame.assign(probability=1.0, downstream="reroute")
    frame = frame.assign(**dict(zip(SITE, ["m", "smoe", 0, 2, 1], strict=True)))
    assert calibration(frame).rank_correlation.item() == pytest.approx(1)
    one, other = (_choose(frame.assign(layer=layer), 2, 5, 0).chosen for layer in (0, 2))
    assert (one != other).any()


def test_the_estimated_mean_has_no_bias_and_the_error_that_it_says():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"linear": rng.normal(size=40)})
    frame["truth"] = frame.linear + rng.normal(size=40) + 1
    frame = frame.assign(**dict(zip(SITE, ["m", "smoe", 0, 2, 1], strict=True)))
    rows = []
    for seed in range(150):
        drawn = frame.join(_choose(frame, 8, 8, seed)).assign(downstream="reroute")
        drawn["measured"] = drawn.truth.where(drawn.chosen != "")
        rows.append(calibration(drawn))
    table = pd.concat(rows)
    spread = table.mean_measured.std()
    assert table.mean_measured.mean() == pytest.approx(
        frame.truth.mean(), abs=4 * spread / 150**0.5
    )
    assert (table.mean_measured_se**2).mean() ** 0.5 == pytest.approx(spread, rel=0.2)


def test_an_expert_that_gives_little_is_missed_as_the_estimate_says(model_of, docs):
    model = own_copy(model_of("smoe_share"))
    model.model.double()
    site = model.sites()[-1]
    model.expert_weights(site)[2].data[:] *= 0.02
    linear = measure_overlap(model, docs, "removal_linear", site, progress=False).experts
    table = expert_damage(model, docs, sites=site, refill=False, progress=False)
    per_routed = table.damage / (table.load * site.top_k)
    large = linear.value.abs() > 2e-4
    assert large.sum() >= 3
    np.testing.assert_allclose(per_routed[large], linear.value[large], rtol=0.05)


def test_an_unused_expert_is_nan(tiny_model, docs):
    model = as_adapter(copy.deepcopy(tiny_model("hash")))
    site = model.sites()[0]
    model.router(site).gate.table_VE[:, 5] = -50.0
    linear = measure_overlap(model, docs, "removal_linear", site, progress=False).experts
    assert linear.value[linear.expert == 5].isna().all()
    pairs = substitution(model, docs, site, lowest=2, random=99, **QUIET)
    assert (pairs[pairs.expert_i == 5].chosen == "").all()
    assert pairs[pairs.expert_i == 5][["linear", "measured", "probability"]].isna().all(axis=None)
    assert pairs[pairs.expert_i != 5].measured.notna().all()


def test_the_perturbation(model_of, docs):
    perturbation = Substitute(2, 5)
    assert perturbation.label == "Substitute(expert=2, by=5)"
    assert perturbation.expects == "selection"
    with pytest.raises(ValueError, match="by is 2; it must be another"):
        Substitute(2, 2)
    with pytest.raises(ValueError, match="expert is -1"):
        Substitute(-1, 2)
    with pytest.raises(ValueError, match=r"by is 6; .* has experts 0\.\.5"):
        measure(model_of("smoe"), [Condition(Substitute(2, 6))], docs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lowest=-1), "lowest is -1"),
        (dict(random=2.5), "random is 2.5"),
        (dict(lowest=0, random=0), "lowest and random are 0"),
        (dict(downstream="clean"), "downstream is 'clean'; choose one of"),
        (dict(site="layer 9"), "site is 'layer 9'"),
    ],
)
def test_wrong_arguments(model_of, docs, options, message):
    with pytest.raises(ValueError, match=message):
        substitution(model_of("smoe"), docs, progress=False, **options)


def test_an_only_expert_has_no_substitute(tiny_model, docs):
    model = tiny_model("cartesian", num_experts=1, top_k=1)
    with pytest.raises(ValueError, match=r"site is 'stage 1'; .* has no other expert"):
        substitution(model, docs, "stage 1", progress=False)


def test_dense(model_of, docs):
    with pytest.raises(ValueError, match="dense has no router"):
        substitution(model_of("dense"), docs)
