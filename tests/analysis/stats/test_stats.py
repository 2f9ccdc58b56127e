"""Tables of damage against slow or independent computations, and the errors that teach."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from pandas.testing import assert_frame_equal

from analysis import stats
from analysis.stats.bootstrap import Bootstrap
from analysis.stats.columns import KEY
from analysis.stats.seeds import permutation_test

from ..synthetic import arm, losses, routing, sites, study

NOISE = arm("GaussianNoise", 1.0, 0.3)
TOP = arm("DropTop", 1.0, 0.5)
CHOSEN = arm("DropChosen", 1.0, 0.2)
RANDOM = arm("RandomRouting", 1.0, 1.5)


@pytest.fixture(scope="module")
def whole():
    return study()


@pytest.fixture(scope="module")
def whole_damage(whole):
    return stats.damage(whole, routing(whole), bootstrap=Bootstrap(resamples=999))


def by_hand(table: pd.DataFrame, perturbation: str) -> pd.DataFrame:
    """Clean and perturbed sums of each document, eval_seeds averaged, in plain loops."""
    rows = []
    for document in sorted(table.document_id.unique()):
        mine = table[table.document_id == document]
        clean, arm_ = (mine[mine.perturbation == p] for p in ("clean", perturbation))
        seeds = sorted(arm_.eval_seed.unique())
        nll = np.mean([arm_[arm_.eval_seed == s].nll_sum.sum() for s in seeds])
        rows.append((nll - clean.nll_sum.sum(), clean.num_tokens.sum(), clean.num_bytes.sum()))
    return pd.DataFrame(rows, columns=["delta", "tokens", "bytes"])


def test_damage_and_doses_against_plain_loops():
    table = losses([NOISE, TOP], eval_seeds=3)
    doses = routing(table)
    found = stats.damage(table, doses).set_index("label").loc["GaussianNoise(1)"]
    sums = by_hand(table, "GaussianNoise").sum()
    rows, clean = (table[table.perturbation == p] for p in ("GaussianNoise", "clean"))
    assert found.num_documents == 20
    assert found.num_tokens == sums.tokens == clean.num_tokens.sum()
    assert found.delta_nats == pytest.approx(sums.delta / sums.tokens, rel=1e-12)
    bits = sums.delta / sums.bytes / np.log(2)
    assert found.delta_bits_per_byte == pytest.approx(bits, rel=1e-12)
    assert found.clean_nats == pytest.approx(clean.nll_sum.sum() / sums.tokens, rel=1e-12)
    assert found.nats == pytest.approx(rows.nll_sum.sum() / rows.num_tokens.sum(), rel=1e-12)
    assert found.perplexity == pytest.approx(np.exp(found.nats), rel=1e-12)
    assert found.perplexity / found.clean_perplexity == pytest.approx(found.perplexity_ratio)
    assert found.ratio_low == pytest.approx(np.exp(found.low))
    assert found.ratio_high == pytest.approx(np.exp(found.high))
    assert found.kl == pytest.approx(rows.kl_sum.sum() / rows.num_tokens.sum(), rel=1e-12)
    assert found.agreement == pytest.approx(np.exp(-0.3))
    for name, scale in (("mass_moved", 0.7), ("flips_total", 0.65), ("output_change", 0.3)):
        assert found[name] == pytest.approx(scale * (1 - np.exp(-1)))
    assert found.delta_max == rows.delta_max.max()
    assert found.expects == "selection"
    assert "mass_moved" not in stats.damage(table)


def test_one_row_per_condition_and_none_for_clean(whole, whole_damage):
    assert not whole_damage.duplicated(KEY).any()
    assert "clean" not in set(whole_damage.perturbation)
    assert "dense" not in set(whole_damage.model)
    assert stats.clean_table(whole).model.tolist()[0] == "dense"


def test_clean_table_against_sums():
    table = losses([TOP])
    row = stats.clean_table(table).iloc[0]
    clean = table[table.perturbation == "clean"]
    assert row.nats == pytest.approx(clean.nll_sum.sum() / clean.num_tokens.sum())
    bits = clean.nll_sum.sum() / clean.num_bytes.sum() / np.log(2)
    assert row.bits_per_byte == pytest.approx(bits)
    assert row.perplexity_low < row.perplexity == pytest.approx(np.exp(row.nats))
    assert row.low < row.nats < row.high


def scipy_bca(x: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """From resamples of our own: scipy draws n documents of n."""
    (counts_RD,) = Bootstrap(resamples=2000, seed=4).document_counts(len(x))
    drawn = SimpleNamespace(bootstrap_distribution=(counts_RD @ x) / (counts_RD @ t))
    interval = scipy.stats.bootstrap(
        (x, t),
        lambda x, t, axis=-1: x.sum(axis) / t.sum(axis),
        paired=True,
        method="BCa",
        n_resamples=0,
        bootstrap_result=drawn,
    ).confidence_interval
    return interval.low, interval.high


@pytest.mark.parametrize("documents", [12, 20])
def test_interval_is_scipys_bca(documents):
    table = losses([TOP, CHOSEN], documents=documents)
    found = (
        stats.damage(table, bootstrap=Bootstrap(resamples=2000, seed=4))
        .set_index("label")
        .loc["DropTop(1)"]
    )
    sums = by_hand(table, "DropTop").to_numpy().T
    assert (found.low, found.high) == pytest.approx(scipy_bca(sums[0], sums[1]), rel=1e-9)
    expected = scipy_bca(sums[0] / np.log(2), sums[2])
    assert (found.bpb_low, found.bpb_high) == pytest.approx(expected, rel=1e-9)


def test_interval_with_plain_loops():
    rng = np.random.default_rng(3)
    x, t = rng.gamma(1.0, size=12), rng.integers(50, 90, 12).astype(float)
    bootstrap = Bootstrap(confidence=0.9, resamples=500, seed=5)
    found = bootstrap.intervals(x[None], t[None])
    (counts,) = bootstrap.document_counts(12)
    assert counts.sum(axis=1) == pytest.approx(12)
    assert set(np.round(counts[0] * 11 / 12, 9)) <= set(range(12))  # 11 draws, 12 / 11 each
    draws = np.array([sum(n * x) / sum(n * t) for n in counts])
    value = x.sum() / t.sum()
    norm = scipy.stats.norm
    bias = norm.ppf(np.mean(draws < value))
    left_out = np.array([np.delete(x, i).sum() / np.delete(t, i).sum() for i in range(12)])
    gap = left_out.mean() - left_out
    acceleration = np.sum(gap**3) / (6 * np.sum(gap**2) ** 1.5)
    for bound, tail in ((found.low_M[0], 0.05), (found.high_M[0], 0.95)):
        shifted = bias + norm.ppf(tail)
        quantile = norm.cdf(bias + shifted / (1 - acceleration * shifted))
        assert bound == pytest.approx(np.quantile(draws, quantile), rel=1e-10)


def test_draws_come_in_blocks_of_bounded_size(monkeypatch):
    monkeypatch.setattr("analysis.stats.bootstrap.CHUNK", 100)
    blocks = list(Bootstrap(resamples=10).document_counts(30))
    assert [len(b) for b in blocks] == [3, 3, 3, 1]


def test_draws_equal_to_the_value_count_a_half():
    """Of three documents' draws of two, 3 in 9 have the mean of all, in units of any size."""
    x, t = np.array([[0.1, 0.2, 0.3]]), np.array([[7.0, 7.0, 7.0]])
    bounds = [Bootstrap(seed=1).intervals(x * unit, t) for unit in (1, 1 / 3, 1 / 7, np.pi)]
    for unit, found in zip((1, 1 / 3, 1 / 7, np.pi), bounds, strict=True):
        assert found.low_M[0] == pytest.approx(bounds[0].low_M[0] * unit, rel=1e-10)
        assert found.high_M[0] == pytest.approx(bounds[0].high_M[0] * unit, rel=1e-10)


@pytest.mark.slow
def test_intervals_cover_the_truth():
    rng, hits, trials = np.random.default_rng(0), 0, 600
    for trial in range(trials):
        tokens = rng.integers(100, 300, 40).astype(float)
        nats = tokens * rng.gamma(2.0, 0.25, 40)  # 0.5 nats per token on average, skewed
        found = Bootstrap(resamples=999, seed=trial).intervals(nats[None], tokens[None])
        hits += found.low_M[0] <= 0.5 <= found.high_M[0]
    assert 0.91 < hits / trials < 0.975


@pytest.mark.slow
def test_intervals_over_seeds_cover_the_truth():
    rng, hits, trials = np.random.default_rng(0), 0, 200
    truth = 0.5 - 0.3
    tables = losses([TOP], documents=12)
    clean = tables.perturbation == "clean"
    document = tables.document_id.astype("category").cat.codes
    for trial in range(trials):
        runs = []
        shift = rng.normal(0, 0.03, 12)  # a document is hard for every run
        for model, cost in (("a", 0.5), ("b", 0.3)):
            for seed in range(3):
                table = tables.assign(model=model, family=model, train_seed=seed)
                per_token = cost + rng.normal(0, 0.05) + shift + rng.normal(0, 0.02, 12)
                delta = table.num_tokens * per_token[document]
                base = table.nll_sum.where(clean, np.tile(table.nll_sum[clean], 2))
                runs.append(table.assign(nll_sum=base.where(clean, base + delta)))
        found = stats.over_seeds(
            pd.concat(runs), "a", "b", "DropTop(1)", bootstrap=Bootstrap(resamples=299, seed=trial)
        )
        hits += found.low[0] <= truth <= found.high[0]
    assert 0.9 < hits / trials <= 1.0


def test_a_document_effect_in_both_runs_cancels():
    table = losses([TOP, NOISE], eval_seeds=2)
    shift = table.document_id.astype("category").cat.codes * 0.3 * table.num_tokens
    columns = ["delta_nats", "low", "high", "delta_bits_per_byte", "bpb_low", "bpb_high"]
    before = stats.damage(table, bootstrap=Bootstrap(resamples=499))[columns]
    after = stats.damage(
        table.assign(nll_sum=table.nll_sum + shift), bootstrap=Bootstrap(resamples=499)
    )[columns]
    assert_frame_equal(before, after, rtol=1e-9)


def test_order_of_rows_does_not_matter():
    table = losses([TOP, NOISE, arm("Identity")], eval_seeds=2)
    shuffled = table.sample(frac=1, random_state=0)
    frames = [
        stats.damage(t, bootstrap=Bootstrap(resamples=499)).sort_values("label")
        for t in (table, shuffled)
    ]
    assert_frame_equal(*(f.reset_index(drop=True) for f in frames), rtol=1e-13)


def test_the_draws_do_not_depend_on_the_other_conditions():
    table = losses([TOP, CHOSEN])
    alone = stats.damage(
        table[table.perturbation != "DropChosen"], bootstrap=Bootstrap(resamples=499)
    )
    both = stats.damage(table, bootstrap=Bootstrap(resamples=499))
    assert_frame_equal(alone, both[both.label == "DropTop(1)"].reset_index(drop=True), rtol=1e-13)


def test_eval_seeds_are_averaged_within_a_document():
    table = losses([NOISE], eval_seeds=2)
    noisy = table.perturbation == "GaussianNoise"
    first, second = (table[noisy & (table.eval_seed == s)] for s in (0, 1))
    mean = first.assign(nll_sum=(first.nll_sum.to_numpy() + second.nll_sum.to_numpy()) / 2)
    single = pd.concat([table[~noisy], mean])
    columns = ["delta_nats", "low", "high"]
    found, expected = (
        stats.damage(t, bootstrap=Bootstrap(resamples=499))[columns] for t in (table, single)
    )
    assert_frame_equal(found, expected, rtol=1e-12)


def test_what_changes_nothing_costs_exactly_nothing():
    row = stats.damage(losses([arm("Identity")])).iloc[0]
    assert (row[["delta_nats", "low", "high", "bpb_low", "bpb_high"]] == 0).all()
    assert row.ratio_low == row.ratio_high == row.perplexity_ratio == 1


def test_a_constant_change_has_an_interval_of_no_width():
    table = losses([TOP])
    nll = table.nll_sum[table.perturbation == "clean"]
    tokens = table.num_tokens[table.perturbation == "clean"]
    table.loc[table.perturbation == "DropTop", "nll_sum"] = (nll + 0.1 * tokens).to_numpy()
    row = stats.damage(table).iloc[0]
    assert row.low == row.high == row.delta_nats == pytest.approx(0.1)


def test_bca_falls_back_to_percentiles_where_it_is_undefined():
    """Of two resamples, both may lie above the value: then BCa's bias is infinite."""
    x, t = np.array([[0.0, 1.0, 5.0]]), np.ones((1, 3))
    bootstrap = next(
        two
        for two in (Bootstrap(resamples=2, seed=seed) for seed in range(100))
        if all((counts @ x[0] > 6).all() for counts in two.document_counts(3))
    )
    found = bootstrap.intervals(x, t)
    (counts,) = bootstrap.document_counts(3)
    expected = np.quantile(counts @ x[0] / 3, [0.025, 0.975])
    assert (found.low_M[0], found.high_M[0]) == pytest.approx(tuple(expected))


def test_one_document_gives_no_interval():
    row = stats.damage(losses([TOP], documents=1)).iloc[0]
    assert np.isfinite(row.delta_nats)
    assert np.isnan(row[["low", "high", "bpb_low", "bpb_high"]].astype(float)).all()


def test_labels_leave_out_what_is_plain():
    table = pd.DataFrame(
        [
            arm("DropTop", 1),
            arm("NoRouted"),
            arm("DropTop(ratio)", 0.25, where="stage 1", point="scores"),
            arm("DropTop", 1, effect="weights", downstream="replay"),
        ]
    )
    assert stats.label(table).tolist() == [
        "DropTop(1)",
        "NoRouted",
        "DropTop(0.25, ratio), stage 1, scores",
        "DropTop(1), weights, replay",
    ]


# ---- contrasts ----------------------------------------------------------------------------


def test_difference_against_scipy_on_the_paired_deltas():
    table = losses([TOP, CHOSEN])
    found = stats.difference(
        table, "DropTop(1)", "DropChosen(1)", bootstrap=Bootstrap(resamples=2000, seed=4)
    ).iloc[0]
    top, chosen = by_hand(table, "DropTop"), by_hand(table, "DropChosen")
    gap = (top.delta - chosen.delta).to_numpy()
    expected = scipy_bca(gap, top.tokens.to_numpy())
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.delta_nats == pytest.approx(gap.sum() / top.tokens.sum(), rel=1e-12)
    bits = gap.sum() / top.bytes.sum() / np.log(2)
    assert found.delta_bits_per_byte == pytest.approx(bits, rel=1e-12)


def test_difference_is_antisymmetric_and_zero_with_itself():
    table = losses([TOP, CHOSEN])
    there = stats.difference(
        table, "DropTop(1)", "DropChosen(1)", bootstrap=Bootstrap(resamples=499)
    ).iloc[0]
    back = stats.difference(
        table, "DropChosen(1)", "DropTop(1)", bootstrap=Bootstrap(resamples=499)
    ).iloc[0]
    assert there.delta_nats == pytest.approx(-back.delta_nats)
    assert there.low == pytest.approx(-back.high)
    same = stats.difference(
        table, "DropTop(1)", "DropTop(1)", bootstrap=Bootstrap(resamples=499)
    ).iloc[0]
    assert (same.delta_nats, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-14)


def test_models_are_contrasted_document_by_document():
    """What a document does to both models is no uncertainty about their difference."""
    a = losses([TOP], model="a")
    b = losses([TOP], model="b", rng=1, documents=20)
    same_documents = a.assign(model="b", family="b")
    clean = same_documents.perturbation == "clean"
    base = np.tile(same_documents.nll_sum[clean], 2)
    same_documents["nll_sum"] = base + 0.7 * (same_documents.nll_sum - base)
    row = stats.contrast_models(pd.concat([a, same_documents]), "a", "b", "DropTop(1)").iloc[0]
    alone = stats.damage(a).iloc[0]
    assert row.delta_nats == pytest.approx(0.3 * alone.delta_nats)
    assert row.high - row.low == pytest.approx(0.3 * (alone.high - alone.low), rel=1e-6)
    assert row.train_seed == 0
    # Token counts may differ between models (tokenizers): each has its own denominator.
    found = stats.contrast_models(pd.concat([a, b]), "a", "b", "DropTop(1)").iloc[0]
    of_a, of_b = stats.damage(a).iloc[0], stats.damage(b).iloc[0]
    assert found.delta_nats == pytest.approx(of_a.delta_nats - of_b.delta_nats)


def test_over_seeds_gives_the_mean_difference_and_the_smallest_p():
    runs = [
        losses([arm("DropTop", 1, cost + 0.05 * s)], model=m, train_seed=s, rng=5)
        for m, cost in (("a", 1.0), ("b", 0.4))
        for s in range(3)
    ]
    table = pd.concat(runs)
    row = stats.over_seeds(table, "a", "b", "DropTop(1)", bootstrap=Bootstrap(resamples=999)).iloc[
        0
    ]
    damage = stats.damage(table).groupby("model").delta_nats.mean()
    assert row.delta_nats == pytest.approx(damage["a"] - damage["b"])
    assert row.low < row.delta_nats < row.high
    assert (row.seeds_a, row.seeds_b, row.num_documents) == (3, 3, 20)
    assert row.p == row.min_p == pytest.approx(2 / 20)


def test_over_seeds_is_wider_than_one_checkpoint_where_seeds_differ():
    costs = {"a": (0.5, 0.9, 0.7), "b": (0.4, 0.6, 0.2)}
    table = pd.concat(
        losses([arm("DropTop", 1, c)], model=m, train_seed=s, rng=5)
        for m in costs
        for s, c in enumerate(costs[m])
    )
    over = stats.over_seeds(table, "a", "b", "DropTop(1)", bootstrap=Bootstrap(resamples=999)).iloc[
        0
    ]
    single = stats.contrast_models(table, "a", "b", "DropTop(1)").iloc[0]
    assert over.high - over.low > 2 * (single.high - single.low)


def test_over_one_seed_there_is_no_interval():
    table = pd.concat([losses([TOP], model=m) for m in "ab"])
    row = stats.over_seeds(table, "a", "b", "DropTop(1)").iloc[0]
    assert np.isnan([row.low, row.high]).all()
    assert (row.seeds_a, row.seeds_b, row.p, row.min_p) == (1, 1, 1.0, 1.0)


def test_permutation_test_against_all_splits_and_scipy():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.8, 1, 4), rng.normal(0, 1, 5)
    p, min_p = permutation_test(a, b)
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=np.inf, vectorized=True
    )
    assert p == pytest.approx(expected.pvalue)
    assert min_p == pytest.approx(2 / len(list(combinations(range(9), 4))))
    sampled, smallest = permutation_test(a, b, bootstrap=Bootstrap(resamples=100))
    assert smallest == pytest.approx(2 / 101)
    assert sampled == pytest.approx(p, abs=0.15)


# ---- Table 4, curves ----------------------------------------------------------------------


def test_robustness_table_has_what_damage_has(whole_damage):
    table = stats.robustness_table(whole_damage, sites()).set_index("model")
    damage = whole_damage.set_index(["model", "label"])
    assert table.columns[2:9].tolist() == [
        "top_k", "renormalize", "routed_share", "routed_ratio", "num_documents",
        "clean_perplexity", "perplexity",
    ]  # fmt: skip
    for name in ("DropTop(1)", "DropTop(1), scores", "DropTop(1), stage 1, scores"):
        row = damage.loc["cartesian", name]
        found = table.loc["cartesian", [name, f"{name} low", f"{name} high"]]
        assert found.tolist() == row[["delta_nats", "low", "high"]].tolist()
    assert table.perplexity["cartesian"] == damage.perplexity["cartesian", "DropTop(1)"]
    assert table.RandomRouting["smoe"] == damage.delta_nats["smoe", "RandomRouting(1)"]
    assert (table["identity"] == 0).all()
    assert np.isnan(table.loc["smoe", "DropTop(1), stage 1"])
    several = {"cartesian": "2+2", "top_p": "2.6"}
    assert table.top_k.to_dict() == dict.fromkeys(table.index, "2") | several
    assert table.renormalize.value_counts().to_dict() == {"yes": 5, "no": 1}
    assert table.routed_share["hash"] == pytest.approx(0.55)


def test_an_identity_that_failed_is_the_one_that_stands():
    damage = stats.damage(losses([arm("Identity"), arm("Identity", where="layer 2", cost=0.01)]))
    assert stats.robustness_table(damage)["identity"].item() == pytest.approx(0.01, rel=0.3)


def test_random_routing_is_the_strongest_and_the_default_one():
    arms = [RANDOM, arm("RandomRouting", 0.5, 0.7), arm("RandomRouting(draw=permute)", 1.0, 1.9)]
    damage = stats.damage(losses(arms)).set_index("label", drop=False)
    for order in ([0, 1, 2], [2, 1, 0]):
        found = stats.robustness_table(damage.iloc[order]).RandomRouting.item()
        assert found == damage.delta_nats["RandomRouting(1)"]
    permuted = stats.robustness_table(damage.iloc[[2]]).RandomRouting.item()
    assert permuted == damage.delta_nats["RandomRouting(1, draw=permute)"]


def test_robustness_without_top1_or_sites_is_not_a_number():
    table = stats.robustness_table(stats.damage(losses([RANDOM])))
    assert table[["perplexity", "DropTop(1)", "NoRouted", "identity"]].isna().all(axis=None)
    assert "top_k" not in table
    assert " - " in stats.format_robustness(table)


def test_printed_table_fits_and_is_aligned(whole_damage):
    text = stats.format_robustness(stats.robustness_table(whole_damage, sites()))
    assert max(map(len, text.splitlines())) <= 140
    blocks = text.split("\n\n")
    assert all("cartesian" in block for block in blocks)
    assert "identity" in blocks[-1].splitlines()[0]
    row = whole_damage.set_index(["model", "label"]).loc["smoe", "DropTop(1)"]
    assert f"{row.delta_nats:+.3f} [{row.low:.3f}, {row.high:.3f}]" in text
    narrow = stats.format_robustness(stats.robustness_table(whole_damage), width=60)
    assert max(map(len, narrow.splitlines()[1:])) <= 60


def test_printed_table_names_seeds_where_there_are_several():
    table = pd.concat(losses([TOP], train_seed=s, documents=1 + s) for s in (0, 1))
    text = stats.format_robustness(stats.robustness_table(stats.damage(table)))
    assert "cartesian #0" in text
    assert "cartesian #1" in text
    assert "[-]" in text  # one document has no interval


def test_positive_control_names_models_whose_routing_proves_nothing():
    table = pd.concat(
        [
            losses([RANDOM], model="learnt"),
            losses([arm("RandomRouting", 1.0, 0.0)], model="idle"),
            losses([TOP], model="untested"),
        ]
    )
    failed = stats.positive_control(stats.damage(table)).set_index("model")
    assert failed.index.tolist() == ["idle", "untested"]
    assert failed.delta_nats["idle"] == 0
    assert np.isnan(failed.delta_nats["untested"])


def curve(model: str, costs: dict[float, float]) -> list[dict]:
    base = {"model": model, "family": model, "train_seed": 0}
    points = [base | arm("GaussianNoise", s) | {"delta_nats": c} for s, c in costs.items()]
    return [*points, base | arm("RandomRouting", 1.0) | {"delta_nats": 2.0}]


def test_curves_are_summarized_over_their_common_range():
    damage = pd.DataFrame(curve("a", {1: 1.0, 2: 3.0}) + curve("b", {1: 0.5}))
    table = stats.curve_summary(damage, "GaussianNoise", x="strength").set_index("model")
    assert table.dose_high.tolist() == [1, 1]
    assert table.area.tolist() == [0.5, 0.25]
    assert table.dose_half_random.tolist() == [1.0, 1.0]
    assert table.half_random_censored.tolist() == [False, True]
    assert table.dose_ln2["a"] == pytest.approx(np.log(2))
    assert table.ln2_censored["b"]
    wider = stats.curve_summary(damage, "GaussianNoise", x="strength", upto=1.5).set_index("model")
    assert wider.area["a"] == pytest.approx(0.5 + 0.5 * (1 + 2) / 2)
    assert np.isnan(wider.area["b"])


def test_half_of_random_needs_random_routing():
    damage = pd.DataFrame(curve("a", {1: 1.0})[:1])
    row = stats.curve_summary(damage, "GaussianNoise", x="strength").iloc[0]
    assert np.isnan(row.dose_half_random)
    assert not row.half_random_censored


def test_a_curve_that_is_not_known_leaves_the_others_as_they_are():
    """No token was changed: nothing is told, least of all that nothing is lost."""
    known = curve("a", {1: 1.0, 2: 3.0})
    unknown = curve("b", {1: np.nan, 2: np.nan})[:2]
    table = stats.curve_summary(pd.DataFrame(known + unknown), "GaussianNoise", x="strength")
    alone = stats.curve_summary(pd.DataFrame(known), "GaussianNoise", x="strength")
    assert_frame_equal(table[:1], alone)
    assert table.iloc[1][["dose_high", "area", "dose_ln2", "dose_half_random"]].isna().all()
    assert not table.iloc[1][["ln2_censored", "half_random_censored"]].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": True}, "resamples is True; it must be at least 1, a whole number"),
        ({"resamples": 1.5}, "resamples is 1.5"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": True}, "seed is True"),
        ({"seed": "1"}, "seed is '1'"),
        ({"confidence": True}, "confidence is True"),
        ({"confidence": "0.9"}, "confidence is '0.9'"),
    ],
)
def test_a_bootstrap_of_wrong_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        Bootstrap(**options)


def test_a_bootstrap_takes_numbers_of_any_library():
    import torch

    given = Bootstrap(np.float64(0.9), torch.tensor(99), np.int8(3))
    assert given == Bootstrap(0.9, 99, 3)
    assert type(given.resamples) is type(given.seed) is int


def test_resamples_stay_within_strata():
    stratum_D = np.array(list("aababcbdcc"))  # of d there is one: it goes with the largest, a
    own = Bootstrap(resamples=500).within(stratum_D)
    counts_RD = np.concatenate(list(own.document_counts(10)))
    for names in ("ad", "b", "c"):
        members = np.isin(stratum_D, list(names))
        assert counts_RD[:, members].sum(axis=1) == pytest.approx(members.sum())
        assert (counts_RD[:, members].std(axis=0) > 0).all()
    several = Bootstrap().within(np.array(list("aabbxyz"))).strata  # x, y, z go together
    assert [own.tolist() for own in several] == [[4, 5, 6], [0, 1], [2, 3]]


def test_one_stratum_is_none():
    rng = np.random.default_rng(0)
    x_CD, ones_CD = rng.gamma(1.0, size=(3, 20)), np.ones((3, 20))
    plain = Bootstrap(resamples=999)
    for a, b in zip(
        plain.intervals(x_CD, ones_CD),
        plain.within(np.zeros(20)).intervals(x_CD, ones_CD),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_stratified_intervals_are_those_of_scipy():
    """Of several samples: what separates them is not resampled."""
    rng = np.random.default_rng(1)
    x, y = rng.gamma(0.7, size=40), 9 + rng.gamma(0.7, size=25)
    values_CD = np.concatenate([x, y])[None]
    stratum_D = np.repeat([0, 1], [40, 25])
    own = Bootstrap(resamples=20_000).within(stratum_D)
    got = own.intervals(values_CD, np.ones_like(values_CD))
    want = scipy.stats.bootstrap(
        (x, y),
        lambda x, y, axis: (x.sum(axis) + y.sum(axis)) / 65,
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = want.high - want.low
    assert got.low_M[0] == pytest.approx(want.low, abs=0.03 * width)
    assert got.high_M[0] == pytest.approx(want.high, abs=0.03 * width)
    whole = Bootstrap(resamples=2_000).intervals(values_CD, np.ones_like(values_CD))
    assert whole.high_M[0] - whole.low_M[0] > 3 * width


def test_damage_is_resampled_within_domains():
    """Where all documents of a domain lose as much a token, and are as long, nothing varies."""
    table = losses([arm("DropTop", 1, 0.5)], documents=12)
    table = table.drop_duplicates(["document_id", "perturbation"]).reset_index(drop=True)
    table["num_tokens"] = 100
    domain = np.where(table.document_id < "doc007", "code", "prose")
    clean = table.perturbation == "clean"
    cost = np.where(clean, 0.0, np.where(domain == "code", 0.2, 0.9))
    table = table.assign(domain=domain, nll_sum=100 * (1.0 + cost))
    row = stats.damage(table).iloc[0]
    assert row.delta_nats == pytest.approx((7 * 0.2 + 5 * 0.9) / 12)
    assert row.high - row.low == pytest.approx(0, abs=1e-9)
    mixed = stats.damage(table.assign(domain="all")).iloc[0]
    assert mixed.high - mixed.low > 0.2


# ---- errors -------------------------------------------------------------------------------


def unpaired(table: pd.DataFrame, column: str) -> pd.DataFrame:
    if column == "sequence_id":
        return table.drop(table.index[table.perturbation == "DropTop"][3])
    first = table.index[table.perturbation == "DropTop"][0]
    table.loc[first, column] += 1
    return table


@pytest.mark.parametrize("column", ["sequence_id", "num_tokens"])
def test_unpaired_conditions_are_named(column):
    table = unpaired(losses([TOP, NOISE], eval_seeds=2), column)
    with pytest.raises(ValueError, match=r"cartesian \(train_seed 0\) are not .*: DropTop\(1\)"):
        stats.damage(table)


def test_two_conditions_of_one_label_are_named():
    table = losses([TOP, TOP | {"cost": 0.7}])
    second = table.index[table.perturbation == "DropTop"][len(table) // 3 :]
    table.loc[second, "condition"] = "the other"
    with pytest.raises(ValueError, match=r"names of their own\): DropTop\(1\) \[.*, the other\]"):
        stats.damage(table)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns=["nll_sum", "where"]), "losses lacks the columns where, nll_sum"),
        (lambda t: t[t.perturbation != "clean"], r"cartesian \(train_seed 0\) have no clean rows"),
        (
            lambda t: pd.concat([t, t[t.perturbation == "clean"]]),
            "more than one clean row for a sequence",
        ),
        (lambda t: t[t.perturbation == "clean"], "clean rows only"),
        (lambda t: t.assign(nll_sum=np.inf), "nll_sum of cartesian .* not finite: clean"),
        (
            lambda t: t.assign(nll_sum=t.nll_sum.where(t.perturbation == "clean", np.nan)),
            r"not finite: DropTop\(1\)",
        ),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        stats.damage(spoil(losses([TOP])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 95}, "confidence is 95; it must lie strictly between 0 and 1"),
        ({"resamples": 0}, "resamples is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Bootstrap(**options)


def test_routing_without_a_dose_column_is_refused():
    table = losses([TOP])
    with pytest.raises(ValueError, match="routing lacks the columns flips"):
        stats.damage(table, routing(table).drop(columns="flips"))


def test_contrasts_list_the_choices():
    table = pd.concat([losses([TOP], model="a"), losses([TOP], model="b", train_seed=1)])
    with pytest.raises(ValueError, match=r"condition of a .* 'Drop'; choose one of 'DropTop\(1\)'"):
        stats.difference(table, "DropTop(1)", "Drop")
    with pytest.raises(ValueError, match="model_b is 'c'; choose one of 'a', 'b'"):
        stats.contrast_models(table, "a", "c", "DropTop(1)")
    with pytest.raises(ValueError, match="a has train_seed 0 and b has 1; none is common"):
        stats.contrast_models(table, "a", "b", "DropTop(1)")
    other = pd.concat([losses([TOP], model="a"), losses([TOP], model="b", documents=7)])
    for compare in (stats.contrast_models, stats.over_seeds):
        with pytest.raises(ValueError, match="measured on other documents"):
            compare(other, "a", "b", "DropTop(1)")
    with pytest.raises(ValueError, match="perturbation is 'Lag'; choose one of 'GaussianNoise'"):
        stats.curve_summary(pd.DataFrame(curve("a", {1: 1.0})), "Lag", x="strength")
