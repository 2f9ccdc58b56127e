"""python -m analysis run STUDY.toml | summarize | plot | export DIR | record | overlap MODEL |
schema"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(
    help="Perturb routing, measure the damage, draw it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _one_line_errors(
    interrupted: str = "interrupted; the same command goes on from here",
) -> Iterator[None]:
    """A mistake of the user's is a line or a few on stderr and exit code 2, never a traceback; a
    warning is a line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
            yield
    except (ValueError, OSError, FloatingPointError, ImportError, sqlite3.Error) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or interrupted
        typer.echo(f"\n{message}", err=True)
        raise typer.Exit(130) from None


@app.command()
def run(
    study: Path = typer.Argument(help="A study, see studies/quick.toml."),
    out: Path = typer.Option(help="Directory for models, results, tables and figures."),
    workers: int = typer.Option(None, help="Measure in so many processes.", min=1),
    threads: int = typer.Option(
        None, help="Of each process that measures; another number, other last bits.", min=1
    ),
    dask: str = typer.Option(
        None, metavar="ADDRESS", help="Measure on the Dask cluster of this scheduler."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Only count the cells and estimate the time."
    ),
    progress: bool = typer.Option(True, help="Show progress bars."),
) -> None:
    """Train and measure what is not there yet, then summarize and plot."""
    with _one_line_errors():
        start = time.monotonic()
        from analysis import report
        from analysis.study import Study, processes, threads_of
        from analysis.study import dask as on_dask
        from analysis.study import dry_run as estimate
        from analysis.study import run as run_study

        if workers and dask:
            raise ValueError("--workers and --dask: give one of them")
        read = Study.read(study)
        executor = processes(workers) if workers else None
        executor = on_dask(dask) if dask else executor
        if dry_run:
            typer.echo(estimate(read, out, workers or 1, threads_of(read, executor, threads)))
            return
        run_study(read, out, progress, executor, threads)
        _print(report.summarize(out), report.plot(out, progress))
        typer.echo(f"\n{time.monotonic() - start:.0f} s in all. Everything is in {out}")


@app.command()
def summarize(out: Path = typer.Argument(help="The --out of a study, finished or not.")) -> None:
    """Write tables/*.csv and robustness.txt, and print that."""
    with _one_line_errors():
        from analysis import report

        typer.echo(report.summarize(out))


@app.command()
def export(
    study: Path = typer.Argument(metavar="DIR", help="The --out of a study, finished or not."),
    format: str = typer.Option("parquet", help="parquet or csv."),
    out: Path = typer.Option(None, help="Directory for the files; default: DIR/export."),
) -> None:
    """Write the tables losses, routing, cells and damage to files, and print their paths."""
    with _one_line_errors():
        from analysis.report import export as write

        for path in write(study, format, out):
            typer.echo(path)


@app.command()
def record(
    checkpoint: Path = typer.Argument(metavar="MODEL", help="A checkpoint or a run."),
    study: Path = typer.Option(help="The study on whose documents it routes."),
    out: Path = typer.Option(help="Directory of the trace, which must not exist yet."),
    progress: bool = typer.Option(True, help="Show a progress bar."),
) -> None:
    """Record the routing of a model on a study's documents, for Replay in that study."""
    with _one_line_errors():
        from analysis.adapters import load
        from analysis.perturb import Trace
        from analysis.study import Study, documents_of

        read = Study.read(study)
        _, docs = documents_of(read)
        batch_size = read.measure.batch_size
        typer.echo(
            Trace.record(load(checkpoint), docs, out, batch_size=batch_size, progress=progress)
        )


@app.command()
def overlap(
    models: list[Path] = typer.Argument(metavar="MODEL...", help="Checkpoints or runs."),
    out: Path = typer.Option(help="Directory for tables and figures."),
    corpus: str = typer.Option("stdlib", help="A built-in corpus, or a path to text."),
    documents: int = typer.Option(60, help="Documents to measure on, at most.", min=1),
    length: int = typer.Option(256, help="Tokens of a sequence.", min=1),
    metric: list[str] = typer.Option(None, help="Of these alone; may be given several times."),
    sites: str = typer.Option(None, help='Routers, such as "layer 2"; all by default.'),
    probe: str = typer.Option("all", help="Tokens for outputs: all, routed or either."),
    progress: bool = typer.Option(True, help="Show progress bars."),
) -> None:
    """Measure what the experts of models have in common: tables, and figures of metrics of pairs,
    over depth and at each model's first site."""
    with _one_line_errors("interrupted; the same command begins again"):
        from analysis import report
        from analysis.adapters import documents as read_documents
        from analysis.overlap import Overlap, check_request, measure_overlap
        from cartmoe.folders import check_directory

        check_directory(out)
        loaded = report.named(models)
        for model in loaded:  # before texts are read and the first takes minutes
            check_request(model, metric or None, sites, probe)
        limits: dict[str, Any] = dict(length=length, limit=documents)
        limits["max_tokens_per_document"] = length
        data = [read_documents(corpus, model, **limits) for model in loaded]
        names = [f"{model.name}-s{model.train_seed}" for model in loaded]
        asked = dict(
            models={name: model.identity for name, model in zip(names, loaded, strict=True)},
            data={name: docs.sha256 for name, docs in zip(names, data, strict=True)},
            **dict(corpus=corpus, documents=documents, length=length),
            **dict(metrics=sorted(set(metric or [])), sites=sites, probe=probe),
        )
        files = report.finished(out, asked)
        if files is None:
            if len(set(data[0].document_id)) < 2:
                raise ValueError(f"corpus {corpus!r} has one document; intervals need several")
            found = [
                measure_overlap(model, docs, metric or None, sites, probe, progress=progress)
                for model, docs in zip(loaded, data, strict=True)
            ]
            files = report.write_overlap(Overlap.join(found), out, asked)
        else:
            typer.echo(f"{out} is finished")
        for path in files:
            typer.echo(path)


@app.command()
def plot(out: Path = typer.Argument(help="The --out of a study, finished or not.")) -> None:
    """Draw figures/*.png and *.pdf, and print their paths."""
    with _one_line_errors():
        from analysis import report
        from analysis.study import progress_of

        _print(progress_of(out), report.plot(out, progress=True))


@app.command()
def schema() -> None:
    """Print the JSON schema of a study's TOML, by which editors complete and check one."""
    import json

    from analysis.study import study_schema

    typer.echo(json.dumps(study_schema(), indent=1))


def _print(text: str, figures: list[Path]) -> None:
    typer.echo(text)
    typer.echo("Figures:")
    for path in figures:
        typer.echo(f"  {path}")


if __name__ == "__main__":
    app()
