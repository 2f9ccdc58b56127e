"""Expert outputs from a table, against the experts themselves."""

import numpy as np
import pytest

from analysis.measure.reuse import worth_reusing
from analysis.measure.shard import measure
from analysis.perturb.base import Identity
from analysis.perturb.compound import Compose, ResidualNoise
from analysis.perturb.condition import Condition
from analysis.perturb.decisions import DropSlots, Lag, NoRouted, TopK, UniformWeights
from analysis.perturb.flips import Worst
from analysis.perturb.logits import GaussianNoise
from analysis.perturb.masks import DropChosen, DropTop, DropUnchosen

from ..routers import KINDS, hooks_of

PERTURBATIONS = [
    *(DropTop(1), DropTop(2), DropChosen(1), GaussianNoise(1.0), TopK(1), TopK(5), DropSlots(0.5)),
    *(NoRouted(), UniformWeights(), Lag(1), Worst(1), ResidualNoise()),
    Compose((DropTop(1), DropSlots(0.2))),
]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "parallel"])
def test_a_table_only_rounds(model_of, shard, kind):
    """Within 1e-5 nats a token, at each router that a condition may begin with."""
    model = model_of(kind)
    for site in model.sites()[:2]:
        conditions = [Condition(p, site) for p in PERTURBATIONS]
        direct = measure(model, conditions, shard, reuse=())
        table = measure(model, conditions, shard, reuse=conditions)
        assert not hooks_of(model.model)
        for a, b in zip(direct, table, strict=True):
            tokens = a.losses.num_tokens
            for column in ("nll_sum", "kl_sum"):
                apart = (a.losses[column] - b.losses[column]) / tokens
                assert apart.abs().max() < 1e-5, a.condition
            for dose in ("flips", "mass_moved", "active"):
                np.testing.assert_allclose(a.routing[dose], b.routing[dose], atol=1e-4)


def test_what_must_change_nothing_reuses_nothing(model_of):
    """However many conditions begin at the site."""
    model = model_of("smoe_share")
    nothing = [Condition(Identity(), "layer 0"), Condition(DropUnchosen(1), "layer 0")]
    nothing += [Condition(DropUnchosen(m), "layer 0") for m in range(2, 12)]
    some = [Condition(DropTop(1), "layer 0", eval_seed=i) for i in range(12)]
    assert not worth_reusing(model, nothing, 64)
    assert set(worth_reusing(model, nothing + some, 64)) == set(some)


def test_few_conditions_are_not_worth_a_table(model_of):
    model = model_of("smoe_share")  # E / K is 3
    some = [Condition(DropTop(1), "layer 0", eval_seed=i) for i in range(6)]
    assert set(worth_reusing(model, some, 64)) == set(some)
    assert not worth_reusing(model, some[:5], 64)
    assert not worth_reusing(model, some, 2**30)  # a table too large


def test_parallel_stages_have_no_table(model_of):
    """They read the same stream in one segment."""
    model = model_of("parallel")
    assert not worth_reusing(model, [Condition(DropTop(1), eval_seed=i) for i in range(50)], 64)
