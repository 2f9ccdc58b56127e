"""The pictures of the README, from `make catalogue` and results/.

    python -m studies.gallery [NAME ...]

That of sharing is drawn by studies/sharing.py, those of the explorer by hand from its page.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

import analysis as an
from analysis.plots.marks import draw_lines
from analysis.plots.style import model_styles

HERE = Path(__file__).parents[1]
RUNS, RESULTS = HERE / "runs", HERE / "results"
LABELS = [
    *("DropTop(1)", "KeepRanks", "TopK(1)", "TopK(4)", "DropExperts(0.25)", "DropSlots(0.5)"),
    *("DropChosen(1)", "DropUnchosen(1)", "GaussianNoise(1)", "GumbelNoise(1)", "Temperature(2)"),
    *("SwapRanks", "Quantize(2, bits)", "UniformWeights(1)", "Lag(1)", "Lag(1, over=sites)"),
    *("Replay(cartesian)", "Worst(1)", "Worst(1, choose=random)", "RandomRouting(1)"),
    *("ResidualNoise(1, of=DropTop)", "NoRouted"),
]


def of_the_catalogue() -> dict[str, Callable[[], Any]]:
    """Every perturbation, and damage taken apart."""
    results = an.read(RUNS / "catalogue")
    damage = results.damage(full=True)
    chosen = damage[damage.label.isin(LABELS)]
    gap = results.gap()
    frequency = results.damage_by("frequency", ["DropTop(1)"])
    model = an.load("cartesian")
    docs = an.documents("stdlib", model, length=256, limit=24, max_tokens_per_document=256)
    flips = an.flip_prediction(model, docs, [0.1, 0.25, 0.5, 1.0, 2.0])
    return {
        "catalogue": lambda: an.plots.catalogue_dots(chosen),
        "noise": lambda: an.plots.dose_panels(damage, "GaussianNoise"),
        "gap": lambda: an.plots.gap_curve(gap[gap.per == "token"]),
        "layers": lambda: an.plots.layer_profile(results),
        "split": lambda: an.plots.split_bars(results.split("DropTop(1)")),
        "cascade": lambda: an.plots.cascade_dots(results.cascade("DropTop(1)")),
        "tails": lambda: an.plots.tail_shares(results.tail_curve(["DropTop(1)"])),
        "frequency": lambda: an.plots.group_curve(frequency),
        "flips": lambda: an.plots.flip_calibration(flips),
    }


def of_the_results() -> dict[str, Callable[[], Any]]:
    """The main figure, over training, over size."""
    read = {
        f"{folder}/{name}": pd.read_parquet(RESULTS / folder / f"{name}.parquet")
        for folder, name in [
            *((seeds, "damage") for seeds in ("trained", "third")),
            *(("training", name) for name in ("damage", "overlap", "saturation")),
            *(("overlap", name) for name in ("per_mass", "relation")),
            *(("larger", "training"), ("size", "sizes")),
        ]
    }
    return {
        "controls": lambda: an.plots.control_dots(
            pd.concat([read["trained/damage"], read["third/damage"]])
        ),
        "training": lambda: over_training(
            read["training/damage"], read["training/overlap"], read["training/saturation"]
        ),
        "relation": lambda: an.plots.relation_dots(read["overlap/per_mass"]),
        "damage_overlap": lambda: an.plots.damage_against_overlap(
            read["overlap/relation"], "token_js"
        ),
        "seeds": lambda: over_seeds(read["larger/training"], read["size/sizes"]),
    }


def over_training(damage: pd.DataFrame, overlap: pd.DataFrame, settled: pd.DataFrame) -> Figure:
    """A panel a quantity, a line a model, against the bytes that it was trained on; of several
    training seeds their mean."""
    styles = {model: look | {"ms": 3} for model, look in model_styles(damage).items()}
    clean = damage.drop_duplicates(["model", "train_seed", "step"])
    panels = {
        "loss, nats per byte": clean.assign(value=clean.clean_nats),
        "damage of DropTop(1), nats": of_label(damage, "DropTop(1)"),
        "damage of random routing, nats": of_label(damage, "RandomRouting(1)"),
        "share of the final experts used": of_model(settled),
        "CKA of experts' outputs": of_model(overlap[overlap.metric == "cka"]),
        "matched cosine of weights": of_model(overlap[overlap.metric == "matched_cosine"]),
    }
    figure, axes = plt.subplots(2, 3, figsize=(7, 4.2), layout="constrained", sharex=True)
    for ax, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        draw_lines(ax, rows, styles, "tokens", "value", bounds=(None, None))
        ax.set(title=title, xscale="log")
    for ax in axes[-1]:
        ax.set_xlabel("bytes of training")
    handles, labels = axes.flat[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, handlelength=2.8)
    return figure


def of_label(damage: pd.DataFrame, label: str) -> pd.DataFrame:
    """The rows of one condition."""
    rows = damage[damage.label == label]
    return rows.assign(value=rows.delta_nats)


def of_model(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean over the sites of each model."""
    return rows.groupby(["model", "train_seed", "tokens"]).value.mean().reset_index()


def over_seeds(larger: pd.DataFrame, size: pd.DataFrame) -> Figure:
    """Cartesian less smoe_share of equal seed and equal tokens: over training, and over width."""
    keys = ["label", "tokens", "train_seed"]
    nano = larger[larger.preset == "nano"]
    wide = nano.pivot(index=keys, columns="model", values="delta_nats").dropna()
    wide = wide.assign(difference=wide.cartesian - wide.smoe_share).reset_index()
    labels = {"DropTop(1)": "black", "RandomRouting(1)": "#8A8A8A"}  # no family's colors
    panels = [
        ("7.4 million parameters, over training", "tokens", "bytes of training", wide),
        ("8 bytes a parameter, over width", "width", "width", size),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained", sharey=True)
    for ax, (title, x, name, rows) in zip(axes, panels, strict=True):
        for label, color in labels.items():
            for _, line in rows[rows.label == label].groupby("train_seed"):
                ax.plot(line[x], line.difference, color=color, lw=0.8, marker="o", ms=2.5)
            ax.plot([], [], color=color, marker="o", ms=2.5, label=label)
        ax.axhline(0, color="0.3", lw=0.8)
        ax.set(title=title, xlabel=name, xscale="log")
    widths = size.width.unique()
    axes[1].set_xticks(widths, labels=widths)
    axes[1].minorticks_off()
    axes[0].set_ylabel("cartesian - smoe_share,\nnats per byte; a line a seed")
    axes[0].legend(loc="lower left")
    return figure


def main(names: list[str]) -> None:
    """All, or those of these names."""
    for pictures in (of_the_catalogue, of_the_results):
        with an.plots.paper_style():
            for name, picture in pictures().items():
                if not names or name in names:
                    drawing = picture()
                    figure = getattr(drawing, "figure", drawing)
                    figure.savefig(HERE / "gallery" / f"{name}.png", dpi=200)
                    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
