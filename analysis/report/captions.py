"""The words beside figures: caption, methods, how to cite.

`plan` is what `run` has written of a study (see `analysis.study.read_plan`). Of a sweep there is
none, {}: then corpus, tokenizer and versions are left out, since nothing says them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import stats
from analysis.measure import Results, is_saved
from analysis.perturb import PERTURBATIONS, about
from analysis.report.cite import BIBTEX
from analysis.report.figures import FIGURES, Shown, unfinished_text
from analysis.report.text import sampling
from analysis.study import read, read_plan
from cartmoe.config import check_choice
from cartmoe.files import path_of

MOST_LABELS = 12  # conditions that a caption names; of more it says the number
MILLION = 1e6
EMPHASIS, CODE = re.compile(r"\*(\w[^*]*)\*"), re.compile(r"`([^`]*)`")  # in docstrings
Plan = Mapping[str, Any]


def caption(study: Results | str | Path, figure: str | None = None) -> str:
    """What to print beside a figure: caption, a paragraph on methods, BibTeX.

    study    what a sweep gave, or the directory of a study, of which more is known: corpus,
             sampling, tokenizer, versions
    figure   a name in a study's folder figures, such as "controls"; None: what is true of any

    `analysis.plots.save(ax, "mine", analysis.caption(results))` writes it to mine.txt. Raises
    `ValueError` for an unknown figure and one that this study has nothing of, and as `read` does.
    """
    if isinstance(study, Results):
        return words(study, {}, figure)
    if not isinstance(study, str | Path):
        kind = type(study).__name__
        raise ValueError(f"study is a {kind}; give Results, or the directory of a study")
    folder = path_of("study", study)
    results = read(folder)
    return words(results, {} if is_saved(folder) else read_plan(folder), figure)


def words(results: Results, plan: Plan, figure: str | None = None) -> str:
    """`caption` of results that are read already."""
    if figure is None:
        said = " ".join(of_all(results, plan))
        labels = _labels(results.damage(full=True)) if results.has_conditions else []
    else:
        check_choice("figure", figure, FIGURES)
        shown = FIGURES[figure]
        table = shown.table(results)
        if table.empty:
            raise ValueError(f"figure is {figure!r}, of which these results have nothing")
        said = caption_text(results, plan, shown, table)
        labels = _labels(shown.rows(table))
    return f"{said}\n\nMethods. {methods(results, plan, labels)}\n\n{BIBTEX}"


def caption_text(results: Results, plan: Plan, shown: Shown, table: pd.DataFrame) -> str:
    """The caption alone, a paragraph."""
    parts = [alt_text(shown, table), *of_all(results, plan), conditions_text(shown, table)]
    return " ".join(parts)


def alt_text(shown: Shown, table: pd.DataFrame) -> str:
    """For who does not see the figure: what is drawn, and the ends of what it shows."""
    return f"{shown.says} {reading(shown.subject(shown.rows(table)))}"


def conditions_text(shown: Shown, table: pd.DataFrame) -> str:
    """Under which conditions what is drawn was measured."""
    labels = _labels(shown.rows(table))
    if len(labels) > MOST_LABELS:
        return f"{len(labels)} conditions."
    return f"Conditions: {'; '.join(labels)}."


def counted(number: int, noun: str) -> str:
    """ "1 model", "9 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def reading(rows: pd.DataFrame) -> str:
    """The largest and the smallest value of a table, with interval, and whose they are."""
    if "carried" in rows:  # a curve over shares of tokens
        worst = rows[rows.share <= 0.01].groupby("model", sort=False).carried.max().dropna()
        if worst.empty:
            return "There are too few tokens to speak of the worst 1 % of them."
        return f"The worst 1 % of tokens carry {_percents(worst)} of it."
    known = rows[rows.delta_nats.notna()]
    if known.empty:
        return "Nothing of it is known: no token was changed."
    ends = known.loc[[known.delta_nats.idxmax(), known.delta_nats.idxmin()]]
    texts = stats.interval_texts(ends, "delta_nats", "low", "high")
    largest, smallest = (
        f"{text} nats per token ({_name(row)})"
        for text, row in zip(texts, ends.to_dict("records"), strict=True)
    )
    return f"Largest: {largest}; smallest: {smallest}."


def _percents(shares: pd.Series) -> str:
    """ "4 to 7 %"."""
    return f"{' to '.join(dict.fromkeys(f'{100 * s:.0f}' for s in (shares.min(), shares.max())))} %"


def _name(row: Mapping[str, Any]) -> str:
    """Whose value it is: "smoe, seed 0, DropTop(1)"."""
    of = [row[name] for name in ("label", "condition", "part", "group") if name in row]
    return ", ".join([str(row["model"]), f"seed {row['train_seed']}", *map(str, of)])


def of_all(results: Results, plan: Plan) -> list[str]:
    """Sentences that are true of every figure: n and unit, interval, seeds, scale, state."""
    unit, unfinished = results.unit, unfinished_text(results)
    sentences = [
        f"n = {sample_text(results, plan)}.",
        f"Changes are in nats per token, against the clean run of the same text; intervals are "
        f"95 % BCa over {unit}, drawn again within their domains.",
        *([f"{stats.FEW_NOTE}."] if results.clean().num_documents.min() < stats.FEW_DOCUMENTS
          else []),
        seeds_text(results),
        models_text(results),
    ]  # fmt: skip
    return [*sentences, f"{unfinished}."] if unfinished else sentences


def sample_text(results: Results, plan: Plan) -> str:
    """ "29 packages of the Python standard library (validation), 23,571 tokens (bytes)"."""
    clean = results.clean()
    said = f"{_range(clean.num_documents)} {results.unit}"
    if plan:
        data = plan["study"]["data"]
        corpus = "the Python standard library" if _corpus(plan) == "stdlib" else data["corpus"]
        said += f" of {corpus} ({data['split']})"
    tokens = f", {_range(clean.num_tokens)} tokens"
    return said + (f"{tokens} ({tokenizer_text(plan)})" if plan else tokens)


def tokenizer_text(plan: Plan) -> str:
    """Of the compact models; a pretrained one has its own."""
    hf = [bool(model["hf"]) for model in plan["study"]["models"]]
    own = "each model's own" if all(hf) else plan["study"]["data"]["tokenizer"]
    return f"{own}; pretrained models their own" if any(hf) and not all(hf) else own


def seeds_text(results: Results) -> str:
    """How many training seeds there are of each model, and what that leaves open."""
    number = results.losses.groupby("model", sort=False).train_seed.nunique()
    if (number == 1).all():
        return "One training seed a model: another training run is not in the intervals."
    each = ", ".join(f"{model} {n}" for model, n in number.items())
    return (
        f"Training seeds: {each}; of several what is drawn large is their mean, each of them is "
        "faint, and intervals, where they are drawn, speak for one checkpoint each."
    )


def models_text(results: Results) -> str:
    """The models, with their size and what they were trained on where that is known."""
    names, known = [*dict.fromkeys(results.losses.model)], results.models.set_index("model")
    sizes = known.parameters.dropna().groupby(level=0).first() / MILLION
    tokens = known.trained_tokens.dropna().astype(float) / MILLION
    each = [f"{name} {sizes[name]:,.3g}" if name in sizes else str(name) for name in names]
    unit = "Models and their millions of parameters" if len(sizes) else "Models"
    trained = ""
    if len(tokens):
        ends = dict.fromkeys(f"{end:,.3g}" for end in (tokens.min(), tokens.max()))
        trained = f"; trained on {' to '.join(ends)} million tokens"
    return f"{unit}: {', '.join(each)}{trained}."


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():,}", f"{values.max():,}"
    return low if low == high else f"{low} to {high}"


def _corpus(plan: Plan) -> str:
    return plan["study"]["data"]["corpus"] if plan else ""


def _labels(rows: pd.DataFrame) -> list[str]:
    """Of the conditions in a table."""
    return [*rows["label" if "label" in rows else "condition"].unique()]


def methods(results: Results, plan: Plan, labels: Iterable[str]) -> str:
    """A paragraph for a paper: data, the perturbations of these conditions, damage, intervals,
    versions."""
    bootstrap = stats.Bootstrap()
    models = counted(results.losses.model.nunique(), "model")
    sentences = [f"We measured {models} on {sample_text(results, plan)}."]
    if plan:
        sentences += [f"{sampling(plan['study']['data'])}."]
    sentences += [
        "At inference routing was perturbed, one condition at a time; weights were not changed.",
        *definitions(labels),
        "Damage is the summed negative log-likelihood under the condition less that of the clean "
        "run on the same documents, per token (paired).",
        f"Intervals are {100 * bootstrap.confidence:g} % BCa bootstrap intervals (Efron, 1987; "
        f"{bootstrap.resamples:,} resamples) over {results.unit}, drawn within domains.",
    ]
    if plan and plan["contrasts"]:
        sentences += ["Contrasts were named beforehand; p values are adjusted by Holm's method."]
    return " ".join([*sentences, *([versions_text(plan)] if plan else [])])


def definitions(labels: Iterable[str]) -> list[str]:
    """Of the perturbations of these conditions, as the catalogue has it: "DropTop: The m ..."."""
    names = dict.fromkeys(re.split(r"[(,]", label)[0] for label in labels)
    told = [f"{name}: {about(PERTURBATIONS[name])}" for name in names if name in PERTURBATIONS]
    return [CODE.sub(r'"\1"', EMPHASIS.sub(r"\1", text)) for text in told]


def versions_text(plan: Plan) -> str:
    """With what it was computed, and on what."""
    manifest, measure = plan["manifest"], plan["study"]["measure"]
    libraries = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    device, capability = manifest["platform"]["device"], manifest["platform"]["cpu_capability"]
    where = f"{device} ({capability})" if capability else device
    return (
        f"Computed in {measure['precision']} on {where} with Python {manifest['python']}, "
        f"{libraries}."
    )
