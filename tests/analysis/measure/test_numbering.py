"""Numbers of experts between models that descend from one another, and that were trained apart."""

import copy

import pytest
import torch

import analysis as an
from analysis.adapters import DenseRouting, as_adapter, clean_routing
from analysis.measure.numbering import matched_by_usage, renumbered, same_numbers

QUIET = dict(progress=False, controls=False)


def shuffled(model, seed=0):
    """The same function, with its experts in another order."""
    other = copy.deepcopy(model.model)
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    for site in as_adapter(other).sites():
        stage = other.get_submodule(site.name.removesuffix(".router"))
        order = torch.randperm(site.num_experts, generator=generator)
        with torch.no_grad():
            stage.router.gate.weight.copy_(stage.router.gate.weight[order].clone())
            stage.experts.gate_up_ECD.copy_(stage.experts.gate_up_ECD[order].clone())
            stage.experts.down_EDF.copy_(stage.experts.down_EDF[order].clone())
        orders[site.place] = order
    return as_adapter(other), orders


@pytest.mark.parametrize("kind", ["smoe_share", "cartesian"])
def test_a_model_with_its_experts_shuffled_is_the_same(model_of, shard, kind):
    """Of the same weights in another order nothing is left but rounding."""
    model = model_of(kind)
    other, orders = shuffled(model)
    assert not same_numbers(model, other)
    found = matched_by_usage(model, {"other": other}, shard, 16)["other"]
    for site, routing in clean_routing(model, shard.tokens_SL).items():
        load_E = DenseRouting(routing).used_TE[(shard.targets_SL >= 0).flatten()].sum(0)
        order = orders[site.place]
        used = load_E[order] > 0  # the others are as good as one another
        assert found[site.place][used].equal(order[used])
    comparison = an.compare({"base": model, "other": other}, shard, an.DropTop(1), **QUIET)
    drift = comparison.drift()
    assert (drift.experts == "matched by usage").all()
    assert (drift[["flips", "changed"]] == 0).all(axis=None)
    assert "(experts matched by usage)" in repr(comparison)


def test_a_tuned_model_keeps_its_numbers(model_of, shard):
    model = model_of("cartesian")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    assert same_numbers(model, tuned)
    comparison = an.compare({"base": model, "tuned": tuned}, shard, an.DropTop(1), **QUIET)
    assert comparison.numbers == {}
    assert (comparison.drift().experts == "as numbered").all()


def test_models_trained_apart_are_matched(model_of, tiny_model, shard):
    model, other = model_of("cartesian"), as_adapter(tiny_model("cartesian", seed=7))
    asked = [an.Replay("base"), an.GateSwap("base")]
    comparison = an.compare({"base": model, "other": other}, shard, asked, **QUIET)
    drift = comparison.drift()
    assert (drift.experts == "matched by usage").all()
    assert (comparison.drift_cost().experts == "trained apart").all()
    by_number = []
    for site, routing in clean_routing(model, shard.tokens_SL).items():
        theirs = clean_routing(other, shard.tokens_SL)[site]
        used_T = (shard.targets_SL >= 0).flatten()
        mine_TE, theirs_TE = (DenseRouting(r).used_TE[used_T] for r in (routing, theirs))
        by_number.append((mine_TE & ~theirs_TE).sum() / mine_TE.sum())
    overall = drift[drift["where"] == "all"].flips.item()
    assert overall < torch.stack(by_number).mean()


def test_renumbered_decisions(model_of, shard):
    model = model_of("smoe_share")
    site = model.sites()[0]
    routing = clean_routing(model, shard.tokens_SL)[site]
    number_E = torch.tensor([2, 0, 1, 5, 3, 4])
    found = renumbered(routing, number_E)
    assert found.scores_TE[:, number_E].equal(routing.scores_TE)
    before, after = DenseRouting(routing), DenseRouting(found)
    assert after.weights_TE[:, number_E].equal(before.weights_TE)


def test_other_shapes_are_other_experts(model_of, tiny_model):
    narrow = as_adapter(tiny_model("cartesian", ffn_width=16))
    assert not same_numbers(model_of("cartesian"), narrow)
