"""What a comparison of checkpoints has measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from analysis import stats
from analysis.adapters import Adapter, DenseRouting
from analysis.measure.doses import change_of
from analysis.measure.numbering import (
    Numbers,
    matched_by_usage,
    renumbered,
    same_numbers,
    side_by_side,
)
from analysis.measure.results import Results
from analysis.measure.rows import SequenceRows, means
from analysis.stats import Bootstrap, pair
from cartmoe.data import Sequences
from cartmoe.routing import Routing

NUMBERED = ["as numbered", "trained apart"]


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. The first model is the reference; intervals are over documents.

    results   of all models, as `sweep` gives them for one
    models    their names, in order
    numbers   of models whose experts are others than the reference's, by site, whose place each
              takes: they were trained apart, so that a number says nothing, and usage matches them
    """

    results: Results
    models: tuple[str, ...]
    drifts: Mapping[str, SequenceRows]
    numbers: Mapping[str, Numbers] = field(default_factory=dict)

    def drift(self, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
        """How far the clean decisions of each other model lie from the reference's on the same
        tokens: a row for all sites that both have with as many experts, and for each of them.

        model, reference, where, experts ("as numbered", or "matched by usage" where the models were
        trained apart: one to one so that they agree on most tokens, which these documents chose, so
        that what is left is a little too small), num_documents, num_tokens, and per token, each
        with _low and _high:
        flips        share of the reference's experts that this model does not use
        changed      share of tokens with another set of experts
        mass_moved   total variation between the weights
        js           Jensen-Shannon divergence of the scores as distributions (nats, at most ln 2)

        Raises `ValueError` naming models that have no such site.
        """
        apart = [name for name in self.models[1:] if name not in self.drifts]
        if apart:
            raise ValueError(
                f"{', '.join(apart)} and {self.models[0]} have no router at the same layer and "
                "stage with as many experts, so their decisions cannot be compared"
            )
        tables = [
            means(rows.frame(), ["where"], bootstrap).assign(
                model=name, reference=self.models[0], experts=self._experts(name)
            )
            for name, rows in self.drifts.items()
        ]
        table = pd.concat(tables, ignore_index=True)
        first = ["model", "reference", "where", "experts"]
        return table[[*first, *table.columns.drop(first)]]

    def _experts(self, name: str) -> str:
        return "matched by usage" if name in self.numbers else "as numbered"

    def damage_difference(self, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
        """Of every condition the damage in each other model minus that in the reference, by
        document: model, reference, condition, num_documents, delta_nats, low, high,
        delta_bits_per_byte, bpb_low, bpb_high. Above 0: the other model is hurt more."""
        # A name stands for one checkpoint, whatever seed it was trained with.
        losses = pair(self.results.losses.assign(train_seed=0))
        labels = dict.fromkeys(self.results.damage().label)
        tables = [
            stats.contrast_models(losses, model, self.models[0], label, bootstrap)
            for model in self.models[1:]
            for label in labels
        ]
        table = pd.concat(tables, ignore_index=True).drop(columns="train_seed")
        return table.rename(columns={"model_a": "model", "model_b": "reference"})

    def drift_cost(self) -> pd.DataFrame:
        """What another of the models' decisions (`Replay`) or gates (`GateSwap`) cost a model, in
        place of its own; below 0 they serve it better.

        model, imposed ("decisions" or "gates"), of, experts ("as numbered"; "trained apart": then
        a number means another expert in each; of two that were trained apart from the reference
        "not known"), label, delta_nats, low, high,
        delta_bits_per_byte, bpb_low, bpb_high, mass_moved, flips. Raises `ValueError` if neither
        was among the perturbations.
        """
        kinds = {"Replay": "decisions", "GateSwap": "gates"}
        named = {f"{kind}({name})": (kinds[kind], name) for kind in kinds for name in self.models}
        damage = self.results.damage(full=True)
        rows = damage[damage.perturbation.isin(list(named))].copy()
        rows["imposed"] = [named[p][0] for p in rows.perturbation]
        rows["of"] = [named[p][1] for p in rows.perturbation]
        rows = rows[rows["of"] != rows.model]
        apart = {name: name in self.numbers for name in self.models}
        rows["experts"] = [
            "not known" if apart[a] and apart[b] else NUMBERED[apart[a] or apart[b]]
            for a, b in zip(rows.model, rows["of"], strict=True)
        ]
        if rows.empty:
            name = self.models[0]
            raise ValueError(
                f"no model was run with another's decisions; add an.Replay({name!r}) or "
                f"an.GateSwap({name!r}) to the perturbations"
            )
        columns = ["model", "imposed", "of", "experts", "label", "delta_nats", "low", "high"]
        columns += ["delta_bits_per_byte", "bpb_low", "bpb_high", "mass_moved", "flips"]
        return rows[columns].reset_index(drop=True)

    def table(self) -> pd.DataFrame:
        """A row a condition: the damage in each model and, for each other model, its difference to
        the reference, in nats per token with low and high."""
        names = ["delta_nats", "low", "high"]
        parts = [
            (model, rows.set_index("label")[names])
            for model, rows in self.results.damage(full=True).groupby("model", sort=False)
        ]
        differences = self.damage_difference().groupby("model", sort=False)
        parts += [
            (f"{model} - {self.models[0]}", rows.set_index("condition")[names])
            for model, rows in differences
        ]
        tables = [
            part.set_axis([name, f"{name} low", f"{name} high"], axis=1) for name, part in parts
        ]
        return pd.concat(tables, axis=1).rename_axis("condition")

    def __repr__(self) -> str:
        clean = self.results.clean()
        nats = ", ".join(f"{row.model} {row.nats:.3f}" for row in clean.itertuples())
        lines = [f"{clean.num_documents.iloc[0]} documents; clean nats per token: {nats}"]
        if len(self.drifts) == len(self.models) - 1:
            overall = self.drift()[lambda t: t["where"] == "all"]
            lines += [
                f"{row.model} decides otherwise than {row.reference}: {row.flips:.1%} of experts, "
                f"{row.changed:.1%} of tokens (experts {row.experts})"
                for row in overall.itertuples()
            ]
        return "\n".join(
            [*lines, self.table().to_string(float_format=partial(stats.number_text, digits=4))]
        )


def drifts_of(
    models: Mapping[str, Adapter], docs: Sequences, batch_size: int
) -> tuple[dict[str, SequenceRows], dict[str, Numbers]]:
    """Of every model but the first, how its clean decisions differ from the first one's; and of
    those whose experts are numbered otherwise, whom each of them is taken for."""
    (_, reference), *others = models.items()
    apart = {name: model for name, model in others if not same_numbers(reference, model)}
    numbers = matched_by_usage(reference, apart, docs, batch_size) if apart else {}
    rows: dict[str, SequenceRows] = {}
    for name, batch, site, base, other in side_by_side(reference, dict(others), docs, batch_size):
        if name in numbers:
            other = renumbered(other, numbers[name][site.place])
        differences = _differences(base, other)
        for where in ("all", str(site)):
            rows.setdefault(name, SequenceRows()).add(batch, differences, where=where)
    return rows, numbers


def _differences(base: Routing, other: Routing) -> dict[str, Tensor]:
    before, after = DenseRouting(base), DenseRouting(other)
    doses = change_of(before, after, before)
    return {name: doses[name] for name in ("flips", "changed", "mass_moved")} | {
        "js": js_divergence(base.scores_TE, other.scores_TE)
    }


def js_divergence(a_TE: Tensor, b_TE: Tensor) -> Tensor:
    """(T,) Jensen-Shannon divergence in nats of scores as distributions; 0 to ln 2."""
    a_TE, b_TE = (s.double() / s.double().sum(-1, keepdim=True) for s in (a_TE, b_TE))
    entropy = torch.special.entr
    mean_TE = (a_TE + b_TE) / 2
    return (entropy(mean_TE) - (entropy(a_TE) + entropy(b_TE)) / 2).sum(-1).clamp(min=0)
