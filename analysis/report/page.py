"""A study as one page that needs nothing else: `python -m analysis report DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from tqdm.auto import tqdm

from analysis import plots, stats
from analysis.measure import Results
from analysis.report.captions import (
    Plan,
    alt_text,
    conditions_text,
    counted,
    definitions,
    methods,
    of_all,
    sample_text,
)
from analysis.report.cite import BIBTEX
from analysis.report.figures import drawn, shown_in, unfinished_text
from analysis.report.html import Cells, cells, inline_svg, listed, render
from analysis.report.page_tables import robustness_cells, table_cells
from analysis.report.summary import ends, summary
from analysis.report.text import NOT_OF_SEEDS, sampling, tables
from analysis.report.verdicts import covered, failed_cells, verdicts
from analysis.study import read, read_plan
from cartmoe.files import path_of, write_atomically
from cartmoe.folders import check_directory

PAGE = "report.html"
LIMITS = (
    f"{NOT_OF_SEEDS}.",
    "Intervals are too short where few documents carry most of the damage.",
    "Damage is of next-token loss on this text alone; nothing is said of other text or of tasks.",
    "Routing is disturbed at inference in trained models; how a model would train so is open.",
    "If random routing does not hurt, a model has not learnt to route, and what is said of its "
    "robustness means nothing.",
)


def write_report(
    directory: str | Path, out: str | Path | None = None, progress: bool = False
) -> Path:
    """Write the page of a study, finished or not, whole or not at all, and return its path.

    directory   of the study, which is only read;  out   the file, default: its report.html

    Raises as `read` does, and `ValueError` where `out` is a directory.
    """
    folder = path_of("directory", directory)
    plan, results = read_plan(folder), read(folder)
    path = folder / PAGE if out is None else path_of("out", out)
    if path.is_dir():
        raise ValueError(f"out is {str(path)!r}, a directory; name a file")
    check_directory(path.parent)
    page = page_of(results, plan, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def page_of(results: Results, plan: Plan, progress: bool = False) -> str:
    """The page itself."""
    study, contrasts = plan["study"], plan["contrasts"]
    made = tables(results, contrasts)
    damage = made.get("damage")
    figures = _figures(results, plan, progress)
    labels = [] if damage is None else damage.label.unique()
    values = dict(
        title=f"{study['name']}: how much depends on the router",
        unfinished=unfinished_text(results),
        asked=_asked(results, plan),
        models=_models(results, plan),
        conditions=_conditions(plan),
        summary=summary(results, made, (contrasts or {}).get("margin")),
        figures=figures,
        ends=[] if damage is None else ends(damage),
        robustness=robustness_cells(made),
        controls=[] if damage is None else [*failed_cells(results), *verdicts(damage)],
        tables=table_cells(made),
        unit=results.unit,
        manifest=_manifest(plan),
        **_reproduction(plan),
        limits=[*LIMITS, *covered(results)],
        methods=methods(results, plan, labels),
        bibtex=BIBTEX,
    )
    there = {"robustness": values["robustness"], "figures": figures[1:]}
    sections = [(id, title) for id, title in SECTIONS.items() if there.get(id, True)]
    return render("page.html", sections=sections, titles=SECTIONS, **values)


SECTIONS = {
    "asked": "What was asked",
    "summary": "Summary",
    "robustness": "Robustness",
    "figures": "Figures",
    "controls": "Controls",
    "tables": "Tables",
    "manifest": "Manifest",
    "reproduce": "How to reproduce",
    "limits": "Limits",
    "cite": "Methods, and how to cite",
}


def _figures(results: Results, plan: Plan, progress: bool) -> list[dict[str, Any]]:
    """Drawn one after the other, the main one first."""
    figures: list[dict[str, Any]] = []
    bar = tqdm(shown_in(results), desc="drawing", unit="figure", disable=not progress)
    for name, shown, table in bar:
        with plots.paper_style():
            figure = drawn(shown, table, results)
            svg = inline_svg(figure, name, f"{name}-says")
            plt.close(figure)
        common = [] if figures else of_all(results, plan)  # stands with the first
        more = " ".join([*common, conditions_text(shown, table)])
        said, number = alt_text(shown, table), len(figures) + 1
        figures.append(dict(name=name, number=number, svg=svg, says=said, more=more))
    return figures


def _asked(results: Results, plan: Plan) -> str:
    """The question in a paragraph."""
    planned = _planned(plan)
    models, seeds = planned.model.nunique(), planned.groupby("model").train_seed.nunique()
    families = listed([*map(str, planned.family.unique())])
    number = stats.label(planned[planned.condition != "clean"]).nunique()
    least = "" if seeds.min() == seeds.max() else f"{seeds.min()} to "
    return (
        f"How much does the loss of {counted(models, 'model')} depend on the router being right? "
        f"Families: {families}, {least}{counted(seeds.max(), 'training seed')} of each model; "
        f"disturbed under {counted(number, 'condition')}, measured on "
        f"{sample_text(results, plan)}. {sampling(plan['study']['data'])}."
    )


def _planned(plan: Plan) -> pd.DataFrame:
    return pd.DataFrame(plan["cells"])


def _models(results: Results, plan: Plan) -> Cells:
    keys = ["model", "family", "train_seed"]
    planned = _planned(plan)[keys].drop_duplicates()
    table = planned.merge(results.models, on=["model", "train_seed"], how="left")
    whole = table.assign(
        **{name: table[name].astype("Int64") for name in ("parameters", "trained_tokens")}
    )
    titles = {
        "model": "model",
        "family": "family",
        "train_seed": "seed",
        "parameters": "parameters",
        "trained_tokens": "tokens of training",
    }
    return cells("models", "Models", whole, titles)


def _conditions(plan: Plan) -> list[tuple[str, list[str], str]]:
    """Perturbation, labels of its conditions, what it is."""
    planned = _planned(plan)
    planned = planned[planned.condition != "clean"]
    planned = planned.assign(label=stats.label(planned)).drop_duplicates("label")
    return [
        (str(name), rows.label.tolist(), "".join(definitions(rows.label)).partition(": ")[2])
        for name, rows in planned.groupby("name", sort=False)
    ]


def _manifest(plan: Plan) -> Cells:
    """What it was computed with."""
    manifest = plan["manifest"]
    where, data = manifest["platform"], plan["study"]["data"]
    rows = {
        "device": where["device"],
        "CPU capability": where["cpu_capability"],
        "machine": f"{manifest['machine']}, {manifest['cpus']} CPUs",
        "precision": plan["study"]["measure"]["precision"],
        "Python": manifest["python"],
        **manifest["versions"],
        "git commit": manifest["git_commit"],
        "source digest": where["source"],
        "corpus": f"{data['corpus']}, tokens: {data['tokenizer']}",
        "corpus fingerprint": plan.get("corpus_fingerprint"),
    }
    table = pd.DataFrame({"what": [*rows], "value": [*rows.values()]})
    return cells("manifest", "What it was computed with", table)


def _reproduction(plan: Plan) -> dict[str, str]:
    """Commands, and the study's definition."""
    commit, toml = plan["manifest"]["git_commit"], plan.get("toml", "")
    lines = [f"git checkout {commit.removesuffix('-dirty')}"] if commit else []
    lines += [
        "pip install -c constraints.txt -e .",
        "python -m analysis run study.toml --out DIR",
        "python -m analysis report DIR",
    ]
    dirty = bool(commit) and commit.endswith("-dirty")
    changed = "The checkout had changes that are not in that commit. " if dirty else ""
    told = "study.toml is:" if toml else "The study was made in Python; as JSON it is:"
    definition = toml or json.dumps(plan["study"], indent=1)
    return dict(commands="\n".join(lines), definition_is=changed + told, definition=definition)
