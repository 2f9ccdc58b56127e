"""Differences of tasks from the clean run, on samples that are made up."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from analysis.stats import task_differences, task_table
from analysis.stats.tasks import mcnemar

KEY = dict(model="m", family="m", train_seed=0, where="all", point="logits", effect="full")
KEY |= dict(downstream="reroute")


def samples(arms, metric="acc", task="t", filter="none", weight=1.0):
    rows = [
        KEY
        | dict(condition=name, perturbation=name, strength=np.nan, task=task, filter=filter)
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


def test_nothing_but_clean():
    assert task_differences(samples({"clean": [1, 0]})).empty
