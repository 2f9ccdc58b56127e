"""python -m analysis run STUDY.toml --out DIR | summarize DIR | plot DIR"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

app = typer.Typer(
    help="Perturb routing, measure the damage, draw it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A mistake of the user's is a line or a few on stderr and exit code 2, never a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError, sqlite3.Error) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; the same command goes on from here"
        typer.echo(f"\n{message}", err=True)
        raise typer.Exit(130) from None


@app.command()
def run(
    study: Path = typer.Argument(help="A study, see studies/quick.toml."),
    out: Path = typer.Option(help="Directory for models, results, tables and figures."),
    progress: bool = typer.Option(True, help="Show progress bars."),
) -> None:
    """Train and measure what is not there yet, then summarize and plot."""
    with _one_line_errors():
        start = time.monotonic()
        from analysis import report
        from analysis.run import run as run_study
        from analysis.study import Study

        run_study(Study.read(study), out, progress)
        _print(report.summarize(out), report.plot(out, progress))
        typer.echo(f"\n{time.monotonic() - start:.0f} s in all. Everything is in {out}")


@app.command()
def summarize(out: Path = typer.Argument(help="The --out of a study, finished or not.")) -> None:
    """Write tables/*.csv and robustness.txt, and print that."""
    with _one_line_errors():
        from analysis import report

        typer.echo(report.summarize(out))


@app.command()
def plot(out: Path = typer.Argument(help="The --out of a study, finished or not.")) -> None:
    """Draw figures/*.png and *.pdf, and print their paths."""
    with _one_line_errors():
        from analysis import report

        _print("", report.plot(out, progress=True))


def _print(text: str, figures: list[Path]) -> None:
    typer.echo(text)
    typer.echo("Figures:")
    for path in figures:
        typer.echo(f"  {path}")


if __name__ == "__main__":
    app()
