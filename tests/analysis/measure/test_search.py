"""The search for the worst flips: what it promises, against slow computations of the same."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.adapters.base import as_adapter
from analysis.measure.clean import CleanPass
from analysis.measure.search import _Task, search
from analysis.measure.shard import measure
from analysis.perturb.base import Identity
from analysis.perturb.condition import Condition
from analysis.perturb.flips import Flips, Worst
from cartmoe.data import IGNORE, Sequences

from ..routers import hooks_of

KIND = pytest.mark.parametrize("kind", ["smoe_share", "top_p", "cartesian", "sigmoid", "top1"])
PER = pytest.mark.parametrize("per", ["token", "sequence"])


def found(model, shard, worst, where="all", **options):
    """(its flips on the shard as one batch, by site the tokens whose expert i runs as j)."""
    condition = Condition(worst, where, **options)
    flips = search(worst, model, CleanPass.of(model, shard), condition)
    moved = {
        place: expert_TE != torch.arange(expert_TE.shape[-1])
        for place, expert_TE in flips.expert_TE.items()
    }
    return flips, moved


def number(moved) -> torch.Tensor:
    """(T,) flips, over all routers."""
    return sum(m.sum(-1) for m in moved.values())


# ---- within the budget


@pytest.mark.parametrize("kind", ["top_p", "cartesian"])
@PER
@pytest.mark.parametrize("choose", ["worst", "random"])
@pytest.mark.parametrize(("flips", "rounds"), [(1, 1), (1, 3), (3, 2), (4, 4)])
def test_budget(model_of, shard, kind, per, choose, flips, rounds):
    model = model_of(kind)
    worst = Worst(flips, per=per, rounds=rounds, choose=choose)
    _, moved = found(model, shard, worst)
    text_SL = shard.targets_SL != IGNORE
    number_SL = number(moved).view_as(text_SL)
    assert (number_SL[~text_SL] == 0).all()  # none on padding
    per_unit = number_SL if per == "token" else number_SL.sum(-1)
    assert per_unit.max() <= flips
    assert per_unit.max() > 0


@KIND
def test_flips_are_of_experts_in_use_to_others(model_of, shard, kind):
    model = model_of(kind)
    clean = CleanPass.of(model, shard)
    flips, moved = found(model, shard, Worst(2, rounds=1))
    for site, routing in clean.routings.items():
        place = (site.layer, site.stage)
        used_TE, moved_TE = clean.dense[site].used_TE, moved[place]
        assert not (moved_TE & ~used_TE).any()
        targets = flips.expert_TE[place][moved_TE]
        tokens = moved_TE.nonzero()[:, 0]
        assert not used_TE[tokens, targets].any()
        changed = routing._replace(ids_TK=flips.expert_TE[place].gather(-1, routing.ids_TK))
        after = type(clean.dense[site])(changed)
        assert after.count_T.equal(clean.dense[site].count_T)  # no two flips to one expert
        torch.testing.assert_close(
            after.weights_TE.sort().values, clean.dense[site].weights_TE.sort().values
        )


def test_where(model_of, shard):
    """Only at the sites, positions and routers of the condition."""
    model = model_of("cartesian")
    _, moved = found(model, shard, Worst(1), "stage 1 positions 2:4")
    assert set(moved) == {(0, 1), (2, 1)}
    number_SL = number(moved).view(shard.targets_SL.shape)
    assert (number_SL[:, :2] == 0).all()
    assert (number_SL[:, 4:] == 0).all()
    assert number_SL[:, 2:4].any()


def test_a_budget_beyond_all_there_is_to_flip(model_of, shard):
    """Each slot flips once; there are K a site, and E - K experts to flip to."""
    model = model_of("smoe_share")  # E 6, K 2, two sites
    text_T = shard.targets_SL.flatten() != IGNORE
    _, moved = found(model, shard, Worst(100, choose="random"))
    assert number(moved)[text_T].eq(4).all()
    _, moved = found(model, shard, Worst(100, per="sequence"))
    assert number(moved).max() <= 4


# ---- the first-order gain


def double(model):
    return as_adapter(copy.deepcopy(model.model).double())


@pytest.mark.parametrize(("kind", "last"), [("smoe_share", 1), ("smoe_share", 0), ("cartesian", 0)])
def test_gain_is_the_derivative(model_of, shard, kind, last):
    """Against differences: an epsilon of the flip is made in the routed output. At the last router
    all is fp64; elsewhere later routers' fp32 is in between."""
    model = double(model_of(kind))
    site = model.sites()[-1 if last else 0]
    place = (site.layer, site.stage)
    condition = Condition(Identity(), f"layer {site.layer} stage {site.stage}")
    clean = CleanPass.of(model, shard)
    task = _Task(Worst(1), model, clean, condition)
    gain_TKE, ids_TK = task.gains(Flips())[site]
    assert ids_TK.equal(clean.routings[site].ids_TK)
    # In which slots a flip is one: those in use, of text, to experts not in use.
    text_T = shard.targets_SL.flatten() != IGNORE
    allowed_TKE = text_T[:, None, None] & ~clean.dense[site].used_TE[:, None]
    assert (gain_TKE > -torch.inf).equal(allowed_TKE.expand_as(gain_TKE))
    eps = 1e-4 if last else 1e-3
    tokens = text_T.nonzero()[:, 0]
    for t in tokens[:: len(tokens) // 6].tolist():
        for k, e in ((0, 1), (1, 2), (1, 5)):
            if gain_TKE[t, k, e] == -torch.inf:
                continue
            up, down = (loss_of(model, shard, site, t, k, e, sign * eps) for sign in (1, -1))
            slope = (up - down) / (2 * eps)
            assert gain_TKE[t, k, e].item() == pytest.approx(slope, rel=2e-2, abs=2e-3), place


def loss_of(model, shard, site, t, k, e, eps):
    """Summed nll in fp64 where token t's slot k works by (1 - eps) as it is and by eps as e."""
    stage = model.model.get_submodule(site.name.removesuffix(".router"))

    def mixed(x_TD, routing, at, own):
        out_TD = type(stage.experts).forward(stage.experts, x_TD, routing).clone()
        i, weight = routing.ids_TK[t, k].item(), routing.weights_TK[t, k].double()
        f_i, f_e = model.expert_outputs(site, x_TD[t : t + 1], [i, e])[:, 0]
        out_TD[t] += eps * weight * (f_e - f_i)
        return out_TD

    with torch.no_grad(), model.hooked(experts=mixed, where=site.__eq__):
        logits = model.model(shard.tokens_SL)
    return F.cross_entropy(
        logits.transpose(1, 2), shard.targets_SL, reduction="sum", ignore_index=IGNORE
    ).item()


def test_greedy_takes_the_largest_gains(model_of, shard):
    """Per token the best flip, then the best of those it leaves; per sequence the best of all."""
    model = model_of("cartesian")
    clean = CleanPass.of(model, shard)
    for per, budget in (("token", 2), ("sequence", 5)):
        task = _Task(Worst(budget, per=per), model, clean, Condition(Identity()))
        gains = task.gains(Flips())
        same_TE = torch.arange(6).repeat(len(clean.tokens.position_T), 1)
        start = {(site.layer, site.stage): same_TE for site in model.sites()}
        with torch.no_grad():
            taken = task.flip(start, gains, budget)
        expected = greedy_slowly(gains, budget, per, task.length)
        got = {
            (place, t, i): taken[place][t, i].item()
            for place in taken
            for t, i in (taken[place] != start[place]).nonzero().tolist()
        }
        assert got == expected


def greedy_slowly(gains, budget, per, length):
    """{((layer, stage), token, i): j}"""
    options = []
    for site, (gain_TKE, ids_TK) in gains.items():
        for t, k, e in (gain_TKE > 0).nonzero().tolist():
            place = (site.layer, site.stage)
            options.append((gain_TKE[t, k, e].item(), place, t, ids_TK[t, k].item(), e))
    options.sort(reverse=True)
    taken, used, count = {}, set(), {}
    for _, place, t, i, e in options:
        unit = t if per == "token" else t // length
        if (place, t, i) in taken or (place, t, e) in used or count.get(unit, 0) == budget:
            continue
        taken[place, t, i] = e
        used.add((place, t, e))
        count[unit] = count.get(unit, 0) + 1
    return taken


# ---- verified


@KIND
@PER
def test_no_sequence_gets_better(model_of, shard, kind, per):
    """A round whose flips did not raise a sequence's loss is taken back in that sequence."""
    model = model_of(kind)
    conditions = [Condition(Worst(n, per=per, rounds=r)) for n, r in ((1, 1), (2, 2), (6, 3))]
    clean, *cells = measure(model, conditions, shard, reuse=())
    for cell in cells:
        assert (cell.losses.nll_sum >= clean.losses.nll_sum - 1e-4).all()
        assert cell.losses.nll_sum.sum() > clean.losses.nll_sum.sum()


def test_what_is_found_is_what_is_measured(model_of, shard):
    """The flips of the search, applied by hand, give the cell's losses."""
    model = model_of("smoe_share")
    condition = Condition(Worst(2, rounds=2), "layer 2")
    flips, _ = found(model, shard, condition.perturbation, "layer 2")
    _, cell = measure(model, [condition], shard, reuse=())
    _, by_hand = measure(model, [Condition(flips, "layer 2")], shard, reuse=())
    np.testing.assert_array_equal(cell.losses.nll_sum, by_hand.losses.nll_sum)


@pytest.fixture(scope="module")
def trained(tiny_model):
    """A model that has learnt which token follows which, and sequences of them."""
    generator = torch.Generator().manual_seed(2)
    follows = torch.randperm(13, generator=generator)

    def text(rows, length=12):
        columns = [torch.randint(0, 13, (rows,), generator=generator)]
        for _ in range(length):
            other = torch.randint(0, 13, (rows,), generator=generator)
            right = torch.rand(rows, generator=generator) < 0.9
            columns.append(torch.where(right, follows[columns[-1]], other))
        return torch.stack(columns, 1)

    model = tiny_model("smoe_share", init_std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        tokens = text(32)
        loss = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    tokens = text(24)
    names = [str(i) for i in range(24)]
    shard = Sequences(
        tokens[:, :-1].clone(), tokens[:, 1:].clone(), torch.arange(24), names, ["x"] * 24,
        torch.full((24,), 12),
    )  # fmt: skip
    return as_adapter(model), shard


@PER
def test_the_worst_is_worse_than_random_flips(trained, per):
    """As many or fewer, and several times the damage."""
    model, shard = trained
    number = 1 if per == "token" else 6
    conditions = [Condition(Worst(number, per=per, choose=c)) for c in ("worst", "random")]
    clean, worst, random = measure(model, conditions, shard)
    tokens = clean.losses.num_tokens.sum()
    assert clean.losses.nll_sum.sum() / tokens < 1.5  # it has learnt: log 13 is 2.56
    damage = [(c.losses.nll_sum - clean.losses.nll_sum).sum() / tokens for c in (worst, random)]
    assert damage[0] > 3 * abs(damage[1])
    assert damage[0] > 0.02
    flips = [c.routing.flips.sum() for c in (worst, random)]
    assert flips[0] <= flips[1] * (1 + 1e-6)


def test_more_budget_and_more_rounds(trained):
    """More flips hurt more; rounds look again where the first flips have led."""
    model, shard = trained
    conditions = [Condition(Worst(n, rounds=r)) for n, r in ((1, 1), (2, 1), (2, 2))]
    clean, one, two, again = measure(model, conditions, shard)
    sums = [c.losses.nll_sum.sum() for c in (clean, one, two, again)]
    assert sums[0] < sums[1] < sums[2]
    assert sums[1] < sums[3]


def test_random_flips_are_any_and_nest(trained):
    """Every expert that is not in use has the same chance; more flips have the fewer ones."""
    model, shard = trained
    clean = CleanPass.of(model, shard)
    some, moved = found(model, shard, Worst(1, choose="random"))
    more, _ = found(model, shard, Worst(3, choose="random"))
    assert number(moved).eq(1).all()
    for place, moved_TE in moved.items():
        assert more.expert_TE[place][moved_TE].equal(some.expert_TE[place][moved_TE])
    sites = {(s.layer, s.stage): s for s in model.sites()}
    count, expected = torch.zeros(6), torch.zeros(6)
    for place, moved_TE in moved.items():
        count += torch.bincount(some.expert_TE[place][moved_TE], minlength=6)
        free_TE = ~clean.dense[sites[place]].used_TE
        expected += (free_TE / free_TE.sum(-1, keepdim=True)).sum(0) / len(moved)
    assert ((count - expected).abs() < 4 * expected.sqrt()).all()
    other, _ = found(model, shard, Worst(1, choose="random"), eval_seed=1)
    assert any(not other.expert_TE[p].equal(some.expert_TE[p]) for p in moved)


@pytest.mark.parametrize("downstream", ["reroute", "replay"])
def test_downstream(model_of, shard, downstream):
    model = model_of("cartesian")
    condition = Condition(Worst(1), "layer 0", downstream=downstream)
    clean, cell = measure(model, [condition], shard)
    assert (cell.losses.nll_sum >= clean.losses.nll_sum - 1e-4).all()
    assert cell.losses.nll_sum.sum() > clean.losses.nll_sum.sum()


def test_nothing_stays_of_a_search(model_of, shard):
    model = model_of("cartesian")
    measure(model, [Condition(Worst(2, rounds=2))], shard)
    assert not hooks_of(model.model)
    assert all(p.grad is None for p in model.model.parameters())
