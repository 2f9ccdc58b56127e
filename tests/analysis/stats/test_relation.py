"""Damage against overlap on made-up experts: what is planted is found, and nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, spearmanr

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.contrasts import holm
from analysis.stats.relation import relation

SITE = ["model", "family", "train_seed", "layer", "stage"]
FEW = dict(bootstrap=Bootstrap(resamples=199))


def frame(draw, families=("smoe", "cartesian"), seeds=3, layers=4, E=16, rng=0):
    """Experts of every site; draw(rng, E) -> their columns but the halves."""
    generator, tables = np.random.default_rng(rng), []
    for family in families:
        for seed in range(seeds):
            for layer in range(layers):
                site = dict(zip(SITE, (family, family, seed, layer, 0), strict=True))
                tables.append(pd.DataFrame(site | {"expert": range(E)} | draw(generator, E)))
    table = pd.concat(tables, ignore_index=True)
    for name in ("damage", "per_mass"):
        for half in ("a", "b"):
            if f"{name}_{half}" not in table:
                table[f"{name}_{half}"] = table[name]
    return table


def planted(rng, E, noise=0.0, slope=-1.0):
    """Damage is the overlap turned round, and load is of no account."""
    overlap, load = rng.standard_normal(E), rng.random(E)
    per_mass = slope * overlap + noise * rng.standard_normal(E)
    return {"overlap": overlap, "load": load, "mass": load, "per_mass": per_mass,
            "damage": per_mass * load}  # fmt: skip


def row_of(table, metric="overlap", model="all"):
    return table[(table.metric == metric) & (table.model == model)].squeeze()


def test_overlap_that_explains_all():
    experts = frame(planted)
    table = relation(experts, "overlap", **FEW)
    for model, sites in (("all", 24), ("smoe", 12), ("cartesian", 12)):
        row = row_of(table, model=model)
        assert [row.r, row.low, row.high] == pytest.approx([-1] * 3, abs=1e-6)
        assert row.p == 1 / 200
        assert row.p_holm == 2 / 200  # beside the load
        assert -0.35 < row.null_low < 0 < row.null_high < 0.35
        assert row.ceiling == row.reliability == pytest.approx(1)
        assert (row.num_sites, row.num_experts) == (sites, 16 * sites)
        assert (row.num_models, row.min_seeds) == (sites // 4, 3)
    assert table.damage.eq("per_mass").all()
    assert table.metric.tolist() == ["overlap", "load"] * 3


def test_some_noise():
    row = row_of(relation(frame(lambda g, E: planted(g, E, noise=1.0)), ["overlap"]))
    assert -0.8 < row.r < -0.55  # - 1 / sqrt 2 of normal variables, a little less in ranks
    assert -0.85 < row.low < row.r < row.high < -0.5
    assert row.p == 1e-4


def test_sites_are_not_compared_with_each_other():
    """Sites differ in the mean of both; within them there is nothing."""

    def draw(rng, E):
        shift = 10 * rng.standard_normal()
        columns = planted(rng, E, slope=0.0, noise=1.0)
        return columns | {k: columns[k] + shift for k in ("overlap", "per_mass")}

    experts = frame(draw)
    assert spearmanr(experts.overlap, experts.per_mass).statistic > 0.9
    row = row_of(relation(experts, "overlap", **FEW))
    assert abs(row.r) < 0.15
    assert row.p > 0.05


def test_load_drives_both():
    def draw(rng, E):
        load = rng.lognormal(size=E)
        damage = load + 1.5 * rng.standard_normal(E)
        overlap = load + 1.5 * rng.standard_normal(E)
        return {"overlap": overlap, "load": load, "mass": load, "damage": damage,
                "per_mass": damage / load}  # fmt: skip

    experts = frame(draw, layers=6)
    within = [spearmanr(s.overlap, s.damage).statistic for _, s in experts.groupby(SITE)]
    assert np.mean(within) > 0.25
    table = relation(experts, "overlap", "damage", **FEW)
    row, load = row_of(table), row_of(table, "load")
    assert row.null_low < row.r < row.null_high
    assert row.low < 0.1
    assert load.r > 0.5
    assert load.p == 1 / 200


def residual(y, load):
    rank = rankdata(load) / len(load)
    known = np.column_stack([np.log(load), *(rank**power for power in range(4))])
    return y - known @ np.linalg.lstsq(known, y, rcond=None)[0]


def test_one_site_is_the_partial_spearman_correlation():
    """In another way: residuals of regressions of ranks, and Pearson's correlation of them."""

    def draw(rng, E):
        load = rng.random(E)
        overlap, damage = (load + 0.3 * rng.standard_normal(E) for _ in range(2))
        halves = {f"damage_{h}": damage + 0.1 * rng.standard_normal(E) for h in "ab"}
        own = {"overlap": overlap, "load": load, "mass": load, "damage": damage}
        return own | {"per_mass": damage / load} | halves

    experts = frame(draw, families=["smoe"], seeds=1, layers=1, E=20)
    table = relation(experts, "overlap", "damage", **FEW)
    row = row_of(table)

    def partial(a, b):
        left = [residual(rankdata(experts[name]), experts.load) for name in (a, b)]
        return np.corrcoef(*left)[0, 1]

    assert row.r == pytest.approx(partial("damage", "overlap"))
    half = partial("damage_a", "damage_b")
    assert row.reliability == pytest.approx(2 * half / (1 + half))
    assert row.ceiling == pytest.approx(np.sqrt(row.reliability))
    expected = spearmanr(experts.damage, experts.load).statistic
    assert row_of(table, "load").r == pytest.approx(expected)
    # One cluster says nothing about the spread of clusters.
    assert table.num_sites.eq(1).all()
    assert table[["low", "high"]].isna().all(axis=None)
    assert table[["null_low", "null_high", "p"]].notna().all(axis=None)


def test_null_is_freedman_and_lane():
    """Against a slow loop: residuals of the damage permuted in each site, all fitted anew."""
    experts = frame(lambda g, E: planted(g, E, 2.0), ["smoe"], seeds=1, layers=2, E=9)
    row = row_of(relation(experts, "overlap", bootstrap=Bootstrap(resamples=4999)))
    columns = {}
    for name in ("per_mass", "overlap", "load"):
        columns[name] = experts.groupby(SITE)[name].rank().to_numpy() / 9
    sites = np.repeat(np.eye(2), 9, axis=0)
    powers = [columns["load"] ** power for power in (1, 2, 3)]
    load = np.column_stack([*powers, np.log(experts.load), sites])

    def left(y):
        return y - load @ np.linalg.lstsq(load, y, rcond=None)[0]

    rng, found = np.random.default_rng(3), []
    damage, overlap = left(columns["per_mass"]), left(columns["overlap"])
    for _ in range(4999):
        permuted = left(np.concatenate([rng.permutation(damage[:9]), rng.permutation(damage[9:])]))
        found.append(permuted @ overlap / np.sqrt(permuted @ permuted * (overlap @ overlap)))
    low, high = np.quantile(found, [0.025, 0.975])
    assert row.null_low == pytest.approx(low, abs=0.03)
    assert row.null_high == pytest.approx(high, abs=0.03)
    assert row.p == pytest.approx(np.mean(np.abs(found) >= abs(row.r)), abs=0.03)


def test_ceiling_of_noise_and_of_halves_that_agree():
    def draw(rng, E, noise):
        columns = planted(rng, E)
        halves = {f"per_mass_{h}": columns["per_mass"] + noise * rng.standard_normal(E)
                  for h in "ab"}  # fmt: skip
        return columns | halves

    noisy, fair, good = (
        row_of(relation(frame(lambda g, E, n=n: draw(g, E, n), layers=12, E=32), "overlap", **FEW))
        for n in (1000.0, 1.0, 0.01)
    )
    assert abs(noisy.reliability) < 0.1
    assert noisy.ceiling < 0.31
    # Half of the variance of a half is noise, of the whole a third.
    assert fair.reliability == pytest.approx(2 / 3, abs=0.06)
    assert fair.ceiling == pytest.approx(np.sqrt(2 / 3), abs=0.04)
    assert good.ceiling > 0.99


def test_ceiling_is_that_of_a_perfect_predictor():
    def draw(rng, E):
        true = rng.standard_normal(E)
        a, b = (true + rng.standard_normal(E) for _ in range(2))
        load = np.linspace(0.1, 1, E)
        columns = {"true": true, "load": load, "mass": load, "per_mass": (a + b) / 2}
        return columns | {"damage": load, "per_mass_a": a, "per_mass_b": b}

    row = row_of(relation(frame(draw, layers=12, E=32), "true", **FEW), "true")
    assert row.r == pytest.approx(row.ceiling, abs=0.03)


def test_experts_without_weight_or_value_are_left_out():
    experts = frame(planted)
    odd = experts.copy()
    odd["other"] = odd.overlap.where(odd.family == "smoe")  # does not fit the other family
    dead = odd.expert == 3
    odd.loc[dead, ["mass", "load"]] = 0.0
    odd.loc[dead, ["per_mass", "per_mass_a", "per_mass_b"]] = np.nan
    odd.loc[odd.expert == 5, "per_mass_a"] = np.nan  # no weight in one half
    table = relation(odd, ["overlap", "other"], **FEW)
    assert row_of(table).num_experts == 15 * 24
    assert row_of(table).ceiling == pytest.approx(1)
    assert row_of(table, "other").num_sites == 12
    pd.testing.assert_series_equal(
        row_of(table, "other", "smoe")[3:], row_of(table, "overlap", "smoe")[3:], check_names=False
    )
    nothing = row_of(table, "other", "cartesian")
    assert nothing[["num_sites", "num_experts", "num_models", "min_seeds"]].eq(0).all()
    assert nothing[["r", "low", "high", "null_low", "p", "p_holm", "ceiling"]].isna().all()
    odd.loc[dead, "damage"] = 1.0  # nothing was dropped: rounding
    for damage in ("per_mass", "damage"):
        found, alone = (relation(rows, "overlap", damage, **FEW) for rows in (odd, odd[~dead]))
        assert row_of(found).r == row_of(alone).r


def test_one_cluster_less_than_there_are_is_drawn():
    """Of two, one: half of the resamples are the one, half the other."""
    experts = frame(lambda g, E: planted(g, E, 1.0), families=["smoe"], seeds=1, layers=2)
    each = [row_of(relation(rows, "overlap", **FEW)).r for _, rows in experts.groupby("layer")]
    row = row_of(relation(experts, "overlap"))
    spread = abs(np.subtract(*np.arctanh(each))) / 2
    half = (np.arctanh(row.high) - np.arctanh(row.low)) / 2
    assert half == pytest.approx(12.7062 * spread, rel=1e-3)  # Student's t, one degree of freedom


def test_no_interval_where_no_cluster_alone_says_anything():
    """Load takes away all that four experts can tell."""
    experts = frame(planted, families=["smoe"], seeds=1, layers=2, E=4)
    row = row_of(relation(experts, "overlap", **FEW))
    assert row[["low", "high"]].isna().all()
    assert row.num_sites == 2


@pytest.mark.parametrize("few", [1, 2, 3])
def test_no_interval_where_one_cluster_says_all(few):
    """The other, of few experts, leaves half of the resamples undefined: the rest are all alike."""
    experts = frame(lambda g, E: planted(g, E, 1.0), families=["smoe"], seeds=1, layers=2)
    experts = experts[(experts.layer == 0) | (experts.expert < few)]
    row = row_of(relation(experts, "overlap", **FEW))
    assert -1 < row.r < 0
    assert row[["low", "high"]].isna().all()
    assert row.num_sites == 1 + (few > 1)


def test_a_site_drawn_twice_says_no_more():
    """Of three of six experts a third of the resamples have one alone: it leaves a dimension."""
    experts = frame(lambda g, E: planted(g, E, 1.0), ["smoe"], seeds=1, layers=3, E=6)
    row = row_of(relation(experts, "overlap", **FEW))
    assert not np.isnan(row.r)
    assert row[["low", "high"]].isna().all()


def test_ranks_are_shares_of_a_sites_experts():
    """A site of more experts does not outweigh one of few by their number squared."""
    small = frame(planted, ["smoe"], seeds=1, layers=1, E=10)
    large = frame(lambda g, E: planted(g, E, slope=1.0), ["smoe"], seeds=1, layers=1, E=30, rng=1)
    both = pd.concat([small, large.assign(layer=1)], ignore_index=True)
    shares = [both[both.layer == n][["per_mass", "load"]].rank() / (10, 30)[n] for n in (0, 1)]
    expected = pd.concat([share - share.mean() for share in shares]).corr().iloc[0, 1]
    assert row_of(relation(both, "overlap", **FEW), "load").r == pytest.approx(expected)


def test_permutations_that_are_equal_are_as_extreme():
    """Of the 21 pairs of seven experts those of the highest loads, and of the lowest."""
    experts = frame(planted, ["smoe"], seeds=1, layers=1, E=7)
    experts["load"] = experts["mass"] = np.arange(1.0, 8)
    experts["per_mass"] = [0.0] * 5 + [1.0] * 2
    assert row_of(relation(experts, "overlap"), "load").p == pytest.approx(2 / 21, abs=0.01)


def test_seeds_are_those_of_the_model_with_the_fewest():
    experts = frame(planted)
    experts = experts[(experts.family == "smoe") | (experts.train_seed == 0)]
    row = row_of(relation(experts, "overlap", **FEW))
    assert (row.num_models, row.min_seeds) == (4, 1)


def test_sites_in_which_nothing_varies_are_left_out():
    experts = frame(lambda g, E: planted(g, E, 1.0), families=["smoe"], seeds=1, layers=4)
    for column in ("overlap", "per_mass"):
        odd = experts.copy()
        odd.loc[odd.layer == 2, column] = 0.5
        found, alone = (
            row_of(relation(rows, "overlap", **FEW)) for rows in (odd, odd[odd.layer != 2])
        )
        pd.testing.assert_series_equal(found, alone)
        assert found.num_sites == 3


@pytest.mark.parametrize(("E", "defined"), [(6, False), (7, True)])
def test_experts_too_few_to_tell(E, defined):
    """Of six, four columns of the control and a mean leave one dimension: r would be 1 or -1."""
    for rng in range(5):
        experts = frame(planted, families=["smoe"], seeds=1, layers=1, E=E, rng=rng)
        table = relation(experts, "overlap", **FEW)
        assert row_of(table)[["r", "p"]].notna().tolist() == [defined, defined]
        assert row_of(table, "load")[["r", "p"]].notna().all()


def test_permutations_that_load_explains_do_not_count():
    """Of few experts with ties, some leave nothing of the damage."""
    ties = []
    for rng in range(30):
        experts = frame(lambda g, E: planted(g, E, 1.0), ["smoe"], 1, layers=2, E=4, rng=rng)
        columns = ["overlap", "load", "mass", "per_mass"]
        experts[columns] = 1.0 + (experts[columns] > experts[columns].median())
        row = row_of(relation(experts, "overlap", **FEW))
        if not np.isnan(row.r):
            ties.append(row)
            assert row[["p", "null_low", "null_high"]].notna().all()
            assert -1 <= row.null_low <= row.null_high <= 1
    assert len(ties) > 10


def test_what_says_the_same_as_load_or_nothing():
    experts = frame(planted).assign(constant=1.0)
    experts["same"] = experts.load**3
    table = relation(experts, ["constant", "same"], **FEW)
    rows = table[table.metric != "load"]
    assert rows[["r", "low", "high", "p", "p_holm", "null_low"]].isna().all(axis=None)
    assert row_of(table, "load").p == row_of(table, "load").p_holm


def test_order_and_names_do_not_matter():
    experts = frame(lambda g, E: planted(g, E, 1.0))
    base = relation(experts, "overlap", **FEW)
    pd.testing.assert_frame_equal(base, relation(experts, "overlap", **FEW))
    mixed = experts.sample(frac=1, random_state=0).sort_values("family", ascending=False)
    assert relation(mixed, "overlap", **FEW).r.tolist() == pytest.approx(base.r.tolist())
    moved = experts.assign(overlap=np.exp(3 * experts.overlap), load=experts.load * 7)
    pd.testing.assert_frame_equal(base, relation(moved, "overlap", **FEW))


def test_models_of_one_family_are_not_pooled():
    """The second has the opposite slope."""
    experts = frame(planted)
    one = experts[experts.family == "cartesian"]
    other = one.assign(model="parallel", per_mass=-one.per_mass)
    table = relation(pd.concat([one, other], ignore_index=True), "overlap", **FEW)
    assert table.model.drop_duplicates().tolist() == ["all", "cartesian", "parallel"]
    assert table.family.drop_duplicates().tolist() == ["all", "cartesian"]
    slopes = [row_of(table, model=model).r for model in ("cartesian", "parallel", "all")]
    assert slopes == pytest.approx([-1, 1, 0], abs=1e-6)
    with pytest.raises(ValueError, match="experts has a model called 'all'"):
        relation(other.assign(model="all"), "overlap", **FEW)


def test_holm_over_the_metrics_of_a_model():
    experts = frame(lambda g, E: planted(g, E, 3.0) | {"lot": g.random(E)})
    table = relation(experts, ["overlap", "lot"], **FEW)
    for _, rows in table.groupby("model"):
        np.testing.assert_allclose(rows.p_holm, holm(rows.p.to_numpy()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(metrics="overlap", damage="nll"), "damage is 'nll'; choose one of 'per_mass', 'dam"),
        (dict(metrics=["overlap", "cka"]), "table experts lacks the columns cka"),
        (dict(metrics=["damage"]), "metrics has damage, which is damage"),
        (dict(metrics=["per_mass_a"]), "metrics has per_mass_a, which is damage"),
        (dict(metrics="damage_low"), "metrics has damage_low, which is damage"),
    ],
)
def test_bad_arguments(arguments, message):
    experts = frame(planted, seeds=1)
    with pytest.raises(ValueError, match=message):
        relation(experts.assign(damage_low=experts.damage), **arguments)


TRIALS = 400


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "slope"), [(4, 0.0), (4, -1.0), (8, -1.0), (24, -1.0)])
def test_coverage(layers, slope):
    """Sites differ in how much damage goes with overlap; their mean is what is asked for."""

    def draw(rng, E):
        own = slope + 0.5 * rng.standard_normal()
        return planted(rng, E, noise=1.0, slope=own)

    def found(rng, layers):
        experts = frame(draw, ["smoe"], seeds=1, layers=layers, rng=rng)
        return row_of(relation(experts, "overlap", bootstrap=Bootstrap(resamples=299, seed=rng)))

    truth = found(10**6, 2000).r
    rows = pd.DataFrame([found(rng, layers) for rng in range(TRIALS)])
    coverage = ((rows.low <= truth) & (truth <= rows.high)).mean()
    print(f"\n{layers} sites, slope {slope:g}: r {truth:.3f}, coverage {coverage:.3f}", end="")
    assert 0.92 <= coverage <= 0.98


@pytest.mark.slow
def test_level():
    """Overlap drawn by lot is found significant as often as it should be, load at work or not."""

    def draw(rng, E):
        columns = planted(rng, E, slope=0.0, noise=0.3)
        return columns | {"per_mass": columns["per_mass"] + 3 * columns["load"]}

    p = [
        row_of(
            relation(
                frame(draw, ["smoe"], 1, rng=i),
                "overlap",
                bootstrap=Bootstrap(resamples=199, seed=i),
            )
        ).p
        for i in range(TRIALS)
    ]
    print(f"\np <= 0.05 in {np.mean(np.array(p) <= 0.05):.3f}", end="")
    assert 0.025 <= np.mean(np.array(p) <= 0.05) <= 0.08
