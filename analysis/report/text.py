"""What a study found, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis import stats
from analysis.measure import Results
from analysis.report.verdicts import covered, failed_cells, verdicts

NOT_OF_SEEDS = (
    "Intervals are of documents drawn again, each within the domain of most of its tokens: another "
    "training run is not in them, nor in anything that is said of one checkpoint"
)
# Tables of damage taken apart, each a method of `Results`, and their titles.
APART = {
    "split": "Damage divided: Shapley values, main effects and their interaction",
    "cascade": "Cascade: later routers work from the changed stream, or repeat the clean run",
    "additivity": "Damages at single sites, their sum, and all sites at once",
    "gap": "Robustness gap: the worst flips found against as many random ones",
}


def tables(results: Results, contrasts: Mapping[str, Any] | None = None) -> dict[str, pd.DataFrame]:
    """By name, every table that the study has the conditions for.

    contrasts   arguments of `Results.contrasts`, named before the study was run
    """
    made = {"clean": results.clean(), "sites": results.sites(), "failed": results.failed}
    if results.has_conditions:
        damage = results.damage(full=True)
        whole = whole_conditions(damage)
        made |= {
            "damage": damage,
            "robustness": results.table(),
            "per_dose": results.per_dose(),
            **{name: getattr(results, name)() for name in APART},
            "by_domain": results.damage_by("domain", whole),
        }
        if results.tokens is not None:
            made["tails"] = results.tails()
            made |= {f"by_{by}": results.damage_by(by, whole) for by in ("position", "frequency")}
        if contrasts and (left := measured(results, contrasts)):
            made["contrasts"] = results.contrasts(**left)
    return {name: t for name, t in made.items() if len(t) or name in ("clean", "sites")}


def whole_conditions(damage: pd.DataFrame) -> list[str]:
    """Labels of those that act everywhere with all their effect, and are to change something."""
    return list(dict.fromkeys(damage.label[stats.is_plain(damage) & (damage.expects != "none")]))


def measured(results: Results, contrasts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contrasts less the conditions that a study, half finished, does not have in two models;
    None where nothing is left."""
    labels = results.damage(full=True).groupby("model").label.agg(set)
    mine = labels.get(contrasts["reference"], set())
    others = set().union(*labels.drop(contrasts["reference"], errors="ignore"))
    left = [condition for condition in contrasts["conditions"] if condition in mine & others]
    margin = contrasts.get("margin") or None  # a margin of 0 is none
    return dict(contrasts) | {"conditions": left, "margin": margin} if left else None


def describe(
    results: Results,
    made: Mapping[str, pd.DataFrame] | None = None,
    contrasts: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> str:
    """The text of robustness.txt.

    made   what `tables` gave, if it is there already
    data   how the text was sampled: [data] of the study
    """
    made = tables(results, contrasts) if made is None else made
    columns = ["model", "train_seed", "num_documents", "num_tokens", "nats", "low", "high",
               "perplexity", "bits_per_byte"]  # fmt: skip
    unfinished = "UNFINISHED: " if results.finished < results.planned else ""
    parts = [
        f"{unfinished}{results.finished} of {results.planned} cells are measured",
        *failed_cells(results),
        "Clean validation loss (nats per token [95 % interval over documents; of the standard "
        "library, over packages])",
        _text(made["clean"][columns]),
        *([sampling(data)] if data else []),
        NOT_OF_SEEDS,
    ]
    if results.has_conditions:
        parts.append("Routing robustness (form of arXiv 2410.16077, Table 4)")
        parts.append(stats.format_robustness(made["robustness"]))
        damage = made["damage"]
        parts += _every_condition(damage)
        parts += [*covered(results), *verdicts(damage)]
        parts += _taken_apart(made, whole_conditions(damage))
    number = made["clean"].num_documents.min()
    parts += [stats.FEW_NOTE] if number < stats.FEW_DOCUMENTS else []
    if "contrasts" in made:
        margin = (contrasts or {}).get("margin")
        parts += ["Contrasts named beforehand", stats.format_contrasts(made["contrasts"], margin)]
    return "\n\n".join(parts) + "\n"


def sampling(data: Mapping[str, Any]) -> str:
    """How the text was chosen, in a sentence."""
    number, most = data["documents"], data["max_tokens"]
    documents = f"{number} documents at most" if number else "all documents"
    places = {"spread": "in windows spread over it", "first": "from its beginning"}
    of_each = f"{most} tokens of each at most, {places[data['windows']]}" if most else "whole"
    return (
        f"Text: {documents} of {data['corpus']} ({data['split']}), of each domain as large a share "
        f"as it has of that text; {of_each}"
    )


def _every_condition(damage: pd.DataFrame) -> list[str]:
    """One's own and all others that act everywhere with all their effect; any that could change no
    token."""
    rows = damage[stats.is_plain(damage) | (damage.num_touched == 0)]
    if rows.empty:
        return []
    shown = rows[["model", "train_seed", "label", "num_documents"]].assign(
        **{
            "change": stats.interval_texts(rows, "delta_nats", "low", "high"),
            "mass moved": rows.mass_moved,
            "flips": rows.flips,
            "tokens touched": [_share(row) for row in rows.itertuples()],
        }
    )
    title = "Conditions that act everywhere (change of loss in nats per token)"
    return [title, _text(shown.rename(columns={"num_documents": "n"}))]


def _share(row: Any) -> str:
    return "-" if pd.isna(row.num_touched) else f"{row.num_touched / row.num_tokens:.0%}"


def _taken_apart(made: Mapping[str, pd.DataFrame], whole: list[str]) -> list[str]:
    """Titles and texts of the tables that were made."""
    out = []
    for name, title in APART.items():
        if name in made:
            out += [f"{title} (nats per token; share of the whole)", _parts(made[name])]
    doses = made["per_dose"]
    top = doses[(doses.perturbation == "DropTop") & stats.is_plain(doses)]
    if len(top):
        columns = ["model", "train_seed", "label", "top_k", "renormalize", "routed_share"]
        renamed = top.rename(columns={"experts_off": "m / E", "delta_nats": "nats per token"})
        shown = renamed[[*columns, "routed_ratio", "m / E", "nats per token"]]
        for name, slope in (("per flip", "per_flip"), ("per mass moved", "per_mass")):
            shown = shown.assign(**{name: stats.interval_texts(top, slope)})
        out += ["Damage per dose: the slopes from 0 [95 % interval over documents]", _text(shown)]
    if "tails" in made:
        tails = made["tails"][made["tails"].condition.isin(whole)]
        columns = ["model", "train_seed", "condition", "mean", "q0.5", "q0.99", "max"]
        shown = tails[[*columns, "worst_0.01", "worst_0.1"]]
        out += ["Rise of single tokens' losses, and what the worst ones carry", _text(shown)]
    return out


def _parts(table: pd.DataFrame) -> str:
    """A table of parts (see stats/parts.py), with intervals in words."""
    shown = table.rename(columns={"delta_nats": "damage"}).assign(
        damage=stats.interval_texts(table, "delta_nats", "low", "high"),
        share=stats.interval_texts(table, "share"),
    )
    return _text(shown.drop(columns=["family", "low", "high", "share_low", "share_high"]))


def _text(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=stats.number_text, na_rep="-")
