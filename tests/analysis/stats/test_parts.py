"""Damage taken apart: against plain loops over permutations, and games with a known answer."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from analysis import stats
from analysis.perturb import effects
from analysis.stats.apart import COALITIONS, PARTS
from analysis.stats.bootstrap import Bootstrap
from analysis.stats.doses import dose_by_document
from analysis.stats.pairs import pair

from ..synthetic import arm, losses, routing, set_costs

COLUMNS = ["delta_nats", "low", "high"]


def game(**options) -> list[dict]:
    """An arm for each coalition."""
    costs = np.linspace(0.3, 0.9, len(COALITIONS))
    return [
        arm("DropTop", 1, cost, effect=effect, **options)
        for cost, effect in zip(costs, COALITIONS.values(), strict=True)
    ]


def parts(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("part")


def test_coalitions_are_those_that_are_measured():
    assert PARTS == effects.PARTS
    measured = {name: some for some, name in COALITIONS.items() if name != "full"}
    assert {n: frozenset(some) for n, some in measured.items()} == effects.COALITIONS


def test_shapley_values_are_the_mean_over_orders():
    table = losses(game())
    damage = stats.damage(table, bootstrap=Bootstrap(resamples=99)).set_index("effect").delta_nats
    value = {frozenset(some): damage[effect] for some, effect in COALITIONS.items()}
    value[frozenset()] = 0.0
    gains = {part: [] for part in PARTS}
    for order in permutations(PARTS):
        for i, part in enumerate(order):
            gains[part].append(value[frozenset(order[: i + 1])] - value[frozenset(order[:i])])
    found = parts(stats.split(table, "DropTop(1)", bootstrap=Bootstrap(resamples=99)))
    for part in PARTS:
        assert found.delta_nats[part] == pytest.approx(np.mean(gains[part]), rel=1e-12)
        assert found.delta_nats[f"{part} alone"] == pytest.approx(value[frozenset([part])])
    whole = value[frozenset(PARTS)]
    assert found.delta_nats[list(PARTS)].sum() == pytest.approx(whole, rel=1e-12)
    alone = sum(value[frozenset([part])] for part in PARTS)
    assert found.delta_nats["interaction"] == pytest.approx(whole - alone)
    assert found.share[list(PARTS)].sum() == pytest.approx(1)
    assert (found.condition == "DropTop(1)").all()


def test_parts_that_add_up_have_no_interaction():
    own = {"set": 0.4, "weights": 0.1, "mass": 0.0}
    table = losses(game())
    costs = {
        stats.label(pd.DataFrame([arm("DropTop", 1, effect=effect)])).item(): sum(
            map(own.get, some)
        )
        for some, effect in COALITIONS.items()
    }
    found = parts(stats.split(set_costs(table, costs), "DropTop(1)"))
    for part, cost in own.items():
        assert found.loc[part, COLUMNS].tolist() == pytest.approx([cost] * 3, abs=1e-12)
    assert found.loc["interaction", COLUMNS].tolist() == pytest.approx([0] * 3, abs=1e-12)
    assert found.share["set"] == pytest.approx(0.8)


def test_the_full_part_has_the_interval_of_damage():
    table = losses(game())
    damage = stats.damage(table).set_index("label").loc["DropTop(1)"]
    found = parts(stats.split(table)).loc["full"]
    assert found[COLUMNS].tolist() == pytest.approx(damage[COLUMNS].tolist(), rel=1e-12)
    assert (found.share, found.share_low, found.share_high) == (1, 1, 1)


def test_shares_have_no_bounds_where_the_whole_may_be_nothing():
    table = losses(game())
    costs = np.where(np.arange(20) % 2, 0.1, -0.1)
    found = parts(stats.split(set_costs(table, {"DropTop(1)": costs}), "DropTop(1)"))
    assert found.low["full"] < 0 < found.high["full"]
    assert found[["share_low", "share_high"]].isna().all(axis=None)


def test_conditions_are_found_with_their_other_options():
    here = {"where": "stage 0", "point": "scores"}
    table = losses([*game(), *game(**here), arm("DropTop", 2, 0.5), arm("NoRouted")])
    found = stats.split(table, bootstrap=Bootstrap(resamples=99))
    assert list(found.condition.unique()) == ["DropTop(1)", "DropTop(1), stage 0, scores"]
    with pytest.raises(ValueError, match=r"'DropTop\(2\)' lacks 'DropTop\(2\), part set', .*arms"):
        stats.split(table, "DropTop(2)")
    with pytest.raises(ValueError, match=r"condition is 'DropTop\(7\)'; choose one of 'DropTop\(1"):
        stats.split(table, "DropTop(7)")
    with pytest.raises(ValueError, match=r"'DropTop\(1\), part set' is no such condition"):
        stats.split(table, "DropTop(1), part set")
    empty = stats.split(losses([arm("DropTop", 2, 0.5)]))
    assert empty.empty
    assert list(empty) == list(found)


def cascade_losses() -> pd.DataFrame:
    table = losses([arm("DropTop", 1, 0.5), arm("DropTop", 1, 0.5, downstream="replay")])
    return set_costs(table, {"DropTop(1)": 0.5, "DropTop(1), replay": 0.3})


def test_cascade_is_reroute_minus_replay_with_flips_beside():
    table = cascade_losses()
    found = parts(
        stats.cascade(table, "DropTop(1)", routing(table), bootstrap=Bootstrap(resamples=99))
    )
    assert found.delta_nats.to_dict() == pytest.approx(
        {"reroute": 0.5, "replay": 0.3, "cascade": 0.2}
    )
    assert found.share["cascade"] == pytest.approx(0.4)
    dose = 1 - np.exp(-1)
    assert found.flips[:2].tolist() == pytest.approx([0.6 * dose] * 2)
    assert found.flips_total["reroute"] == pytest.approx(0.65 * dose)
    assert np.isnan(found.flips["cascade"])
    assert "flips" not in stats.cascade(table, bootstrap=Bootstrap(resamples=99))
    with pytest.raises(ValueError, match=r"lacks 'DropTop\(1\), replay'; measure .*cascade_arms"):
        stats.cascade(losses([arm("DropTop", 1, 0.5)]), "DropTop(1)")


def test_a_cascade_that_differs_by_document_has_the_interval_of_the_difference():
    table = losses([arm("DropTop", 1, 0.5), arm("DropTop", 1, 0.3, downstream="replay")])
    found = parts(stats.cascade(table)).loc["cascade"]
    direct = stats.difference(table, "DropTop(1)", "DropTop(1), replay").iloc[0]
    assert found[COLUMNS].tolist() == pytest.approx(direct[COLUMNS].tolist(), rel=1e-12)


def site_losses(places=("layer 10 stage 0", "layer 2 stage 0", "layer 2 stage 1")) -> pd.DataFrame:
    arms = [arm("DropTop", 1, 0.1, where=where) for where in places]
    return losses([*arms, arm("DropTop", 1, 0.5), arm("DropTop", 1, 0.2, where="stage 0")])


def test_single_sites_in_order_their_sum_and_the_joint_one():
    costs = {"DropTop(1), layer 2 stage 0": 0.1, "DropTop(1), layer 2 stage 1": 0.05}
    costs |= {"DropTop(1), layer 10 stage 0": 0.15, "DropTop(1)": 0.5}
    found = stats.additivity(
        set_costs(site_losses(), costs), "DropTop(1)", bootstrap=Bootstrap(resamples=99)
    )
    assert found.part.tolist() == [
        "layer 2 stage 0", "layer 2 stage 1", "layer 10 stage 0", "sum", "joint", "joint - sum",
    ]  # fmt: skip
    assert found.delta_nats.tolist() == pytest.approx([0.1, 0.05, 0.15, 0.3, 0.5, 0.2])
    assert parts(found).share["sum"] == pytest.approx(0.6)


def test_a_checkpoint_that_lacks_a_site_is_left_out():
    table = site_losses()
    every = routing(table, layers=(2, 10)).assign(stage=0)
    second = every[every.layer == 2].assign(stage=1)
    everywhere = pd.concat([every, second])
    assert (
        len(stats.additivity(table, "DropTop(1)", everywhere, bootstrap=Bootstrap(resamples=99)))
        == 6
    )
    more = pd.concat([everywhere, every.assign(layer=12)])
    assert stats.additivity(table, None, more).empty
    with pytest.raises(ValueError, match=r"lacks 'DropTop\(1\), layer 12 stage 0'; measure"):
        stats.additivity(table, "DropTop(1)", more)


def gap_losses() -> pd.DataFrame:
    arms = [
        arm("Worst", 2, 0.9),
        arm("Worst(rounds=3)", 2, 1.2),
        arm("Worst(choose=random)", 2, 0.2),
        arm("Worst(per=sequence)", 2, 0.3),
        arm("Worst(per=sequence, choose=random)", 2, 0.1),
        arm("Worst", 4, 1.5),
    ]
    costs = [a["cost"] for a in arms]
    table = losses(arms)
    names = stats.label(pd.DataFrame(arms))
    return set_costs(table, dict(zip(names, costs, strict=True)))


def test_gap_pairs_the_worst_with_random_flips_of_the_same_kind():
    table = gap_losses()
    seconds = {"Worst": 6.0, "Worst(choose=random)": 1.5, "clean": 2.0}
    cells = table.drop_duplicates("condition").assign(shard=0)
    cells["seconds"] = cells.perturbation.map(seconds).fillna(4.0)
    cells["condition"] = cells.condition.where(cells.perturbation != "clean", "clean")
    found = stats.gap(table, None, routing(table), cells, bootstrap=Bootstrap(resamples=99))
    gaps = found[found.part == "gap"].set_index("condition").delta_nats.to_dict()
    expected = {"Worst(2)": 0.7, "Worst(2, rounds=3)": 1.0, "Worst(2, per=sequence)": 0.2}
    assert gaps == pytest.approx(expected)
    first = parts(found[found.condition == "Worst(2)"])
    assert first.price[["worst", "random"]].tolist() == [3.0, 0.75]
    assert np.isnan(first.price["gap"])
    assert first.flips["worst"] == pytest.approx(0.6 * (1 - np.exp(-2)))
    assert (first.budget == 2).all()
    with pytest.raises(ValueError, match=r"'Worst\(4\)' lacks 'Worst\(4\), choose=random'"):
        stats.gap(table, "Worst(4)")


def test_damage_per_dose_is_a_ratio_of_sums():
    table = losses([arm("DropTop", 1, 0.5), arm("DropTop(ratio)", 0.25, 0.5), arm("Identity")])
    dose = routing(table)
    dose.loc[dose.perturbation == "Identity", ["flips", "mass_moved"]] = 0.0
    sites = [("top_k", 2.0), ("num_experts", 16), ("renormalize", 1.0), ("routed_share", 0.5)]
    sites.append(("routed_ratio", 0.25))
    facts = pd.DataFrame(
        [("cartesian", 0, layer, 0, *pair) for layer in (0, 2) for pair in sites],
        columns=["model", "train_seed", "layer", "stage", "metric", "value"],
    )
    found = stats.per_dose(table, dose, facts).set_index("label")
    damage = stats.damage(table, dose).set_index("label")
    row = found.loc["DropTop(1)"]
    assert row.per_flip == pytest.approx(row.delta_nats / damage.flips["DropTop(1)"])
    assert row.per_mass == pytest.approx(row.delta_nats / damage.mass_moved["DropTop(1)"])
    # The same dose in every document: the interval is that of the damage, in other units.
    assert row.per_flip_low == pytest.approx(damage.low["DropTop(1)"] / damage.flips["DropTop(1)"])
    assert found.loc["Identity", ["per_flip", "per_flip_low", "per_mass"]].isna().all()
    assert found.experts_off.tolist()[:2] == [1 / 16, 0.25]
    assert np.isnan(found.experts_off["Identity"])
    assert (row.top_k, row.renormalize, row.routed_share) == ("2", "yes", 0.5)
    assert row.routed_ratio == 0.25


def test_a_dose_that_only_one_document_has_gives_no_bounds():
    table = losses([arm("DropTop", 1, 0.5), arm("DropTop", 2, 0.5)])
    dose = routing(table)
    rare = (dose.strength == 1) & (dose.document_id != "doc000")
    dose.loc[rare, ["flips", "mass_moved"]] = 0.0
    found = stats.per_dose(table, dose, bootstrap=Bootstrap(resamples=499)).set_index("label")
    assert np.isfinite(found.per_flip["DropTop(1)"])
    assert np.isnan(found.loc["DropTop(1)", ["per_flip_low", "per_flip_high"]].astype(float)).all()
    assert found.loc["DropTop(2)", ["per_flip_low", "per_flip_high"]].notna().all()


def test_doses_by_document_are_means_over_sites_and_seeds():
    table = losses([arm("GaussianNoise", 1.0, 0.3), arm("NoRouted", cost=1.0)], eval_seeds=2)
    dose = routing(table)
    dose["flips"] *= np.where(dose.layer == 0, 1.0, 3.0)
    (p,) = pair(table)
    found = dose_by_document(p, dose, "flips")
    mean = 2 * 0.6 * (1 - np.exp(-np.array([1.0, 3.0])))
    np.testing.assert_allclose(found, mean[:, None] * p.tokens_D, rtol=1e-12)
