"""Whether dropping an expert hurts less where those that take over have much in common with it.

Shapes: E experts of a site, N experts of all sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.adapters import owned
from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics import METRICS
from analysis.overlap.removal import Removal
from analysis.overlap.request import DAMAGE, fits, metric_names
from analysis.overlap.tables import Overlap
from analysis.stats import ALL, Bootstrap, facts_of, relation
from cartmoe.cards import card
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite

PREDICTORS = (
    *("cka", "output_cosine", "matched_cosine", "flat_cosine", "router_cosine"),
    *("co_activation", "lift", "token_js", "composite_cka"),
)


@dataclass(frozen=True)
class Relation:
    """What `relate` measured.

    experts    the table of `expert_damage` with a column a metric: sum_j takeover_ij overlap_ij,
               turned round (times -1) for distances and divergences, so that more is more in common
    takeover   the table of `takeover`
    overlap    the table of `measure_overlap`, not turned round
    metrics    names
    """

    experts: pd.DataFrame
    takeover: pd.DataFrame
    overlap: Overlap
    metrics: tuple[str, ...]

    def __repr__(self) -> str:
        """What was measured, of which models; the tables are attributes."""
        size = f"{len(self.experts)} experts of {', '.join(self.experts.model.unique())}"
        return f"Relation of {size}; metrics {', '.join(self.metrics)}; table(), experts, ..."

    def _repr_html_(self) -> str:
        """Rank correlations of all models together."""
        table = self.table()
        columns = ["metric", "r", "low", "high", "null_low", "null_high", "p_holm", "num_sites"]
        table = table[table.model == ALL] if ALL in set(table.model) else table
        shown = {"table(), damage per weight dropped": table[columns].round(3)}
        return card(repr(self).partition(";")[0], tables=shown)

    def table(
        self,
        damage: str = "per_mass",
        metrics: str | Sequence[str] | None = None,
        bootstrap: Bootstrap = Bootstrap(),
    ) -> pd.DataFrame:
        """Rank correlations within sites, given load; see `analysis.stats.relation`."""
        names = self.metrics if metrics is None else metrics
        return relation(self.experts, names, damage, bootstrap)


def relate(
    models: object,
    docs: Sequences,
    metrics: str | Sequence[str] | None = None,
    *,
    sites: Any = None,
    probe: str = "all",
    refill: bool = True,
    batch_size: int = 16,
    bootstrap: Bootstrap = Bootstrap(),
    seed: int = 0,
    progress: bool = True,
) -> Relation:
    """Damage of each expert beside its overlap with those that took over.

    models    one, or several, of which one at a time is in use: they may be loaded as they come
    metrics   of pairs of experts, by default `PREDICTORS`; NaN where one does not fit a model
    refill    see `expert_damage`; who takes over is what the router would decide in either case

    The other parameters are those of `expert_damage` and `measure_overlap`. Raises `ValueError` as
    they do, for metrics that are not of pairs of one site, or are damage themselves, for sites of
    one expert, and for two models of one name and train_seed.
    """
    if isinstance(models, Mapping | str):
        raise ValueError(f"models is a {type(models).__name__}; give models, or a list of them")
    names = _predictors(metrics)
    frames, heirs, overlaps = {}, [], []
    for model in models if isinstance(models, Iterable) else [models]:
        removal = Removal(model, docs, sites, batch_size)
        model, chosen = removal.model, removal.sites
        alone = ", ".join(site.name for site in chosen if site.num_experts == 1)
        if alone:
            raise ValueError(f"{alone} of {model.name}: one expert, nobody can take over")
        key = model.name, model.train_seed
        if model.name == ALL:
            raise ValueError(
                f"models has one called {ALL!r}, as all together are; name it otherwise"
            )
        if key in frames:
            raise ValueError(f"models has two called {key[0]!r} of train_seed {key[1]}; name them")
        columns: dict[str, Any] = dict.fromkeys(names, np.nan)
        with owned(model):
            heirs.append(removal.takeover())
            own = [name for name in names if fits(model, chosen, name, METRICS[name])]
            if own:
                how: Any = dict(batch_size=batch_size, seed=seed, progress=progress)
                how |= dict(confidence=bootstrap.confidence)
                overlaps.append(measure_overlap(model, docs, own, chosen, probe, **how))
                columns |= {name: _with_heirs(removal.shares, overlaps[-1], name) for name in own}
            frames[key] = removal.damage(refill, bootstrap, progress).assign(**columns)
    if not frames:
        raise ValueError("models is empty; give at least one")
    if not overlaps:
        raise ValueError(f"metrics is {metrics!r}, and models has none that they fit")
    experts, heirs = (pd.concat(f, ignore_index=True) for f in (frames.values(), heirs))
    return Relation(experts, heirs, Overlap.join(overlaps), names)


def _predictors(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None:
        return PREDICTORS
    of_pairs = [name for name, metric in METRICS.items() if metric.table == "pairs"]
    names = metric_names(metrics, [name for name in of_pairs if not facts_of(name).across])
    for name in names:
        if METRICS[name].kind == DAMAGE:
            raise ValueError(f"metrics has {name!r}, which is damage itself, and explains nothing")
    return names


def _with_heirs(
    shares: Mapping[RouterSite, np.ndarray], overlap: Overlap, metric: str
) -> np.ndarray:
    """(N,) sum_j takeover_ij overlap_ij of each site's experts; more is more in common."""
    sign = -1.0 if facts_of(metric).apart else 1.0
    parts = []
    for site, share_EE in shares.items():
        E = site.num_experts
        # A shared expert's row and column come last.
        overlap_EE = overlap.matrix(metric, site.layer, site.stage)[:E, :E]
        # Who takes over nothing does not matter, though its overlap may not be defined.
        parts.append(sign * np.where(share_EE == 0, 0.0, share_EE * overlap_EE).sum(1))
    return np.concatenate(parts)
