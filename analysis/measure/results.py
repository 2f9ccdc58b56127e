"""What a study or a sweep has measured, as tables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis import stats
from analysis.adapters import Adapter
from analysis.measure.collector import Cell
from analysis.measure.saved import BYTES, KEY, TABLES, read_tables, write_tables
from analysis.perturb import Condition
from analysis.stats import Pairs, pair
from cartmoe.cards import card
from cartmoe.files import path_of

TOKENS = ["document_id", "sequence_id", *BYTES]
FACTS = ["model", "train_seed", "layer", "stage", "metric", "value"]
MODELS = ["model", "train_seed", "coverage", "parameters", "trained_tokens"]
# Columns of damage that a reader needs first.
SHORT = [
    *("model", "train_seed", "label", "num_documents", "num_touched"),
    *("delta_nats", "low", "high", "mass_moved", "flips", "agreement", "note"),
]


def key_columns(model: str, family: str, train_seed: int, condition: Condition) -> dict:
    """The columns that name a cell in every table."""
    named = {"model": model, "family": family, "train_seed": train_seed}
    return named | condition.columns()


@dataclass(frozen=True)
class Results:
    """Tables: `losses` and `routing` hold sums, everything else is derived.

    facts      model, train_seed, layer, stage, metric, value: what is fixed by the architecture
    models     model, train_seed, coverage (of a pretrained model how much of its experts is seen),
               parameters, trained_tokens (NaN where nothing says how many)
    unit       what a document_id stands for, which statistics draw again: "documents", "packages"
    finished, planned   cells; a half-finished study can be read like a finished one
    cells      a row a finished cell: the columns that name it, shard, seconds
    failed     a row a cell that killed its workers: the columns that name it, shard, reason
    tokens     where every token's loss was kept: (model, train_seed, condition) -> the frame
               `Cell.tokens` of all its shards, condition "clean" being the clean run
    """

    losses: pd.DataFrame
    routing: pd.DataFrame
    facts: pd.DataFrame
    finished: int
    planned: int
    cells: pd.DataFrame = field(default_factory=pd.DataFrame)
    failed: pd.DataFrame = field(default_factory=pd.DataFrame)
    models: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=MODELS))
    tokens: Callable[[str, int, str], pd.DataFrame] | None = None
    unit: str = "documents"

    def __repr__(self) -> str:
        """What was measured, of which models; the tables are methods."""
        clean, models = self.losses[self.losses.condition == "clean"], self.losses.model.unique()
        size = f"{clean.document_id.nunique()} {self.unit}, {self.losses.condition.nunique() - 1}"
        cells = f"{self.finished} of {self.planned} cells"
        return f"Results of {', '.join(models)}: {size} conditions, {cells}; damage(), table(), ..."

    def _repr_html_(self) -> str:
        """The clean models, and the changes of loss that are largest."""
        title = repr(self).partition(";")[0]
        if self.finished < self.planned:
            title = f"Unfinished. {title}"
        clean = self.clean()
        names = clean[["model", "train_seed"]]
        loss = stats.interval_texts(clean, "nats", "low", "high", sign=False)
        shown = {"clean loss, nats per token": names.assign(loss=loss)}
        if self.has_conditions:
            damage = self.damage().sort_values("delta_nats", ascending=False, kind="stable")
            change = stats.interval_texts(damage, "delta_nats", "low", "high")
            keys = damage[["model", "train_seed", "label"]]
            shown["damage(), nats per token"] = keys.assign(change=change)
        return card(title, tables=shown)

    def save(self, path: str | Path) -> None:
        """Keep it in a new folder, from which `analysis.read` gives it back to the last bit. Raises
        `FileExistsError` if there is something at the path."""
        frames = {name: getattr(self, name) for name in TABLES}
        if self.tokens is not None:
            asked = self.losses[KEY].drop_duplicates().itertuples(index=False, name=None)
            parts = [self.tokens(*key).assign(**dict(zip(KEY, key, strict=True))) for key in asked]
            frames["tokens"] = pd.concat(parts, ignore_index=True).reindex(columns=[*KEY, *TOKENS])
        write_tables(
            path_of("path", path),
            frames,
            dict(finished=self.finished, planned=self.planned, unit=self.unit),
        )

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """What `save` wrote. Raises `ValueError` naming the file that is not what was written."""
        frames, counts = read_tables(path_of("path", path))
        frame = frames.pop("tokens", None)
        made = cls(**frames, **counts)
        if frame is None:
            return made
        of = {key: rows.drop(columns=KEY) for key, rows in frame.groupby(KEY, sort=False)}
        empty = {k: r.drop(columns="targets") for k, r in of.items() if r.targets.isna().all()}
        return replace(made, tokens=lambda *key: (of | empty)[key].reset_index(drop=True))

    @functools.cached_property
    def _pairs(self) -> list[Pairs]:
        return pair(self.losses)

    @functools.cached_property
    def _damage(self) -> pd.DataFrame:
        return stats.damage(self._pairs, self.routing)

    @property
    def has_conditions(self) -> bool:
        """Whether anything but clean runs was measured."""
        return bool((self.losses.condition != "clean").any())

    def damage(self, full: bool = False) -> pd.DataFrame:
        """Change of every condition with intervals, doses beside it: what a reader needs first, or
        every column of `stats.damage`, which pictures and other tables are made of."""
        return self._damage.copy() if full else self._damage[SHORT]

    def clean(self) -> pd.DataFrame:
        """The clean runs, dense models too; see `stats.clean_table`."""
        return stats.clean_table(self._pairs)

    def sites(self) -> pd.DataFrame:
        """`facts`, and of the clean run, per site: mean entropy (nats), margin (logits), active
        experts, routed_share (c_0) and routed_ratio (||c_0 routed|| / ||residual||)."""
        keys = ["model", "train_seed", "layer", "stage"]
        metrics = ["active", "entropy", "margin", "routed_share", "routed_ratio"]
        clean = self.routing[self.routing.condition == "clean"]
        sums = clean.groupby(keys, sort=False)[["num_tokens", *metrics]].sum()
        means = sums[metrics].div(sums.num_tokens, axis=0).reset_index()
        long = means.melt(id_vars=keys, var_name="metric", value_name="value")
        return pd.concat([self.facts, long], ignore_index=True)

    def table(self) -> pd.DataFrame:
        """The paper's Table 4 with intervals, both mask points, each stage, and the controls."""
        return stats.robustness_table(self._damage, self.sites())

    # Damage taken apart. `condition` is a label as in `damage()`; without one, all conditions for
    # which what is needed was measured, which may be none.

    def split(self, condition: str | None = None) -> pd.DataFrame:
        """Divided into set, weights and mass (`analysis.split_arms`); see `stats.split`."""
        return stats.split(self._pairs, condition)

    def cascade(self, condition: str | None = None) -> pd.DataFrame:
        """With and without the routers behind (`analysis.cascade_arms`); see `stats.cascade`."""
        return stats.cascade(self._pairs, condition, self.routing)

    def additivity(self, condition: str | None = None) -> pd.DataFrame:
        """Each site alone, their sum, all at once (`analysis.site_arms`); `stats.additivity`."""
        return stats.additivity(self._pairs, condition, self.routing)

    def gap(self, condition: str | None = None) -> pd.DataFrame:
        """Worst against random flips, and what the search costs; see `stats.gap`."""
        return stats.gap(self._pairs, condition, self.routing, self.cells)

    def per_dose(self) -> pd.DataFrame:
        """Damage per flip and per mass moved, K and routed share beside it; `stats.per_dose`."""
        return stats.per_dose(self._pairs, self.routing, self.sites())

    def contrasts(
        self,
        reference: str = "cartesian",
        conditions: Sequence[str] = ("DropTop(1)",),
        margin: float | None = None,
    ) -> pd.DataFrame:
        """The reference against each other model; see `stats.family_contrasts`. Name them before
        you look; "equivalent" needs a margin, in nats per token."""
        return stats.family_contrasts(self._pairs, reference, conditions, margin)

    def tails(self, conditions: Sequence[str] | None = None) -> pd.DataFrame:
        """Quantiles over tokens, and what the worst ones carry; see `stats.tails`. Like all that
        speaks of tokens it needs them kept: `ValueError` says how."""
        return stats.tails(self.losses, self.tokens, conditions)

    def tail_curve(self, conditions: Sequence[str] | None = None) -> pd.DataFrame:
        """Share of the damage over the share of tokens; see `stats.tail_curve`."""
        return stats.tail_curve(self.losses, self.tokens, conditions)

    def damage_by(self, by: str, conditions: Sequence[str] | None = None) -> pd.DataFrame:
        """Damage by "position", "frequency" or "domain"; see `stats.damage_by`. The domain alone
        needs no tokens."""
        return stats.damage_by(self.losses, by, self.tokens, conditions)


class Description(NamedTuple):
    """What results say of a model: what tables call it, and rows of `Results.facts`, `models`."""

    name: str
    family: str
    train_seed: int
    facts: list[dict[str, Any]]
    model: dict[str, Any]


def describe(model: Adapter) -> Description:
    """Of this model."""
    named = dict(model=model.name, train_seed=model.train_seed)
    facts = [
        named | dict(layer=site.layer, stage=site.stage, metric=metric, value=value)
        for site in model.sites()
        for metric, value in model.router(site).facts.items()
    ]
    described = named | {
        "coverage": getattr(model, "coverage", ""),
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "trained_tokens": getattr(model, "trained_on", {}).get("tokens"),
    }
    return Description(model.name, model.family, model.train_seed, facts, described)


def join(measured: Sequence[tuple[Adapter, Sequence[Cell]]]) -> Results:
    """Results of cells that were just measured on several models, one shard each."""
    tables: dict[str, list[pd.DataFrame]] = {"losses": [], "routing": []}
    rows, tokens = [], {}
    for model, cells in measured:
        for cell in cells:
            columns = key_columns(model.name, model.family, model.train_seed, cell.condition)
            for name, parts in tables.items():
                parts.append(getattr(cell, name).assign(**columns))
            rows.append(columns | {"shard": 0, "seconds": cell.seconds})
            if cell.tokens is not None:
                tokens[model.name, model.train_seed, columns["condition"]] = cell.tokens
    frames = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    described = [describe(model) for model, _ in measured]
    facts = [row for one in described for row in one.facts]
    return Results(
        **frames,
        facts=pd.DataFrame(facts, columns=FACTS),
        finished=len(rows),
        planned=len(rows),
        cells=pd.DataFrame(rows),
        models=pd.DataFrame([one.model for one in described], columns=MODELS),
        tokens=(lambda *key: tokens[key]) if tokens else None,
    )
