"""What models answered, document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from analysis import stats
from analysis.stats import Bootstrap
from cartmoe.cards import card


@dataclass(frozen=True)
class TaskResults:
    """samples: model, family, train_seed, the columns that name a condition ("clean": the clean
    run), task, filter, document, doc_hash, prompt_hash, target_hash, metric, value, weight.
    groups: by name, the tasks of each."""

    samples: pd.DataFrame
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def differences(self, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
        """Every metric, task and condition against the clean run; see `stats.task_differences`."""
        return stats.task_differences(self.samples, bootstrap, self.groups)

    def table(self, metric: str | None = None, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
        """Tasks as columns, conditions as rows; see `stats.task_table`.

        metric   one that samples have; default: "acc", or else the first. Raises `ValueError` for
                 another
        """
        have = list(dict.fromkeys(self.samples.metric))
        metric = metric or ("acc" if "acc" in have else have[0])
        stats.check_choice("metric", metric, have)
        chosen = self.samples[self.samples.metric == metric]
        return stats.task_table(stats.task_differences(chosen, bootstrap, self.groups), metric)

    def __repr__(self) -> str:
        rows = self.samples
        tasks, models = ", ".join(rows.task.unique()), ", ".join(rows.model.unique())
        number = rows.condition.nunique() - 1
        return f"TaskResults of {models} in {tasks}: {number} conditions; table(), differences()"

    def _repr_html_(self) -> str:
        return card(repr(self).partition(";")[0], tables={"table()": self.table()})
