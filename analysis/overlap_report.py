"""What `python -m analysis overlap` leaves in its directory: tables, a manifest, figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots
from analysis.identity import manifest
from analysis.overlap import METRICS, Overlap
from analysis.overlap.base import TABLES
from cartmoe.files import write_atomically

CHECKPOINT = ["model", "train_seed"]
Picture = Callable[[], Axes | Figure]


def write(overlap: Overlap, out: Path, asked: dict[str, Any]) -> list[Path]:
    """Write experts.csv, sites.csv, pairs.csv, manifest.json (`asked` in it) and figures/, each
    whole or not at all; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name in TABLES:
        table = getattr(overlap, name)
        if not table.empty:
            files.append(out / f"{name}.csv")
            write_atomically(files[-1], table.to_csv(index=False))
    files.append(out / "manifest.json")
    write_atomically(files[-1], json.dumps(asked | manifest(), indent=1) + "\n")
    for name, picture in _pictures(overlap):
        with plots.paper_style():
            drawing = picture()
            files += plots.save(drawing, out / "figures" / name)
            plt.close(getattr(drawing, "figure", drawing))
    return files


def _pictures(overlap: Overlap) -> Iterator[tuple[str, Picture]]:
    """For all models one picture a metric of pairs; for each model its first site in detail."""
    measured = list(overlap.pairs.metric.unique())
    within = [name for name in measured if name != "transition"]  # not between two sites
    for name in within:
        yield f"{name}", lambda name=name: plots.overlap_profile(overlap, name)
    for key, pairs in overlap.pairs.groupby(CHECKPOINT, sort=False):
        own = _of_checkpoint(overlap, key)
        place = dict(layer=int(pairs.layer.min()), stage=0)
        stem = f"{key[0]}-s{key[1]}"
        for name in within:
            if METRICS[name].kind == "function":
                yield f"{stem}-{name}", lambda own=own, p=place: plots.substitution_matrix(own, **p)
            else:
                yield (
                    f"{stem}-{name}",
                    lambda own=own, n=name, p=place: plots.overlap_heatmap(own, n, **p),
                )
        if "transition" in measured and "composite_a" in set(own.sites.metric):
            layer = place["layer"]
            yield (
                f"{stem}-usage",
                lambda own=own, layer=layer: plots.cartesian_usage(own, layer=layer),
            )
        if "domain_specialization" in set(own.experts.metric):
            yield (
                f"{stem}-domains",
                lambda own=own, p=place: plots.specialization(own, **p),
            )


def _of_checkpoint(overlap: Overlap, key: tuple[str, int]) -> Overlap:
    parts = {}
    for name in TABLES:
        table = getattr(overlap, name)
        parts[name] = table[(table[CHECKPOINT] == list(key)).all(axis=1)]
    return Overlap(**parts)
