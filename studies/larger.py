"""The study of the trained models (trained.toml) on larger ones, for a GPU.

    python -m studies.larger --out runs/nano
    python -m studies.larger --preset small --name cartesian --name smoe_share --seed 0 \
        --out runs/small

trains models of a preset in bf16, in batches large enough for a GPU, and measures them in fp32.
Each has a study of its own in the directory, NAME-sSEED, where training.csv is the damage at every
checkpoint of what has routers. The same command goes on where it was; several with other names or
seeds can run side by side, which one GPU gains from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

import analysis as an
from analysis.perturb import Condition
from analysis.study.provenance import default_device
from analysis.study.specs import ModelSpec
from cartmoe import ModelConfig
from cartmoe.checkpoint import run_checkpoints, step_of
from cartmoe.config import check_choice
from cartmoe.files import write_atomically
from cartmoe.run import read_run
from cartmoe.train import TrainConfig

HERE = Path(__file__).parent
MODELS = {spec.name: spec.config for spec in an.Study.read(HERE / "models.toml").models}


@dataclass(frozen=True)
class Recipe:
    """What differs from a preset's own: larger batches, a rate found for them."""

    steps: int
    batch_size: int
    learning_rate: float
    milestones: tuple[float, ...] = ()  # shares of all steps, whose checkpoints are kept


RECIPES = {
    "nano": Recipe(  # 100 million bytes
        steps=3052,
        batch_size=128,
        learning_rate=3e-3,
        milestones=(0.001, 0.002, 0.004, 0.007, 0.01, 0.02, 0.035, 0.06, 0.1, 0.2, 0.35, 0.6),
    ),
    "small": Recipe(steps=400, batch_size=64, learning_rate=1.5e-3),  # 13 million tokens of BPE
}


def config(preset: str, name: str) -> ModelConfig:
    """Of a preset, what the model of that name is among those that come with the project."""
    known = MODELS[name]
    return ModelConfig.preset(
        preset,
        family=known.family,
        composition=known.composition,
        shared_experts=known.shared_experts,
    )


def study(preset: str, name: str, seed: int, steps: int | None = None) -> an.Study:
    """Of one model; `steps` instead of the recipe's, for a trial."""
    recipe = RECIPES[preset]
    steps = steps or recipe.steps
    train = TrainConfig.preset(
        preset,
        steps=steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        seed=seed,
        precision="bf16",
        checkpoint_every=max(1, steps // 4),
        milestones=tuple(sorted({max(1, round(m * steps)) for m in recipe.milestones})),
    )
    model = ModelSpec(name=name, train_seed=seed, config=config(preset, name), train=train)
    base = an.Study.read(HERE / "trained.toml")
    data = replace(base.data, tokenizer=train.tokenizer, length=train.length, shard=300)
    conditions = tuple(c for c in base.conditions if _fits(c, model.config))
    measure = replace(base.measure, batch_size=256 * 256 // train.length)
    return replace(
        base, name=preset, models=(model,), data=data, measure=measure, conditions=conditions
    )


def _fits(condition: Condition, config: ModelConfig) -> bool:
    """Whether the layer that it names, if it does, is routed."""
    layer = condition.where.layer
    return layer is None or config.is_moe(layer)


def over_training(run: Path) -> pd.DataFrame:
    """Damage at every checkpoint of a run, by `step` and the `tokens` until then."""
    train = read_run(run)["asked"]["train"]
    rows = []
    for checkpoint in run_checkpoints(run):
        model, step = an.load(checkpoint, device=default_device()), step_of(checkpoint)
        docs = an.documents(
            "stdlib", model, length=train["length"], limit=100, max_tokens_per_document=512
        )
        asked = [an.DropTop(1), an.RandomRouting()]
        found = an.sweep(model, docs, asked, controls=False, progress=False).damage(full=True)
        tokens = step * train["batch_size"] * train["length"]
        rows.append(found.assign(step=step, tokens=tokens))
    return pd.concat(rows, ignore_index=True)


def one_of(choices: Collection[str]) -> Callable[..., Any]:
    """A check of an option, or of each of several."""

    def check(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
        for given in value if isinstance(value, list) else [value]:
            try:
                check_choice(option.name or "option", given, choices)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
        return value

    return check


def main(
    out: Annotated[Path, typer.Option(help="Directory of models and results.")],
    preset: Annotated[str, typer.Option(callback=one_of(RECIPES))] = "nano",
    name: Annotated[list[str], typer.Option(callback=one_of(MODELS))] = [*MODELS],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Of training.", min=0)] = [0, 1, 2],  # noqa: B006
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", min=1)] = None,
) -> None:
    """Train and measure."""
    # Seed by seed, so that what is interrupted has all models of the first ones.
    studies = [study(preset, each, number, steps) for number in seed for each in name]
    for one in studies:
        (model,) = one.models
        run = f"{model.name}-s{model.train_seed}"
        results = an.run(one, out / run)
        table = out / run / "training.csv"
        if model.config.family != "dense" and not table.exists():
            rows = over_training(out / run / "models" / run)
            write_atomically(table, rows.to_csv(index=False))
        typer.echo(results.table().to_string())


if __name__ == "__main__":
    typer.run(main)
