"""Differences of tasks from the clean run, on samples that are made up."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from analysis.stats import task_differences, task_table
from analysis.stats.tasks import mcnemar, newcombe, wilson

KEY = dict(model="m", family="m", train_seed=0, where="all", point="logits", effect="full")
KEY |= dict(downstream="reroute")


def samples(arms, metric="acc", task="t", filter="none", weight=1.0):
    rows = [
        KEY
        | dict(condition=name, perturbation=name, strength=np.nan, eval_seed=0)
        | dict(task=task, filter=filter)
        | dict(document=str(i), doc_hash=f"d{i}", prompt_hash=f"p{i}", target_hash=f"t{i}")
        | dict(metric=metric, value=float(value), weight=weight)
        for name, values in arms.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 5), (9, 2), (0, 12), (30, 41)])
def test_mcnemar_is_the_binomial_test_of_changed_answers(lost, gained):
    number = lost + gained
    expected = binomtest(lost, number).pvalue if number else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_a_difference_of_accuracies():
    clean, other = [1] * 30 + [0] * 10, [0] * 12 + [1] * 18 + [1] * 2 + [0] * 8
    row = task_differences(samples({"clean": clean, "X": other})).iloc[0]
    assert row.label == "X"
    assert (row.clean, row.value) == (30 / 40, 20 / 40)
    assert row.difference == pytest.approx(-0.25)
    assert row.low < -0.25 < row.high < 0
    assert (row.low, row.high) == newcombe(18, 12, 2, 40)
    assert (row.lost, row.gained) == (12, 2)
    assert row.p == pytest.approx(binomtest(2, 14).pvalue)


def test_a_ratio_is_of_sums():
    rows = samples({"clean": [2, 6, 1], "X": [4, 6, 2]}, metric="nats per word")
    rows["weight"] = [1.0, 3.0, 2.0] * 2
    row = task_differences(rows).iloc[0]
    assert (row.clean, row.value) == (9 / 6, 12 / 6)
    assert np.isnan(row.lost)


def test_documents_are_paired_whatever_their_order():
    table = samples({"clean": [1, 0, 1, 1, 0], "X": [1, 1, 0, 1, 0]})
    expected = task_differences(table)
    mixed = table.sample(frac=1, random_state=0)
    mixed = pd.concat([mixed[mixed.condition == "clean"], mixed[mixed.condition == "X"]])
    columns = ["clean", "value", "difference", "lost", "gained", "p"]
    pd.testing.assert_frame_equal(task_differences(mixed)[columns], expected[columns])


@pytest.mark.parametrize("column", ["doc_hash", "prompt_hash", "target_hash"])
def test_another_document_of_the_same_number_is_none(column):
    table = samples({"clean": [1, 0], "X": [1, 1]})
    table.loc[3, column] = "other"
    with pytest.raises(ValueError, match=f"another {column} for document '1' of task 't'"):
        task_differences(table)


def test_a_missing_document():
    table = samples({"clean": [1, 0], "X": [1, 1]})
    with pytest.raises(ValueError, match="samples of 'X' have other documents"):
        task_differences(table[:-1])


def test_a_table_of_tasks():
    arms = {"clean": [1, 1, 0, 1], "X": [0, 1, 0, 1], "Y": [1, 1, 1, 1]}
    both = pd.concat([samples(arms), samples(arms, task="u")])
    table = task_table(task_differences(both))
    assert table.label.tolist() == ["clean", "X", "Y"]
    assert table["t"].tolist() == table["u"].tolist() == [0.75, 0.5, 1.0]
    assert table["t difference"].tolist()[1:] == [-0.25, 0.25]
    two = pd.concat([samples(arms), samples(arms, filter="strict")])
    assert {"t, none", "t, strict"} <= set(task_table(task_differences(two)))


def test_bounds_of_a_share_are_those_of_scipy():
    for yes, number in ((0, 12), (7, 20), (40, 40)):
        exact = binomtest(yes, number).proportion_ci(method="wilson")
        assert wilson(yes / number, number) == pytest.approx((exact.low, exact.high), abs=1e-12)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [  # both, gained, lost, neither: Newcombe's own example
        ((36, 12, 2, 0), 0.0569, 0.3404),
    ],
)
def test_bounds_of_a_change_are_newcombes(table, low, high):
    both, gained, lost, _ = table
    found = newcombe(both, lost, gained, sum(table))
    assert found == pytest.approx((low, high), abs=5e-5)


def test_nothing_that_changes_has_a_width_all_the_same():
    low, high = newcombe(30, 0, 0, 40)
    assert low < 0 < high
    assert high - low < 0.3


def test_bounds_of_changes_hold_the_truth():
    """Of a true change of -0.1, in simulated tasks of 100 documents."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        both, lost, gained, _ = rng.multinomial(100, [0.5, 0.2, 0.1, 0.2])
        low, high = newcombe(both, lost, gained, 100)
        inside += low <= -0.1 <= high
    assert 0.93 < inside / 1000 < 0.98


def test_conditions_of_one_label_stay_apart():
    table = samples({"clean": [1, 1, 0, 1], "X": [0, 1, 0, 1], "Y": [0, 0, 0, 1]})
    seeds = {"clean": 0, "X": 0, "Y": 1}
    table["eval_seed"] = table.condition.map(seeds)
    table.loc[table.condition == "Y", "perturbation"] = "X"
    found = task_differences(table)
    assert found.label.tolist() == ["X", "X"]
    assert found.eval_seed.tolist() == [0, 1]
    assert task_table(found)["t"].tolist() == [0.75, 0.5, 0.25]


def test_holm_is_within_a_metric():
    arms = {"clean": [1] * 12, "X": [0] * 12}
    both = pd.concat([samples(arms), samples(arms, metric="nats")])
    found = task_differences(both)
    assert found.p_holm.tolist() == found.p.tolist()
    assert (found.min_p <= found.p).all()


def test_nothing_but_clean():
    assert task_differences(samples({"clean": [1, 0]})).empty
