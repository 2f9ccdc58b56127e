"""python -m cartmoe train | info | import"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from cartmoe.checkpoint import (
    checkpoint_sha256,
    import_reference,
    newest,
    read_config,
    read_meta,
)
from cartmoe.config import FAMILIES, PRESETS, ModelConfig, check_choice
from cartmoe.foreign import TOLD, told
from cartmoe.info import describe
from cartmoe.train import TrainConfig, train

app = typer.Typer(
    help="Train and look at CartesianMoE and its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Family = Annotated[str, typer.Option(help=f"One of {', '.join(FAMILIES)}.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of ModelConfig or TrainConfig, e.g. num_experts=8; may be repeated.",
    ),
]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can mend is one line on stderr and exit code 2; a stopped run is 130."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
            yield
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "stopped", err=True)
        raise typer.Exit(130) from None
    except TOLD as error:
        typer.echo(f"error: {' '.join(told(error).split())}", err=True)
        raise typer.Exit(2) from None


def _settings(assignments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """field=value texts as changes of ModelConfig and of TrainConfig."""
    model = {f.name for f in fields(ModelConfig)} - {"family"}
    training = {f.name for f in fields(TrainConfig)}
    changes: dict[str, Any] = {}
    for text in assignments:
        field, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set is {text!r}; write field=value")
        check_choice("--set", field, sorted(model | training))
        try:
            changes[field] = json.loads(value)
        except ValueError:
            changes[field] = value  # a word
    return (
        {k: v for k, v in changes.items() if k in model},
        {k: v for k, v in changes.items() if k in training},
    )


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="Directory of the run; the same command resumes it.")],
    family: Family = "cartesian",
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "nano",
    corpus: Annotated[str | None, typer.Option(help="'stdlib', 'factorial', or a path.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="'bytes', 'bpe:SIZE' or a tokenizer.json (default: preset).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and batches.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of one step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches of one step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="'auto', 'fp32' or 'bf16'.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="In steps.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Use torch.compile.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    set_: Set = None,
) -> None:
    """Train a model, or go on with a run that was stopped; also under torchrun."""
    given = dict(
        corpus=corpus,
        tokenizer=tokenizer,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        length=length,
        accumulate=accumulate,
        learning_rate=learning_rate,
        precision=precision,
        checkpoint_every=checkpoint_every,
        compile=compile,
    )
    with _one_line_errors():
        model_changes, train_changes = _settings(set_ or [])
        given = {name: value for name, value in given.items() if value is not None}
        twice = given.keys() & train_changes.keys()
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} is given as an option and with --set")
        model_config = ModelConfig.preset(preset, family, **model_changes)
        train_config = TrainConfig.preset(preset, **given, **train_changes)
        train(model_config, train_config, out, device=device, progress=progress)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A checkpoint, a run, or a preset.")],
    family: Family = "cartesian",
    length: Annotated[int | None, typer.Option(help="Of a sequence, for attention.")] = None,
    set_: Set = None,
) -> None:
    """Parameters, FLOPs and memory of a model, part by part."""
    with _one_line_errors():
        changes, unused = _settings(set_ or [])
        if model in PRESETS:
            if unused:
                raise ValueError(f"--set {next(iter(unused))}: info has no use for it")
            config = ModelConfig.preset(model, family, **changes)
            typer.echo(describe(config, length or TrainConfig.preset(model).length))
            return
        if not Path(model).exists():
            raise ValueError(
                f"{model!r} is no checkpoint, no run, and no preset ({', '.join(PRESETS)})"
            )
        if set_:
            raise ValueError("--set is for presets; a checkpoint has its configuration")
        folder = newest(model)
        meta = read_meta(folder)
        typer.echo(f"{'checkpoint':<12} {folder}\n{'sha256':<12} {checkpoint_sha256(folder)}")
        for key, value in meta.items():
            if key != "family":
                typer.echo(f"{key:<12} {value}")
        typer.echo(describe(read_config(folder), length or meta.get("length") or 256))


@app.command("import")
def import_command(
    directory: Annotated[Path, typer.Argument(help="config.json and *.safetensors.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
) -> None:
    """Make a checkpoint of the weights that the authors' code saved."""
    with _one_line_errors():
        model = import_reference(directory, out)
        typer.echo(f"{out}: {model.config.family}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    app(prog_name="python -m cartmoe")
