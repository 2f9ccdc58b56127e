"""Overlap as tidy tables: a row an expert, a site or a pair of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.adapters import Adapter
from analysis.overlap.metrics import TABLES, Estimate
from analysis.stats import INDEX, SHARED, SITE, check_choice, check_one_step, square
from cartmoe.hooks import RouterSite

KEYS = [*SITE, "metric"]
VALUES = ["value", "low", "high", "null", "unit", "num_units"]


@dataclass(frozen=True)
class Overlap:
    """What `analysis.measure_overlap` found; design.md, "Tables".

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

    def __repr__(self) -> str:
        """What was measured, of which models; the tables are attributes."""
        tables = [getattr(self, name) for name in TABLES]
        sizes = ", ".join(f"{len(t)} rows of {n}" for n, t in zip(TABLES, tables, strict=True))
        seen = pd.concat([table[["model", "metric"]] for table in tables])
        models, metrics = (", ".join(seen[name].unique()) for name in ("model", "metric"))
        return f"Overlap of {models}: {sizes}; metrics {metrics}"

    @classmethod
    def join(cls, overlaps: Sequence[Overlap]) -> Overlap:
        """Of several models as one. Raises `ValueError` for none, and for two of one name and
        train_seed of which the same was measured."""
        if not overlaps:
            raise ValueError("overlaps is empty: there is nothing to join")
        tables = {name: [getattr(o, name) for o in overlaps] for name in TABLES}
        tables = {name: [t for t in own if not t.empty] or own for name, own in tables.items()}
        joined = {name: pd.concat(own, ignore_index=True) for name, own in tables.items()}
        for table, rows in joined.items():
            keys = [k for k in (*KEYS, *INDEX[table], "domain", "step") if k in rows]
            twice = rows[rows.duplicated(keys)]
            if len(twice):
                first = twice.iloc[0]
                raise ValueError(
                    f"overlaps has two of {first.model!r}, train_seed {first.train_seed}, with the "
                    "same metrics; load one under another name"
                )
        return cls(**joined)

    def table(self, metric: str) -> pd.DataFrame:
        """The rows of one metric; `ValueError` with those that were measured for another."""
        tables = [getattr(self, name) for name in TABLES]
        measured = [m for table in tables for m in table.metric.unique()]
        check_choice("metric", metric, measured)
        rows = next(table for table in tables if (table.metric == metric).any())
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


def rows_of(
    model: Adapter,
    site: RouterSite,
    metric: str,
    table: str,
    found: Estimate,
    unit: str,
    num_units: int,
    shared: bool = False,
    domains: Sequence[str] = (),
) -> pd.DataFrame:
    """Rows of one metric at one site.

    shared    the last expert of the estimate is the shared one
    domains   the estimate has one more dimension, of these
    """
    keys = (model.name, model.family, model.train_seed, site.layer, site.stage, metric)
    frame = pd.DataFrame({name: np.ravel(getattr(found, name)) for name in VALUES[:4]})
    for at, (name, key) in enumerate(zip(KEYS, keys, strict=True)):
        frame.insert(at, name, key)
    indices = np.indices(found.value.shape).reshape(found.value.ndim, found.value.size)
    names = [*INDEX[table], *(["domain"] if domains else [])]
    for at, (name, index) in enumerate(zip(names, indices, strict=True), len(KEYS)):
        if name == "domain":
            index = np.array(domains, dtype=object)[index]
        elif shared:
            index = np.where(index == found.value.shape[0] - 1, SHARED, index)
        frame.insert(at, name, index)
    frame = frame.assign(unit=unit, num_units=num_units)
    if table == "pairs" and metric != "transition":
        frame = frame[frame.expert_i != frame.expert_j]
    return frame
