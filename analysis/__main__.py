"""python -m analysis run STUDY.toml | summarize | plot | report | export DIR | record |
overlap MODEL | eval MODEL | models | schema"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import typer
import typer.core

from cartmoe.foreign import TOLD, told


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """A mistake of the user's is a line or a few on stderr and exit code 2, never a traceback;
        a warning is a line."""
        if not {"", os.getcwd()} & set(sys.path):  # as `python -m` has it: for one's own modules
            sys.path.insert(0, os.getcwd())
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda text, *_: typer.echo(f"warning: {text}", err=True)
                return super().invoke(ctx)
        except TOLD as error:
            typer.echo(f"error: {told(error)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            kept = "--stream" in sys.argv  # hidden states between layers
            again = ctx.invoked_subcommand in ("overlap", "eval") and not kept
            then = "begins again" if again else "goes on from here"
            said = str(interrupt) or f"interrupted; the same command {then}"
            typer.echo(f"\n{said}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Perturb routing, measure the damage, draw it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OUT = typer.Argument(help="The --out of a study, finished or not.")
PROGRESS = typer.Option(True, help="Show progress bars.")
TO = typer.Option(None, help="Directory for what is written; default: that of the study.")


@app.command()
def run(
    study: Path = typer.Argument(help="A study, see studies/quick.toml."),
    out: Path = typer.Option(help="Directory for models, results, tables and figures."),
    workers: int = typer.Option(
        None, help="Processes that train and measure; default: one a core, if memory allows.", min=1
    ),
    threads: int = typer.Option(
        None, help="Of each process, 1 by default; another number, other last bits.", min=1
    ),
    model: Path = typer.Option(None, help="Directory of the model that a study leaves to you."),
    dask: str = typer.Option(None, metavar="ADDRESS", help="A Dask scheduler: measure with it."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only count cells, estimate the time."),
    progress: bool = PROGRESS,
) -> None:
    """Train and measure what is not there yet, then summarize and plot."""
    start = time.monotonic()
    from analysis import report
    from analysis import study as studies

    if workers and dask:
        raise ValueError("--workers and --dask: give one of them")
    read = studies.Study.read(study, model)
    executor = studies.dask(dask) if dask else None
    each = threads or read.measure.threads or 1
    if workers or (not dask and (free := studies.free_workers(read.models, each)) > 1):
        executor = studies.processes(workers or free)
    larger = any(studies.is_streamed(spec) for spec in read.models if not spec.absent)
    if dry_run or (larger and not (out / studies.STORE).exists()):  # told once, beforehand
        typer.echo(studies.dry_run(read, out, threads, executor))
    if dry_run:
        return
    studies.run(read, out, progress, executor, threads)
    _print(report.summarize(out), report.plot(out, progress))
    typer.echo(f"\n{time.monotonic() - start:.0f} s in all. Everything is in {out}")


@app.command()
def summarize(out: Path = OUT, to: Path = TO) -> None:
    """Write tables/*.csv and robustness.txt, and print that."""
    from analysis import report

    typer.echo(report.summarize(out, to))


@app.command()
def export(
    study: Path = typer.Argument(metavar="DIR", help="The --out of a study, finished or not."),
    format: str = typer.Option("parquet", help="parquet or csv."),
    out: Path = typer.Option(None, help="Directory for the files; default: DIR/export."),
) -> None:
    """Write the tables losses, routing, cells and damage to files, and print their paths."""
    from analysis.report import export as write

    typer.echo("\n".join(map(str, write(study, format, out))))


@app.command()
def record(
    checkpoint: Path = typer.Argument(metavar="MODEL", help="A checkpoint or a run."),
    study: Path = typer.Option(help="The study on whose documents it routes."),
    out: Path = typer.Option(help="Directory of the trace, which must not exist yet."),
    progress: bool = PROGRESS,
) -> None:
    """Record the routing of a model on a study's documents, for Replay in that study."""
    from analysis.adapters import is_pretrained, load
    from analysis.perturb import Trace
    from analysis.study import Study, documents_of
    from cartmoe.checkpoint import located

    read, model = Study.read(study), load(checkpoint)
    own = model.tokenizer if is_pretrained(located(checkpoint)) else None
    _, docs = documents_of(read, own)
    size = read.measure.batch_size
    typer.echo(Trace.record(model, docs, out, batch_size=size, progress=progress))


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
    stream: bool = typer.Option(False, "--stream", help="A layer of a pretrained model at a time."),
    progress: bool = PROGRESS,
) -> None:
    """Measure what the experts of models have in common: tables, and figures of metrics of pairs,
    over depth and at each model's first site."""
    from analysis import report

    asked: dict[str, Any] = dict(corpus=corpus, documents=documents, length=length, stream=stream)
    metrics = metric or None
    files = report.overlap_into(out, models, metrics, sites, probe, **asked, progress=progress)
    typer.echo("\n".join(map(str, files)))


@app.command("eval")
def eval_(
    models: list[Path] = typer.Argument(metavar="MODEL...", help="Checkpoints or runs."),
    tasks: str = typer.Option(help="Of lm-eval, or of --include-path; several between commas."),
    condition: list[str] = typer.Option(help='Such as "DropTop(1), stage 0"; one or several.'),
    out: Path = typer.Option(help="Directory for the tables."),
    include_path: Path = typer.Option(None, help="Directory with YAML files of tasks."),
    num_fewshot: int = typer.Option(None, help="Examples before a question.", min=0),
    limit: int = typer.Option(None, help="Documents of each task, at most.", min=1),
    batch_size: int = typer.Option(8, help="Questions that are read together.", min=1),
    seed: int = typer.Option(0, help="Of the noise.", min=0),
    progress: bool = PROGRESS,
) -> None:
    """Ask models tasks of lm-eval, clean and under perturbations: the answers of each document,
    differences with intervals, and the table."""
    from analysis import report
    from analysis.perturb import condition_from_text

    conditions = [condition_from_text(text, seed) for text in condition]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    asked: dict[str, Any] = dict(include_path=include_path, num_fewshot=num_fewshot, limit=limit)
    asked |= dict(batch_size=batch_size, progress=progress)
    _print(*report.evaluate_into(out, models, names, conditions, **asked), "Files")


@app.command()
def plot(out: Path = OUT, to: Path = TO) -> None:
    """Draw figures/*.png and *.pdf, and print their paths."""
    from analysis import report
    from analysis.study import progress_of

    _print(progress_of(out), report.plot(out, progress=True, to=to))


@app.command()
def report(
    study: Path = typer.Argument(metavar="DIR", help="The --out of a study, finished or not."),
    out: Path = typer.Option(None, "--out", "-o", help="The page; default: DIR/report.html."),
    progress: bool = PROGRESS,
) -> None:
    """Write a study as one page, and print its path: nothing else is needed to read it."""
    from analysis.report import write_report

    typer.echo(write_report(study, out, progress))


@app.command()
def schema() -> None:
    """Print the JSON schema of a study's TOML, by which editors complete and check one."""
    import json

    from analysis.study import study_schema

    typer.echo(json.dumps(study_schema(), indent=1))


@app.command()
def models() -> None:
    """List the trained models that come with the project, with what was measured of each, and what
    simpler models know of the same text."""
    from analysis import report

    typer.echo(report.models_text())


def _print(text: str, files: list[Path], title: str = "Figures") -> None:
    typer.echo("\n".join([text, f"{title}:", *(f"  {path}" for path in files)]))


if __name__ == "__main__":
    app()
