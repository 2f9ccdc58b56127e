"""Doses of a changed decision, and how decided a clean one was: by hand."""

import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.measure.doses import certainty_of, change_of
from analysis.measure.shard import measure
from analysis.perturb.condition import Condition
from analysis.perturb.decisions import NoRouted, UniformWeights
from analysis.perturb.masks import DropTop
from cartmoe.routing import Router, Routing


def routing(ids, weights, scores=None):
    scores_TE = torch.zeros(1, 4) if scores is None else torch.tensor([scores])
    return Routing(scores_TE.log(), scores_TE, torch.tensor([ids]), torch.tensor([weights]))


R = routing([0, 1], [0.75, 0.25])
DROPPED = routing([1, 2], [2 / 3, 1 / 3])
HALF = routing([1, 2], [0.25, 0.0])


def test_doses():
    r, dropped, half = map(DenseRouting, (R, DROPPED, HALF))
    got = {name: value.item() for name, value in change_of(r, dropped, r).items()}
    assert got == pytest.approx(
        dict(flips=0.5, flips_total=0.5, changed=1, mass_moved=0.75, mass_lost=0.75, active=2)
    )
    got = {name: value.item() for name, value in change_of(r, half, dropped).items()}
    assert got == pytest.approx(
        dict(flips=0.5, flips_total=0.5, changed=1, mass_moved=0.375, mass_lost=0.75, active=1)
    )
    nothing = change_of(r, r, r)
    assert all(nothing[name] == 0 for name in nothing.keys() - {"active"})


def test_more_experts_are_a_change_without_a_flip():
    r, wider = map(DenseRouting, (R, routing([0, 1, 2], [0.6, 0.2, 0.2])))
    got = {name: value.item() for name, value in change_of(r, wider, r).items()}
    assert got == pytest.approx(
        dict(flips=0, flips_total=0, changed=1, mass_moved=0.2, mass_lost=0, active=3)
    )


def test_an_expert_in_two_slots_counts_once():
    twice = DenseRouting(routing([2, 2], [0.5, 0.25]))
    assert twice.weights_TE.tolist() == [[0, 0, 0.75, 0]]
    assert twice.count_T == 1


def test_nobody_used():
    none, r = map(DenseRouting, (routing([0, 1], [0.0, 0.0]), R))
    got = {name: value.item() for name, value in change_of(none, r, none).items()}
    assert got == dict(flips=0, flips_total=0, changed=1, mass_moved=0.5, mass_lost=0, active=2)


# ---- certainty


def certainty(router, logits):
    clean = router.route(torch.tensor([logits]))
    return {k: v.item() for k, v in certainty_of(clean, DenseRouting(clean), router).items()}


@pytest.mark.parametrize(
    ("k", "margin"), [(1, 1.5), (2, 1.5), (3, 1.0), (4, 0.0)], ids=lambda value: str(value)
)
def test_margin_of_top_k(k, margin):
    """z_(k) - z_(k+1); 0 if all are used."""
    assert certainty(Router(None, 4, k), [1.0, 4.0, 2.5, 0.0])["margin"] == pytest.approx(margin)


def test_margin_of_ties_is_none():
    assert certainty(Router(None, 4, 2), [1.0, 4.0, 1.0, 0.0])["margin"] == 0


def test_margin_with_a_bias_is_that_of_selection_scores():
    """The bias makes expert 3 the second, whose logit is the lowest."""
    router = Router(None, 4, 2, score="sigmoid")
    router.selection_bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 0.9]))
    logits = [1.0, 4.0, 2.5, 0.0]
    scores = [1 / (1 + torch.e ** -torch.tensor(z)).item() for z in logits]
    chosen = sorted(s + b for s, b in zip(scores, [0, 0, 0, 0.9], strict=True))[::-1]
    expected = chosen[1] - chosen[2]
    assert certainty(router, logits)["margin"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("p", "margin"),
    [
        (0.45, 0.05),  # one is used; the sum 0.5 has passed p by 0.05
        (0.52, 0.02),  # two: before the second the sum was 0.5, 0.02 short of p
        (0.7, 0.1),  # two: 0.8 - 0.7
        (0.96, 0.01),  # four; before the last the sum was 0.95
        (0.999, 0.001),  # all: the sum of 1 has passed p by 0.001
    ],
)
def test_margin_of_top_p(p, margin):
    """The distance of the running sum to p, on the nearer side."""
    router = Router(None, 4, 2, top_p=p, renormalize=False)
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert certainty(router, logits)["margin"] == pytest.approx(margin, abs=1e-6)


def test_margin_of_top_p_that_the_sum_never_exceeds():
    router = Router(None, 4, 2, top_p=0.9, renormalize=False)
    scores_TE = torch.tensor([[0.3, 0.2, 0.1, 0.0]])  # after a mask at point "scores"
    clean = router.decide(scores_TE.log(), scores_TE)
    assert router.margin(clean, torch.tensor([3])).item() == pytest.approx(0.3)


def test_a_margin_is_what_the_decision_withstands():
    """Raising the best expert that is out by less leaves the set, by more does not."""
    router, logits_TE = Router(None, 6, 2), torch.randn(50, 6)
    clean = router.route(logits_TE)
    dense = DenseRouting(clean)
    margin_T = router.margin(clean, dense.count_T)
    next_T1 = logits_TE.sort(descending=True).indices[:, 2:3]
    for factor, same in ((0.99, True), (1.01, False)):
        moved_TE = logits_TE.scatter_add(-1, next_T1, factor * margin_T[:, None])
        again = DenseRouting(router.route(moved_TE))
        assert (again.used_TE == dense.used_TE).all(-1).eq(same).all()


def test_entropy():
    logits = torch.tensor([1.0, 4.0, 2.5, 0.0])
    for score in ("softmax", "sigmoid"):
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        p = scores / scores.sum()
        got = certainty(Router(None, 4, 2, score=score), logits.tolist())["entropy"]
        assert got == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    assert certainty(Router(None, 4, 2), [0.0, 200.0, 0.0, 0.0])["entropy"] == 0


# ---- change of the layer's output


@pytest.mark.parametrize("kind", ["smoe", "cartesian", "parallel"])
def test_output_change(model_of, shard, kind):
    """||change of what the layer adds|| / ||stream before it||, summed over the tokens."""
    model = model_of(kind)
    site = model.sites()[0]
    conditions = [
        Condition(p, "layer 0 stage 0") for p in (DropTop(1), UniformWeights(), NoRouted())
    ]
    _, *cells = measure(model, conditions, shard, reuse=())
    used_SL = shard.targets_SL >= 0
    with torch.no_grad():
        stream, outputs = stream_and_outputs(model, site, shard.tokens_SL, conditions)
    clean, *changed = outputs
    for cell, output_TD in zip(cells, changed, strict=True):
        ratio_T = (output_TD - clean).norm(dim=-1) / stream.norm(dim=-1)
        expected_S = (ratio_T.view_as(used_SL) * used_SL).sum(-1)
        rows = cell.routing[(cell.routing.layer == 0) & (cell.routing.stage == 0)]
        got_S = torch.tensor(rows.output_change.to_numpy())
        torch.testing.assert_close(got_S.float(), expected_S, rtol=1e-3, atol=1e-5)


def stream_and_outputs(model, site, tokens_SL, conditions):
    """What enters the layer of the site; what its stages add, clean and under each condition."""
    from analysis.adapters import State
    from analysis.measure.intervene import perturbed

    state = State(None, tokens_SL)
    for segment in model.segments():
        if site in segment.sites:
            break
        state = segment.run(state)
    outputs = []
    for condition in (None, *conditions):
        if condition is None:
            after = segment.run(state)
        else:
            seen = {}

            def keep(output_TD, site, seen=seen):
                seen[site] = output_TD

            with perturbed(model, condition.perturbation, site), model.hooked(output=keep):
                model.model(tokens_SL)
            total = sum(seen[s] for s in segment.sites)
            outputs.append(state.hidden_BLD.flatten(0, 1) + total)
            continue
        outputs.append(after.hidden_BLD.flatten(0, 1))
    return state.hidden_BLD.flatten(0, 1), outputs
