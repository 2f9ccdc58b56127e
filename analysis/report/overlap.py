"""What `python -m analysis overlap` leaves in its directory: tables, a manifest, figures."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analysis import plots
from analysis.adapters import Adapter, load
from analysis.adapters import documents as read_documents
from analysis.overlap import Overlap, check_request, measure_overlap
from analysis.overlap.metrics import METRICS
from analysis.plots import SHARES, SIMILAR
from analysis.report.cite import BIBTEX
from analysis.report.made import Note, Picture, draw, write_note, write_tables
from analysis.stats import CHECKPOINT, facts_of
from analysis.study import STREAMS, manifest
from cartmoe.folders import check_directory
from cartmoe.lock import LOCK, locked

MANIFEST = "manifest.json"


def overlap_into(
    out: Path,
    paths: Sequence[Path],
    metrics: Sequence[str] | None = None,
    sites: str | None = None,
    probe: str = "all",
    *,
    corpus: str = "stdlib",
    documents: int = 60,
    length: int = 256,
    stream: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Measure overlap of the models at these paths and write what `write_overlap` does, unless this
    was asked there before; returns the paths.

    stream   of pretrained models: a layer at a time

    Raises as `finished` and `measure_overlap` do, before anything is computed.
    """
    check_directory(out)
    asked_for = (metrics, sites, probe)
    loaded = {f"{model.name}-s{model.train_seed}": model for model in named(paths, stream)}
    for model in loaded.values():  # before texts are read and the first takes minutes
        check_request(model, *asked_for)
    limits: dict[str, Any] = dict(length=length, limit=documents, max_tokens_per_document=length)
    data = {name: read_documents(corpus, model, **limits) for name, model in loaded.items()}
    asked = dict(
        models={name: model.identity for name, model in loaded.items()},
        data={name: docs.sha256 for name, docs in data.items()},
        corpus=corpus,
        documents=documents,
        length=length,
        metrics=sorted(set(metrics or [])),
        sites=sites,
        probe=probe,
        coverage={name: getattr(model, "coverage", "") for name, model in loaded.items()},
    )
    if files := finished(out, asked):
        tqdm.write(f"{out} is finished")
        return files
    if any(len(set(docs.document_id)) < 2 for docs in data.values()):
        raise ValueError(f"corpus {corpus!r} has one document; intervals need several")
    with locked(out):
        streams = out / STREAMS if stream else None
        if stream:  # before the first layer, so that the same command finds its own folder
            write_note(out / MANIFEST, asked | manifest(), [])
        found = [
            measure_overlap(model, data[name], *asked_for, streams=streams, progress=progress)
            for name, model in loaded.items()
        ]
        files = write_overlap(Overlap.join(found), out, asked)
        shutil.rmtree(out / STREAMS, ignore_errors=True)
        return files


def named(paths: Sequence[Path], stream: bool = False) -> list[Adapter]:
    """The models of these checkpoints or runs, those that tables could not tell apart by family and
    seed by the names of their folders. Raises `ValueError` where that does not help either."""
    models: list[Adapter] = [load(path, stream=stream) for path in paths]
    seen = Counter((model.name, model.train_seed) for model in models)
    for path, model in zip(paths, models, strict=True):
        if seen[model.name, model.train_seed] > 1:
            model.name = path.resolve().name
    again = Counter((model.name, model.train_seed) for model in models)
    for (name, seed), number in again.items():
        if number > 1:
            raise ValueError(
                f"MODEL has {number} called {name!r} of train_seed {seed}; give each once, from "
                "folders of different names"
            )
    return models


def finished(out: Path, asked: dict[str, Any]) -> list[Path] | None:
    """The files in `out` if all that is `asked` now was measured there and they are as they were
    written; None if it is to be done.

    Raises `ValueError` where it holds anything else, which would be lost.
    """
    if not out.exists() or all(path.name == LOCK for path in out.iterdir()):
        return None
    damage = ""
    try:
        note = Note.read(out / MANIFEST)
    except FileNotFoundError:
        note = Note({}, {})
    except ValueError as error:
        note, damage = Note({}, {}), f" ({error})"
    other = note.other(asked)
    if other:
        raise ValueError(
            f"out is {str(out)!r}, which holds other results ({', '.join(other)}); "
            f"choose another{damage}"
        )
    return [out / MANIFEST, *note.files] if note.files and note.is_whole() else None


def write_overlap(overlap: Overlap, out: Path, asked: dict[str, Any]) -> list[Path]:
    """Write experts.csv, sites.csv, pairs.csv, manifest.json (`asked` in it) and figures/, each
    whole or not at all; returns their paths. Raises as `finished`."""
    finished(out, asked)
    said, note = asked | manifest(), out / MANIFEST
    write_note(note, said, [])
    files = write_tables({n: t for n, t in overlap.tables.items() if not t.empty}, out)
    for name, picture, metrics, own in _pictures(overlap):
        files += draw(picture, out / "figures" / name, _words(metrics, own, asked))
    write_note(note, said, files)
    return [note, *files]


def _words(metrics: Iterable[str], overlap: Overlap, asked: Mapping[str, Any]) -> str:
    """Beside a picture of these metrics: what they are, of which models, on what, how to cite."""
    rows = pd.concat(overlap.tables.values())
    rows = rows[rows.metric.isin([*metrics])]
    said = [f"{facts_of(name).label}: {METRICS[name].about}." for name in rows.metric.unique()]
    checkpoints = rows[["model", "train_seed"]].drop_duplicates().itertuples()
    models = [f"{row.model} (seed {row.train_seed})" for row in checkpoints]
    said.append(f"Models: {', '.join(models)}.")
    if "corpus" in asked:
        said.append(
            f"Text: {asked['documents']} documents at most of {asked['corpus']}, {asked['length']} "
            f"tokens of each; probe: {asked['probe']} tokens."
        )
    resampled = rows[rows.low.notna()]
    if len(resampled):
        number, unit = resampled.num_units.max(), resampled.unit.iloc[0]
        said.append(f"Intervals: 95 %, jackknife, n = {number} ({unit}); null: under chance.")
    return f"{' '.join(said)}\n\n{BIBTEX}"


def _pictures(overlap: Overlap) -> Iterator[tuple[str, Picture, Sequence[str], Overlap]]:
    """Its name, what draws it, of which metrics and what it is. For all models one picture a metric
    of pairs; for each model its first site in detail."""
    for name in _within_sites(overlap):
        yield name, partial(plots.overlap_profile, overlap, name), [name], overlap
    rows = pd.concat([table[CHECKPOINT] for table in overlap.tables.values()])
    for checkpoint in rows.drop_duplicates().itertuples(index=False):
        own = overlap.map(partial(_rows_of, checkpoint))
        stem = f"{checkpoint.model}-s{checkpoint.train_seed}"
        for name in _within_sites(own):
            if METRICS[name].kind == "function":
                draw = partial(plots.substitution_matrix, own, **_first_site(own, name))
            else:
                draw = partial(plots.overlap_heatmap, own, name)  # of the first site
            yield f"{stem}-{name}", draw, [name], own
        for layer in _cartesian_layers(own)[:1]:
            usage = partial(plots.cartesian_usage, own, layer=layer)
            yield f"{stem}-usage", usage, ["transition", *SHARES, *SIMILAR], own
        name = "domain_specialization"
        if name in set(own.experts.metric):
            draw = partial(plots.specialization, own, **_first_site(own, name))
            yield f"{stem}-domains", draw, [name], own


def _within_sites(overlap: Overlap) -> list[str]:
    """Metrics of pairs of experts of one site."""
    return [name for name in overlap.pairs.metric.unique() if not facts_of(name).across]


def _first_site(overlap: Overlap, metric: str) -> dict[str, Any]:
    """The first at which it was measured."""
    first = overlap.table(metric).iloc[0]
    return dict(layer=int(first.layer), stage=int(first.stage))


def _cartesian_layers(overlap: Overlap) -> list[int]:
    """Those of which everything was measured that `cartesian_usage` draws."""
    needed = {("transition", 1), *((name, 0) for name in (*SHARES, *SIMILAR))}
    rows = pd.concat([overlap.pairs, overlap.sites])
    return [
        int(layer)
        for layer, own in rows.groupby("layer")
        if needed <= set(zip(own.metric, own.stage, strict=True))
    ]


def _rows_of(checkpoint: Sequence[Any], table: pd.DataFrame) -> pd.DataFrame:
    return table[(table[CHECKPOINT] == list(checkpoint)).all(axis=1)]
