"""Contrasts between models: what is tested, and what may be said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from analysis import stats
from analysis.stats.bootstrap import Bootstrap
from analysis.stats.contrasts import holm
from analysis.stats.seeds import sign_flip_test

from ..synthetic import arm, losses

NAME = "DropTop(1)"


def runs(costs: dict[str, list[float]], documents: int = 20, conditions=("DropTop",)):
    """Models whose runs of seed 0, 1, ... cost so much."""
    return pd.concat(
        losses(
            [arm(name, 1, cost) for name in conditions],
            model=model, train_seed=seed, documents=documents, rng=5,
        )
        for model, own in costs.items()
        for seed, cost in enumerate(own)
    )  # fmt: skip


def test_several_seeds_are_compared_over_seeds():
    table = runs({"cartesian": [1.0, 1.1, 1.05], "smoe": [0.5, 0.45, 0.4]})
    row = stats.family_contrasts(table, bootstrap=Bootstrap(resamples=999)).iloc[0]
    over = stats.over_seeds(
        table, "cartesian", "smoe", NAME, bootstrap=Bootstrap(resamples=999)
    ).iloc[0]
    for column in ("delta_nats", "low", "high", "p", "min_p"):
        assert row[column] == pytest.approx(over[column])
    assert row.speaks_for == "training seeds"
    assert (row.seeds_reference, row.seeds, row.p_holm) == (3, 3, 0.1)
    # However large the difference, three seeds each cannot show it.
    assert row.verdict == "undecided"
    assert "no difference, however large, could be shown" in stats.format_contrasts(
        stats.family_contrasts(table, bootstrap=Bootstrap(resamples=99))
    )


def test_five_seeds_can_show_a_difference():
    costs = 1 + 0.02 * np.arange(5)
    table = runs({"cartesian": list(costs), "smoe": list(costs - 0.5)}, documents=8)
    found = stats.family_contrasts(table, bootstrap=Bootstrap(resamples=999))
    assert found.verdict.tolist() == ["differs"]
    assert found.p_holm[0] == pytest.approx(2 / 252)
    assert "no difference, however large" not in stats.format_contrasts(found)


def test_one_seed_speaks_for_checkpoints_only():
    table = runs({"cartesian": [1.0], "smoe": [0.5, 0.6]})
    found = stats.family_contrasts(table, bootstrap=Bootstrap(resamples=999))
    row = found.iloc[0]
    direct = stats.contrast_models(
        table, "cartesian", "smoe", NAME, bootstrap=Bootstrap(resamples=999)
    ).iloc[0]
    assert (
        row[["delta_nats", "low", "high"]].tolist()
        == direct[["delta_nats", "low", "high"]].tolist()
    )
    assert (row.speaks_for, row.train_seed) == ("these checkpoints", "0")
    assert row.verdict == "differs"
    assert row.min_p == pytest.approx(1 / 1000)
    assert "the checkpoints of seed 0 only" in stats.format_contrasts(found)


def test_seeds_that_are_not_common_are_named():
    table = pd.concat([losses([arm("DropTop", 1, 1.0)], model="cartesian"),
                       losses([arm("DropTop", 1, 0.5)], model="smoe", train_seed=3)])  # fmt: skip
    assert stats.family_contrasts(table, bootstrap=Bootstrap(resamples=99)).train_seed.tolist() == [
        "0 and 3"
    ]


def test_nothing_is_equal_without_a_margin():
    same = [0.5, 0.52, 0.48, 0.51]
    table = runs({"cartesian": same, "smoe": same})
    without = stats.family_contrasts(table, bootstrap=Bootstrap(resamples=999))
    assert without.verdict.tolist() == ["undecided"]
    assert "does not say that there is no difference" in stats.format_contrasts(without)
    row = without.iloc[0]
    half = row.high - row.delta_nats
    wide = stats.family_contrasts(table, margin=2 * half, bootstrap=Bootstrap(resamples=999))
    assert wide.verdict.tolist() == ["equivalent within margin"]
    # Two one-sided tests at 5 %: the 90 % interval decides, which is narrower than that of 95 %.
    narrower = half * scipy.stats.t.ppf(0.95, 6) / scipy.stats.t.ppf(0.975, 6)
    for margin, verdict in ((narrower * 1.01, "equivalent within margin"), (narrower * 0.99, None)):
        found = stats.family_contrasts(table, margin=margin, bootstrap=Bootstrap(resamples=999))
        assert found.verdict[0] == (verdict or "undecided")
    assert "equivalence margin" in stats.format_contrasts(wide, 2 * half)


def test_a_small_difference_that_is_sure_is_equivalent_within_a_wide_margin():
    costs = 1 + 0.02 * np.arange(5)
    table = runs({"cartesian": list(costs), "smoe": list(costs - 0.5)}, documents=8)
    found = stats.family_contrasts(table, margin=1.0, bootstrap=Bootstrap(resamples=999))
    assert found.verdict.tolist() == ["equivalent within margin"]
    assert found.p_holm[0] < 0.05


def test_holm_counts_every_test_of_the_family():
    table = runs(
        {"cartesian": [1.0, 1.1], "a": [0.5, 0.6], "b": [1.05, 0.4]},
        documents=8, conditions=("DropTop", "DropChosen"),
    )  # fmt: skip
    conditions = [NAME, "DropChosen(1)"]
    found = stats.family_contrasts(table, conditions=conditions, bootstrap=Bootstrap(resamples=99))
    pairs = found[["condition", "model"]].to_numpy().tolist()
    assert pairs == [[c, m] for c in conditions for m in ("a", "b")]
    np.testing.assert_allclose(found.p_holm, holm(found.p.to_numpy()))
    assert (found.p_holm == 1).all()  # 4 tests, the least p of two seeds is 1 / 3


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1, 1])


def test_sign_flips_against_scipy():
    gap = np.random.default_rng(0).normal(0.4, 1, 9)
    p, min_p = sign_flip_test(gap)
    expected = scipy.stats.permutation_test(
        (gap,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert p == pytest.approx(expected.pvalue)
    assert min_p == 2 / 2**9
    sampled, least = sign_flip_test(gap, bootstrap=Bootstrap(resamples=300, seed=1))
    assert sampled == pytest.approx(p, abs=0.1)
    assert least == pytest.approx(1 / 301)
    assert sign_flip_test(np.zeros(20), bootstrap=Bootstrap(resamples=99))[0] == 1


def test_sign_flips_come_in_blocks(monkeypatch):
    gap = np.random.default_rng(0).normal(0.4, 1, 40)
    whole = sign_flip_test(gap, bootstrap=Bootstrap(resamples=200))[0]
    monkeypatch.setattr("analysis.stats.bootstrap.CHUNK", 100)
    assert sign_flip_test(gap, bootstrap=Bootstrap(resamples=200))[0] == pytest.approx(
        whole, abs=0.1
    )


def test_models_without_the_condition_are_left_out():
    table = pd.concat([runs({"cartesian": [1.0], "smoe": [0.5]}), losses([], model="dense")])
    assert stats.family_contrasts(table, bootstrap=Bootstrap(resamples=99)).model.tolist() == [
        "smoe"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "olmoe"}, "reference is 'olmoe'; choose one of 'cartesian', 'smoe'"),
        ({"conditions": ["Drop"]}, r"condition of cartesian is 'Drop'; choose one of 'DropTop\(1"),
        ({"margin": 0.0}, "margin is 0.0; it must be above 0 nats per token, or None"),
        (
            {"bootstrap": Bootstrap(confidence=0.4)},
            "confidence is 0.4; of a test it must be above 0.5",
        ),
    ],
)
def test_wrong_contrasts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stats.family_contrasts(runs({"cartesian": [1.0], "smoe": [0.5]}), **options)


def test_a_reference_alone_is_no_contrast():
    with pytest.raises(ValueError, match="no model but 'cartesian' to compare"):
        stats.family_contrasts(runs({"cartesian": [1.0, 0.9]}))
