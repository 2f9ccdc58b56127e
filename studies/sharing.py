"""Sharing as a treatment: what experts have in common, and what wrong routing costs, where domains
have more or less in common.

    python studies/sharing.py --out runs/sharing

trains small models on the corpus `factorial` at several sharing levels, `common` of the variance of
log-odds and the rest in equal parts of topic, style and pair. Of each model it measures what the
experts have in common and what wrong routing costs. It writes CSV tables and sharing.png / .pdf.
The same command goes on where it was. Each training seed has tables of text of its own, so that
intervals speak for other seeds and other text of the same law.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import typer
from scipy.special import stdtrit
from tqdm import tqdm

import analysis as an
from analysis.overlap.measure import measure_overlap
from analysis.overlap.truth import factor_information, truth_scores
from analysis.plots.style import model_styles
from analysis.stats.overlap_tables import SHARED
from cartmoe import ModelConfig
from cartmoe.factorial import Factorial
from cartmoe.folders import write_folder
from cartmoe.train import TrainConfig, train

LEVELS = (0.8, 0.4, 0.0)
MODELS = {
    "cartesian": dict(family="cartesian"),
    "parallel": dict(family="cartesian", composition="parallel"),
    "smoe_share": dict(family="smoe_share"),
}
# Few symbols and large initial weights, so that a few hundred steps are enough to tell domains by
# what came before, also where they have nothing in common: what was not learnt cannot be damaged.
ALPHABET = 16
SHAPE: dict[str, Any] = dict(d_model=64, ffn_width=128, num_layers=2, num_heads=2, init_std=0.05)
SHAPE |= dict(num_experts=8, moe_interval=1)
RECIPE: dict[str, Any] = dict(batch_size=16, length=128, learning_rate=4e-3, precision="fp32")
DOCUMENTS: dict[str, Any] = dict(length=128, limit=96, max_tokens_per_document=128)
METRICS = ["cka", "matched_cosine", "token_js", "lift", "domain_specialization"]
KEYS = ["level", "model", "family", "train_seed"]
LINE = ["quantity", "model", "family"]
TABLES = ("damage", "pairs", "experts", "truth", "factors")
PANELS = {
    "DropTop(1)": "damage of DropTop(1), nats",
    "RandomRouting": "damage of random routing, nats",
    "cka": "CKA of experts' outputs",
    "matched_cosine": "matched cosine of weights",
    "token_js": "divergence of experts' tokens, nats",
    "mi_pair": "I(expert; domain), nats above null",
}


class Run(NamedTuple):
    """One model to train and to measure."""

    level: float
    model: str
    seed: int

    @property
    def corpus(self) -> Factorial:
        rest = (1 - self.level) / 3
        shares: dict[str, Any] = dict(common=self.level, topic=rest, style=rest, pair=rest)
        return Factorial(**shares, alphabet=ALPHABET, seed=self.seed)

    @property
    def folder(self) -> str:
        return f"{self.model}-common{self.level}-s{self.seed}"


def main(
    out: Annotated[Path, typer.Option(help="Directory of models, tables and the figure.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of each model.")] = 300,
    seeds: Annotated[int, typer.Option(help="Training seeds.", min=1)] = 3,
) -> None:
    """Train, measure, write tables and the figure."""
    runs = [Run(*key) for key in _keys(seeds)]
    for run in tqdm(runs, unit="model"):
        measured = out / "measured" / run.folder
        model = trained(run, out / "models" / run.folder, steps)
        if not measured.exists():
            tables = measure(run, model)
            write_folder(measured, functools.partial(write, tables))
    tables = {
        name: pd.concat(
            [pd.read_csv(out / "measured" / run.folder / f"{name}.csv") for run in runs],
            ignore_index=True,
        )
        for name in TABLES
    }
    tables["summary"] = summary(tables)
    tables["curves"] = curves(tables["summary"])
    tables["differences"] = differences(tables["summary"])
    write(tables, out)
    an.plots.save(figure(tables["curves"]), out / "sharing")
    for name in ("curves", "differences"):
        typer.echo(tables[name].to_string(index=False, float_format="{:.3f}".format))
    typer.echo(f"Everything is in {out}")


def _keys(seeds: int) -> Iterator[tuple[float, str, int]]:
    """Seed by seed, so that what is interrupted has all levels of the first ones."""
    for seed in range(seeds):
        for level in LEVELS:
            for model in MODELS:
                yield level, model, seed


def trained(run: Run, folder: Path, steps: int):
    """The model under study; trained now, or there already."""
    config = ModelConfig.preset("nano", **MODELS[run.model], **SHAPE)
    recipe = TrainConfig.preset(
        "nano", steps=steps, seed=run.seed, corpus=run.corpus.name, **RECIPE
    )
    train(config, recipe, folder, progress=False)
    return an.load(folder, name=run.model)


def measure(run: Run, model) -> dict[str, pd.DataFrame]:
    """By name the tables of one model, with its level."""
    docs = an.documents(run.corpus.name, model, **DOCUMENTS)
    conditions = [an.DropTop(1), an.RandomRouting()]
    results = an.sweep(model, docs, conditions, controls=False, progress=False)
    overlap = measure_overlap(model, docs, METRICS, progress=False)
    tables = {
        "damage": results.damage(full=True),
        "pairs": overlap.pairs,
        "experts": overlap.experts,
        "truth": truth_scores(overlap, run.corpus),
        "factors": factor_information(model, docs, run.corpus),
    }
    return {name: table.assign(level=run.level) for name, table in tables.items()}


def write(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Each as NAME.csv."""
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)


def summary(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A number a model and quantity: damage of conditions, means over sites and pairs of routed
    experts of metrics and of their truth scores ("cka~truth"), and of routers' information on
    factors above its null."""
    damage, pairs, truth = tables["damage"], tables["pairs"], tables["truth"]
    clean = damage.drop_duplicates(KEYS)
    pairs = pairs[(pairs[["expert_i", "expert_j"]] != SHARED).all(axis=1)]
    factors, known = tables["factors"], ["mi_topic", "mi_style", "mi_pair"]
    above = {name: factors[name] - factors[f"{name}_null"] for name in known}
    parts = [
        clean.assign(quantity="clean loss", value=clean.clean_nats),
        damage.assign(quantity=damage.label.str.replace("RandomRouting(1)", "RandomRouting"),
                      value=damage.delta_nats),
        pairs.assign(quantity=pairs.metric),
        truth.assign(quantity=truth.metric + "~truth", value=truth.score),
        factors.assign(**above).melt(KEYS, known, "quantity", "value"),
    ]  # fmt: skip
    rows = pd.concat([part[[*KEYS, "quantity", "value"]] for part in parts])
    return rows.groupby([*KEYS, "quantity"], sort=False).value.mean().reset_index()


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over training seeds with Student's 95 % interval, NaN with a single seed."""
    return _over_seeds(rows, [*LINE, "level"])


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """The greatest level less the least, seed by seed, as levels of a seed have the same tables of
    text: mean with Student's 95 % interval."""
    levels = rows.pivot(index=[*LINE, "train_seed"], columns="level", values="value")
    change = levels[levels.columns.max()] - levels[levels.columns.min()]
    return _over_seeds(change.rename("value").reset_index(), LINE)


def _over_seeds(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    found = rows.groupby(keys, sort=False).value.agg(["mean", "std", "count"]).reset_index()
    half = found["std"] / found["count"] ** 0.5 * stdtrit(found["count"] - 1, 0.975)
    return found.assign(low=found["mean"] - half, high=found["mean"] + half)


def figure(found: pd.DataFrame):
    """A panel a quantity, a line a model, against the share that all domains have in common."""
    styles = model_styles(found)
    with an.plots.paper_style():
        drawing, axes = plt.subplots(2, 3, figsize=(7, 4), layout="constrained", sharex=True)
        for ax, (quantity, name) in zip(axes.flat, PANELS.items(), strict=True):
            for shift, (model, rows) in enumerate(
                found[found.quantity == quantity].groupby("model", sort=False)
            ):
                rows = rows.sort_values("level")
                x = rows.level + 0.015 * (shift - 1)
                ax.plot(x, rows["mean"], label=model, **styles[model])
                ax.vlines(x, rows.low, rows.high, color=styles[model]["color"], lw=0.8)
            ax.set_title(name)
        for ax in axes[-1]:
            ax.set_xlabel("share common to all domains")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=3, handlelength=2.8)
    return drawing


if __name__ == "__main__":
    typer.run(main)
