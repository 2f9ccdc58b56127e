"""Does what wrong routing costs depend on the size of the model? Cartesian against a Mixture-of-
Experts with a shared expert, at several widths and equal tokens per parameter.

    python -m studies.size --out runs/size

trains both at every width and seed (`--width 32 --width 64`, `--seeds 2`), measures them and
writes, beside the study's own tables, `size.csv`, the families' difference at each width, and
`slopes.csv`, its slope over the logarithm of size. The same command goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from scipy.stats import linregress, t

import analysis as an
from analysis.perturb import Condition
from analysis.study.specs import Data, Measure, ModelSpec
from cartmoe import LanguageModel, ModelConfig
from cartmoe.train import TrainConfig

FAMILIES = ("cartesian", "smoe_share")
TOKENS_PER_PARAMETER = 8
BASE = 64  # the width of preset "micro", which the learning rate is known for
CONDITIONS = [Condition(an.DropTop(1)), Condition(an.RandomRouting())]


def configs(width: int) -> dict[str, ModelConfig]:
    """Both families in the shape of "micro" at another width."""
    shape: dict[str, Any] = dict(d_model=width, ffn_width=2 * width, num_heads=width // 16)
    return {family: ModelConfig.preset("micro", family, **shape) for family in FAMILIES}


def recipe(width: int, seed: int) -> TrainConfig:
    """Tokens in proportion to the Cartesian model's parameters, for both families; a learning rate
    in inverse proportion to width (arXiv 2203.03466)."""
    parameters = LanguageModel(configs(width)["cartesian"]).num_parameters()
    found = TrainConfig.preset("micro")
    steps = round(TOKENS_PER_PARAMETER * parameters / (found.batch_size * found.length))
    rate = found.learning_rate * BASE / width
    return TrainConfig.preset("micro", steps=steps, seed=seed, learning_rate=rate)


def study(widths: list[int], seeds: int) -> an.Study:
    """Seed by seed, so that what is interrupted has all widths of the first ones."""
    models = tuple(
        ModelSpec(
            name=f"{family}-{width}", train_seed=seed, config=config, train=recipe(width, seed)
        )
        for seed in range(seeds)
        for width in widths
        for family, config in configs(width).items()
    )
    data = Data(length=256, documents=300, max_tokens=1024)
    return an.Study("size", data, Measure(), models, tuple(CONDITIONS))


def sizes(results: an.Results) -> pd.DataFrame:
    """A row a width, condition and seed: Cartesian less the other family, nats per token; with the
    clean losses as condition "clean loss"."""
    damage = results.damage(full=True)
    names = damage.model.str.rsplit("-", n=1, expand=True)
    damage = damage.assign(family=names[0], width=names[1].astype(int))
    clean = damage.drop_duplicates(["model", "train_seed"])
    rows = pd.concat([
        damage.assign(value=damage.delta_nats),
        clean.assign(label="clean loss", value=clean.clean_nats),
    ])  # fmt: skip
    wide = rows.pivot(index=["label", "width", "train_seed"], columns="family", values="value")
    return wide.assign(difference=wide[FAMILIES[0]] - wide[FAMILIES[1]]).reset_index()


def slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the difference over log2 of width, nats per doubling, with Student's 95 % interval over
    all pairs of models (NaN for fewer than three); nothing for a single width."""
    found = []
    for label, of in rows.groupby("label", sort=False) if rows.width.nunique() > 1 else ():
        line = linregress(np.log2(of.width), of.difference)
        half = t.ppf(0.975, len(of) - 2) * line.stderr if len(of) > 2 else np.nan
        found.append(dict(label=label, num_pairs=len(of), slope=line.slope,
                          low=line.slope - half, high=line.slope + half))  # fmt: skip
    return pd.DataFrame(found)


def multiples(widths: list[int]) -> list[int]:
    """The widths; `typer.BadParameter` for one that heads of 16 numbers do not divide evenly."""
    for width in widths:
        if width < 32 or width % 32:
            raise typer.BadParameter(f"width is {width}; give multiples of 32")
    return widths


def main(
    out: Annotated[Path, typer.Option(help="Directory of models and tables.")],
    width: Annotated[list[int], typer.Option(help="d_model", callback=multiples)] = [32, 64, 96],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Training seeds.", min=1)] = 1,
) -> None:
    """Train, measure, write the tables."""
    found = an.run(study(width, seeds), out)
    rows = sizes(found)
    rows.to_csv(out / "size.csv", index=False)
    slopes(rows).to_csv(out / "slopes.csv", index=False)
    typer.echo(rows.round(3).to_string(index=False))
    typer.echo(slopes(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
