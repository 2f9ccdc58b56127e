"""The study of the trained models (trained.toml) on larger ones, for a GPU.

    python -m studies.larger --out runs/nano
    python -m studies.larger --preset small --names cartesian,smoe_share --seeds 1 --out runs/small

trains models of a preset that take batches large enough for a GPU, in bf16, and measures them in
fp32. The same command goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

import analysis as an
from analysis.perturb import Condition
from analysis.study.specs import ModelSpec
from cartmoe import FAMILIES, ModelConfig
from cartmoe.config import check_choice
from cartmoe.train import TrainConfig

HERE = Path(__file__).parent
MODELS: dict[str, dict[str, Any]] = {name: dict(family=name) for name in FAMILIES}
MODELS |= {
    "parallel": dict(family="cartesian", composition="parallel"),
    "unshared": dict(family="cartesian", shared_experts=False),
}


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


def study(preset: str, names: list[str], seeds: int, steps: int | None = None) -> an.Study:
    """Seed by seed, so that what is interrupted has all models of the first ones."""
    check_choice("preset", preset, RECIPES)
    for name in names:
        check_choice("names", name, MODELS)
    recipe = RECIPES[preset]
    steps = steps or recipe.steps
    models = tuple(
        ModelSpec(
            name=name,
            train_seed=seed,
            config=ModelConfig.preset(preset, **MODELS[name]),
            train=TrainConfig.preset(
                preset,
                steps=steps,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                seed=seed,
                precision="bf16",
                checkpoint_every=max(1, steps // 4),
                milestones=tuple(sorted({max(1, round(m * steps)) for m in recipe.milestones})),
            ),
        )
        for seed in range(seeds)
        for name in names
    )
    base = an.Study.read(HERE / "trained.toml")
    train = models[0].train
    data = replace(base.data, tokenizer=train.tokenizer, length=train.length, shard=300)
    conditions = tuple(c for c in base.conditions if _fits(c, models[0].config))
    measure = replace(base.measure, batch_size=256 * 256 // train.length)
    return replace(
        base, name=preset, models=models, data=data, measure=measure, conditions=conditions
    )


def _fits(condition: Condition, config: ModelConfig) -> bool:
    """Whether the layer that it names, if it does, is routed."""
    layer = condition.where.layer
    return layer is None or config.is_moe(layer)


def main(
    out: Annotated[Path, typer.Option(help="Directory of models and results.")],
    preset: Annotated[str, typer.Option(help=", ".join(RECIPES))] = "nano",
    names: Annotated[str, typer.Option(help="Models, with commas.")] = ",".join(MODELS),
    seeds: Annotated[int, typer.Option(help="Training seeds.", min=1)] = 3,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
) -> None:
    """Train and measure."""
    results = an.run(study(preset, names.split(","), seeds, steps), out)
    typer.echo(results.table().to_string())


if __name__ == "__main__":
    typer.run(main)
