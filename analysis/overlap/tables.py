"""Overlap as tidy tables: a row an expert, a site or a pair of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.adapters import Adapter
from analysis.overlap.metrics import TABLES, Estimate
from analysis.stats import INDEX, SHARED, SITE, check_choice, check_one_step, facts_of, square
from cartmoe.cards import card
from cartmoe.hooks import RouterSite

KEYS = [*SITE, "metric"]
VALUES = ["value", "low", "high", "null", "unit", "num_units"]


@dataclass(frozen=True)
class Overlap:
    """What `analysis.measure_overlap` found.

    experts, sites, pairs   model, family, train_seed, layer, stage, metric, then expert (`SHARED`
        for the shared one), or expert_i and expert_j; value, low and high (the jackknife over units
        of documents, NaN where nothing is resampled), null (the value under chance, NaN where there
        is none), unit (what is resampled) and num_units

    Pairs are ordered, without an expert and itself; for "transition" expert_i belongs to the site
    before. A row of the experts' metric "domain_specialization" has a domain too.
    """

    experts: pd.DataFrame
    sites: pd.DataFrame
    pairs: pd.DataFrame

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By name."""
        return {name: getattr(self, name) for name in TABLES}

    def map(self, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Overlap:
        """Each table changed."""
        return Overlap(*map(change, self.tables.values()))

    def __repr__(self) -> str:
        """What was measured, of which models; the tables are attributes."""
        sizes = ", ".join(f"{len(table)} rows of {name}" for name, table in self.tables.items())
        seen = pd.concat([table[["model", "metric"]] for table in self.tables.values()])
        models, metrics = (", ".join(seen[name].unique()) for name in ("model", "metric"))
        return f"Overlap of {models}: {sizes}; metrics {metrics}"

    def _repr_html_(self) -> str:
        """The mean of each metric over experts or pairs of experts, beside its null."""
        tables = pd.concat([t.assign(of=name) for name, t in self.tables.items() if len(t)])
        keys = ["model", "train_seed", "metric", "of"]
        means = tables.groupby(keys, sort=False)[["value", "null"]].mean().round(3).reset_index()
        return card(repr(self).partition(";")[0], tables={"means over experts or pairs": means})

    @classmethod
    def join(cls, overlaps: Sequence[Overlap]) -> Overlap:
        """Of several models as one. Raises `ValueError` for none, and for two of one name and
        train_seed of which the same was measured."""
        if not overlaps:
            raise ValueError("overlaps is empty: there is nothing to join")
        joined = cls(*(concat([o.tables[name] for o in overlaps]) for name in TABLES))
        for table, rows in joined.tables.items():
            keys = [k for k in (*KEYS, *INDEX[table], "domain", "step") if k in rows]
            twice = rows[rows.duplicated(keys)]
            if len(twice):
                first = twice.iloc[0]
                raise ValueError(
                    f"overlaps has two of {first.model!r}, train_seed {first.train_seed}, with the "
                    "same metrics; load one under another name"
                )
        return joined

    def table(self, metric: str) -> pd.DataFrame:
        """The rows of one metric; `ValueError` with those that were measured for another."""
        measured = {m: table for table in self.tables.values() for m in table.metric.unique()}
        check_choice("metric", metric, measured)
        rows = measured[metric]
        return rows[rows.metric == metric].reset_index(drop=True)

    def matrix(self, metric: str, layer: int, stage: int = 0, column: str = "value") -> np.ndarray:
        """(E, E) of a metric of pairs at one site, NaN on the diagonal; with a shared expert its
        row and column come last. `ValueError` naming the sites that there are, and for tables of
        several models or steps."""
        rows = self.table(metric)
        sites = sorted(set(zip(rows.layer, rows.stage, strict=True)))
        check_choice("(layer, stage)", (layer, stage), sites)
        rows = rows[(rows.layer == layer) & (rows.stage == stage)]
        if rows.model.nunique() > 1 or rows.train_seed.nunique() > 1:
            raise ValueError("several models were measured; take the rows of one")
        check_one_step(rows)
        if "expert_i" not in rows:
            raise ValueError(f"metric is {metric!r}, which is not of pairs")
        return square(rows, column).to_numpy()


def concat(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Those that have rows, if some do: the columns of others have no types."""
    return pd.concat([t for t in tables if not t.empty] or tables, ignore_index=True)


def site_columns(model: Adapter, site: RouterSite) -> dict[str, Any]:
    """The columns that name a site in every table."""
    return dict(zip(SITE, (model.name, model.family, model.train_seed, *site.place), strict=True))


def rows_of(
    columns: dict[str, Any],
    table: str,
    found: Estimate,
    site: RouterSite,
    domains: Sequence[str] = (),
) -> pd.DataFrame:
    """Rows of one metric at one site, which the columns name.

    An expert more than the site's is the shared one. domains: the estimate has one more dimension,
    of these.
    """
    places = np.indices(found.value.shape).reshape(found.value.ndim, found.value.size)
    index = dict(zip([*INDEX[table], "domain"], places, strict=False))
    within = not facts_of(columns["metric"]).across
    for name in INDEX[table] if within else ():
        index[name] = np.where(index[name] == site.num_experts, SHARED, index[name])
    if domains:
        index["domain"] = np.array(domains, dtype=object)[index["domain"]]
    values = {name: np.ravel(values) for name, values in found._asdict().items()}
    rows = pd.DataFrame(columns | index | values)
    return rows[rows.expert_i != rows.expert_j] if within and table == "pairs" else rows
