"""The best of n other routes, against brute force and where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.adapters import DenseRouting
from analysis.measure.intervene import perturbed
from analysis.measure.regret import SEEDS, Alternative, regret
from analysis.measure.shard import measure
from analysis.perturb.condition import Condition
from analysis.perturb.logits import GumbelNoise
from cartmoe.data import Sequences
from cartmoe.routing import Router

OPTIONS = dict(batch_size=4, progress=False)


def docs_of(documents=12, length=24, seed=0) -> Sequences:
    """Random tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 13, (documents, length + 1), generator=generator)
    names = [str(i) for i in range(documents)]
    size = torch.full((documents,), length)
    return Sequences(rows[:, :-1], rows[:, 1:], torch.arange(documents), names, names, size)


def token_nll(cells):
    """(conditions, tokens); the clean run first."""
    return np.stack([np.concatenate([np.frombuffer(n, np.float32) for n in c.tokens.nll])
                     for c in cells])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "where"),
    [("cartesian", "layer 0 stage 1"), ("top_p", "layer 2"), ("parallel", "layer 0 stage 0")],
)
@pytest.mark.parametrize("n", [3, 12])  # without and with a table of the experts' outputs
def test_against_brute_force(model_of, shard, kind, where, n):
    model = model_of(kind)
    conditions = [Condition(Alternative(2.0), where, eval_seed=SEEDS + i) for i in range(n)]
    nll = token_nll(measure(model, conditions, shard, reuse=(), keep_tokens=True))
    table = regret(model, shard, where, n=n, tau=2.0, seed=1, **OPTIONS)
    expected = nll[0] - nll[1:].min(0)
    assert table.n.tolist() == {3: [1, 2, 3], 12: [1, 2, 4, 8, 12]}[n]
    last = table.iloc[-1]
    assert last.regret == pytest.approx(expected.mean(), abs=1e-6)
    assert last.cost == pytest.approx((nll[1:] - nll[0]).mean(), abs=1e-6)
    assert table.regret[0] == pytest.approx((nll[0] - nll[1]).mean(), abs=1e-6)
    assert table.regret.is_monotonic_increasing
    np.testing.assert_allclose(table.excess, table.regret - table.null, atol=1e-9)
    assert (last.num_documents, last.num_tokens, last["where"]) == (4, 41, table["where"][0])


def test_more_alternatives_begin_with_the_same(model_of, shard):
    few, many = (
        regret(model_of("cartesian"), shard, "layer 2 stage 0", n=n, **OPTIONS) for n in (2, 4)
    )
    columns = ["regret", "null", "excess", "cost"]
    np.testing.assert_allclose(few[columns], many[columns][:2], atol=1e-9)
    other = regret(model_of("cartesian"), shard, "layer 2 stage 0", n=2, seed=1, **OPTIONS)
    assert other.regret[0] != few.regret[0]


def test_equal_experts_leave_nothing_to_regret(tiny_model, shard):
    model = tiny_model("smoe_share")
    experts = model.trunk.blocks[2].ffn.stages[0].experts
    with torch.no_grad():
        experts.gate_up_ECD[:] = experts.gate_up_ECD[0].clone()
        experts.down_EDF[:] = experts.down_EDF[0].clone()
    table = regret(model, shard, "layer 2", n=4, tau=5.0, **OPTIONS)
    assert table[["regret", "null", "excess", "cost"]].abs().to_numpy().max() < 1e-6
    assert regret(model, shard, "layer 0", n=4, tau=5.0, **OPTIONS).cost.abs().max() > 1e-3


def test_random_targets_have_no_excess(model_of):
    """They are as good as shuffled ones."""
    docs = docs_of(documents=40)
    last = regret(model_of("cartesian"), docs, "layer 2 stage 0", n=8, **OPTIONS).iloc[-1]
    assert last.excess_low < 0 < last.excess_high
    assert last.regret_low > 0
    assert last.null_low > 0


def test_planted_regret_is_found(model_of):
    """Targets are those tokens that the first alternative route makes more probable most of all."""
    model, where = model_of("cartesian"), "layer 2 stage 0"
    docs = docs_of()
    with torch.no_grad():
        clean_SLV = model.model(docs.tokens_SL)
        with perturbed(model, Alternative(3.0), where, sequence_ids=docs.sequence_id_S):
            other_SLV = model.model(docs.tokens_SL)
    gain_SLV = other_SLV.log_softmax(-1) - clean_SLV.log_softmax(-1)
    planted = replace(docs, targets_SL=gain_SLV.argmax(-1))
    last = regret(model, planted, where, n=4, tau=3.0, **OPTIONS).iloc[-1]
    assert last.excess_low > 0
    assert last.regret > gain_SLV.amax(-1).mean() - 1e-6  # the best of four, one of which is that


def test_tokens_apart(model_of, shard):
    """Behind the last router nothing mixes tokens, so it does not matter; before it does."""
    model = model_of("cartesian")
    for where, same in (("layer 2 stage 1", True), ("layer 0 stage 0", False)):
        a, b = (regret(model, shard, where, n=2, every=e, **OPTIONS).iloc[-1] for e in (1, 3))
        assert (abs(a.regret - b.regret) < 1e-6) == same
        assert (a.every, b.every) == (1, 3)


@pytest.mark.parametrize(
    "options", [{}, dict(top_p=0.4), dict(renormalize=False), dict(score="sigmoid")], ids=str
)
def test_alternatives_cost_the_same(context_of, options):
    """As many experts, with the weights that the router gives them."""
    router = Router(None, 6, 2, **({"renormalize": False} if "top_p" in options else {}), **options)
    clean, ctx = context_of(router, torch.randn(300, 6))
    got = Alternative(1.0).decide(clean, router, ctx)
    a, b = DenseRouting(clean), DenseRouting(got)
    assert a.count_T.equal(b.count_T)
    assert (a.used_TE != b.used_TE).any(-1).double().mean() > 0.3
    given_TE = got.scores_TE * b.used_TE
    if router.renormalize:
        given_TE = given_TE / given_TE.sum(-1, keepdim=True)
    torch.testing.assert_close(b.weights_TE, given_TE)
    assert got.logits_TE is clean.logits_TE
    same = Alternative(0.0).decide(clean, router, ctx)
    torch.testing.assert_close(DenseRouting(same).weights_TE, a.weights_TE)
    noisy = GumbelNoise(1.0)(clean.logits_TE, ctx)
    if not router.top_p:
        assert got.ids_TK.equal(router.route(noisy).ids_TK)


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ("layer 0", {}, "site is 'layer 0', which is layer 0 stage 0, layer 0 stage 1; give one"),
        ("all", {}, "site is 'all', which is layer 0 stage 0, .*; give one"),
        ("layer 1", {}, "site is 'layer 1'"),
        ("layer 0 stage 0 positions 0:2", {}, "routers of .*, all their tokens"),
        ("layer 0 stage 0", dict(n=0), "n is 0"),
        ("layer 0 stage 0", dict(every=0), "every is 0"),
        ("layer 0 stage 0", dict(n=1.5), "n is 1.5"),
        ("layer 0 stage 0", dict(tau=-1.0), "tau is -1.0; it must"),
    ],
)
def test_wrong_arguments(model_of, shard, site, options, message):
    with pytest.raises(ValueError, match=message):
        regret(model_of("cartesian"), shard, site, **OPTIONS, **options)


def test_dense_and_empty(model_of, shard):
    with pytest.raises(ValueError, match="dense has no router"):
        regret(model_of("dense"), shard, "layer 0", **OPTIONS)
    with pytest.raises(ValueError, match="docs has no sequence"):
        regret(model_of("cartesian"), shard[:0], "layer 0 stage 0", **OPTIONS)
    site = model_of("cartesian").sites()[2]
    assert regret(model_of("cartesian"), shard, site, n=1, **OPTIONS)["where"][0] == (
        "layer 2 stage 0"
    )
