"""Facts of metrics are of metrics that there are; intervals have one form."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.overlap.metrics.catalogue import METRICS
from analysis.stats.bootstrap import Intervals
from analysis.stats.metric_facts import FACTS, facts_of
from analysis.stats.texts import interval_texts


def test_facts_are_of_metrics_of_overlap():
    assert FACTS.keys() <= METRICS.keys() | {"cka_permuted"}
    across = [name for name in METRICS if facts_of(name).across]
    assert across == ["transition"]
    for name, facts in FACTS.items():
        paired = name not in METRICS or METRICS[name].table == "pairs"
        assert paired or not (facts.apart or facts.across or facts.ratio), name


def test_a_metric_that_is_not_listed_has_its_name():
    assert facts_of("my_own") == ("my own", False, False, False)


def test_intervals_as_columns_and_text():
    found = Intervals(*np.array([[0.5, np.nan], [0.25, 0.0], [np.nan, 1.0]]))
    assert list(found.columns("cost")) == ["cost", "cost_low", "cost_high"]
    columns = found.columns("cost", "low", "high")
    assert list(columns) == ["cost", "low", "high"]
    table = pd.DataFrame({"cost": [0.5, -1.0, np.nan]})
    table = table.assign(cost_low=[0.25, np.nan, 0.0], cost_high=[0.75, np.nan, 1.0])
    assert interval_texts(table, "cost") == ["+0.500 [0.250, 0.750]", "-1.000 [-]", "-"]
    renamed = table.set_axis(["v", "a", "b"], axis=1)
    assert interval_texts(renamed, "v", "a", "b", digits=1)[0] == "+0.5 [0.2, 0.8]"
