"""What the trained models show, as tables: python -m studies.findings [PART ...] --out results

Each part becomes a folder with Parquet tables and a manifest; results/README.md says in words what
those of results/ hold. Parts (default: all):

third      what studies/trained.toml measures of the third training seed, whose models are not among
           those that come with the project
trained    what `make trained` measured of the others, and the contrasts of all seeds
overlap    what experts have in common, and whether it says what dropping one costs
training   damage, saturation and overlap over the checkpoints of `make models`
size       studies/size.py at three widths
larger     studies/larger.py: models of preset nano, three seeds, and a pair of small, on a GPU
repeated   studies/larger.py where the standard library came without its tests: many epochs
recipe     learning rates, and twice the tokens
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from tqdm import tqdm

import analysis as an
from analysis import stats
from analysis.report.text import tables as report_tables
from analysis.stats import INDEX, SHARED
from analysis.study.folder import read_plan
from analysis.study.provenance import manifest
from cartmoe.checkpoint import newest, read_meta
from cartmoe.folders import remove_folder, write_folder
from cartmoe.run import read_run
from studies.recipe import learning_rates
from studies.size import sizes, slopes

HERE = Path(__file__).parents[1]
RUNS, RESULTS = HERE / "runs", HERE / "results"
CHECKPOINT = ["model", "train_seed"]
Tables = dict[str, pd.DataFrame]


def third() -> Tables:
    """All tables of those runs of `make models` that runs/third measured, and their losses by
    document, to be held beside others; runs that are gone keep the rows that they have."""
    results = an.read(RUNS / "third")
    made = report_tables(results) | {"losses": by_document(results.losses)}
    return {table: with_others(f"third/{table}", rows) for table, rows in made.items()}


def trained() -> Tables:
    """Table 4, every condition, damage taken apart; contrasts with the third seed as well."""
    folder = RUNS / "trained"
    results = an.read(folder)
    losses = [by_document(results.losses), pd.read_parquet(RESULTS / "third" / "losses.parquet")]
    contrasts = stats.family_contrasts(pd.concat(losses), **read_plan(folder)["contrasts"])
    return report_tables(results) | {"contrasts": contrasts}


def by_document(losses: pd.DataFrame) -> pd.DataFrame:
    """Windows of a document and domain as one: statistics draw whole documents."""
    sums = ["num_tokens", "num_bytes", "nll_sum", "kl_sum", "num_agree", "num_touched"]
    keys = [name for name in losses if name not in (*sums, "sequence_id", "delta_max")]
    how = dict.fromkeys(sums, "sum") | {"delta_max": "max"}
    found = losses.groupby(keys, sort=False, dropna=False).agg(how).reset_index()
    documents = found.groupby([name for name in keys if name != "domain"], dropna=False)
    return found.assign(sequence_id=documents.cumcount())


def overlap() -> Tables:
    """All metrics of all routed models, and the relation of pairs to what dropping costs."""
    names = an.models().query("family != 'dense'").name
    models = [an.load(name) for name in names]
    docs = an.documents("stdlib", models[0], length=256, limit=96, max_tokens_per_document=256)
    found = an.Overlap.join([an.measure_overlap(m, docs, progress=False) for m in tqdm(models)])
    relation = an.relate(models, docs, batch_size=8)
    per_mass = relation.table("per_mass")
    print(per_mass[per_mass.model == "all"].round(3).to_string(index=False))
    return {
        "sites": found.sites,
        "experts": found.experts,
        "pairs": summary(found.pairs),
        "relation": relation.experts,
        "per_mass": per_mass,
        "raw_damage": relation.table("damage"),
    }


def summary(pairs: pd.DataFrame) -> pd.DataFrame:
    """Of each metric of pairs of routed experts at each site: mean, quartiles, mean null."""
    index = [name for name in INDEX["pairs"] if name in pairs]
    routed = pairs[(pairs[index] != SHARED).all(axis=1)]
    by = [*CHECKPOINT, "family", "layer", "stage", "metric"]
    by = [name for name in by if name in routed]
    found = routed.groupby(by, sort=False).agg(
        value=("value", "mean"),
        lower_quartile=("value", lambda v: v.quantile(0.25)),
        upper_quartile=("value", lambda v: v.quantile(0.75)),
        null=("null", "mean"),
        num_pairs=("value", "count"),
    )
    return found.reset_index()


def training() -> Tables:
    """At every checkpoint of those finished runs of `make models` that are there; runs that are
    gone keep the rows that they have."""
    damages, overlaps, settled = [], [], []
    runs = sorted((RUNS / "models" / "models").glob("*-s?"))
    routed = [run for run in runs if not run.name.startswith("dense") and finished(run)]
    for run in tqdm(routed, unit="run"):
        model = an.load(run)
        docs = an.documents("stdlib", model, length=256, limit=96, max_tokens_per_document=256)
        both = [an.DropTop(1), an.RandomRouting()]
        found = an.over_training(run, docs, both, ["cka", "matched_cosine"], progress=False)
        train = read_run(run)["asked"]["train"]
        size = train["batch_size"] * train["length"]
        damages.append(found.damage.assign(tokens=found.damage.step * size))
        pairs = found.overlap.pairs
        for step, rows in pairs.groupby("step", sort=False):
            overlaps.append(summary(rows).assign(step=step, tokens=step * size))
        one = an.saturation(run, docs, progress=False)
        settled.append(one.assign(model=model.name, tokens=one.step * size))
    parts = dict(damage=damages, overlap=overlaps, saturation=settled)
    return {name: with_others(f"training/{name}", pd.concat(each)) for name, each in parts.items()}


def finished(run: Path) -> bool:
    """Whether it has had all of its steps."""
    meta = read_meta(newest(run))
    return meta["step"] == meta["steps"]


def with_others(table: str, rows: pd.DataFrame) -> pd.DataFrame:
    """These rows, and those that results/ has of other checkpoints."""
    before = pd.read_parquet(RESULTS / f"{table}.parquet")
    new = pd.MultiIndex.from_frame(rows[CHECKPOINT])
    others = before[~pd.MultiIndex.from_frame(before[CHECKPOINT]).isin(new)]
    return pd.concat([others, rows], ignore_index=True)


def size() -> Tables:
    """Cartesian less smoe_share at each width, and the slope."""
    results = an.read(RUNS / "size")
    rows = sizes(results)
    return {"damage": results.damage(full=True), "sizes": rows, "slopes": slopes(rows)}


def larger() -> Tables:
    """Of studies/larger.py."""
    return of_larger(RUNS / "larger")


def repeated() -> Tables:
    """The same on a standard library without its tests: less text, seen more often."""
    return of_larger(RUNS / "repeated")


def of_larger(runs: Path) -> Tables:
    """Damage of all models that were trained on a GPU; over training, and Cartesian less
    smoe_share of one seed at equal tokens."""
    damages, over, curves = [], [], []
    if not any(runs.glob("*/training.csv")):
        raise FileNotFoundError(f"{runs} has no models of studies/larger.py yet")
    for folder in sorted(path.parent for path in runs.glob("*/training.csv")):
        preset = read_plan(folder)["study"]["name"]
        training = pd.read_csv(folder / "training.csv").assign(preset=preset)
        made = dict(preset=preset, tokens=training.tokens.max())
        damages.append(an.read(folder).damage(full=True).assign(**made))
        over.append(training)
        curves.append(curve(folder / "models" / folder.name).assign(preset=preset))
    keys = ["preset", "label", "tokens", "train_seed"]
    parts = dict(damage=damages, training=over, curves=curves)
    tables = {name: pd.concat(each, ignore_index=True) for name, each in parts.items()}
    values = ["delta_nats", "clean_nats"]
    wide = tables["training"].pivot(index=keys, columns="model", values=values)
    less = {name: wide[name].cartesian - wide[name].smoe_share for name in values}
    return tables | {"pairs": pd.DataFrame(less).dropna().reset_index()}


def curve(run: Path) -> pd.DataFrame:
    """A training run, means of 50 steps."""
    metrics = pd.read_csv(run / "metrics.csv").drop(columns="worst_site")
    rows = metrics.groupby((metrics.step - 1) // 50).mean()
    return rows.assign(run=run.name)


def recipe() -> Tables:
    """Loss of every family at three learning rates after 600 steps; and of twice the tokens."""
    runs = RUNS / "recipe"
    tokens = [clean_of(path) for path in (runs / "cartesian-half", "cartesian")]
    return {
        "learning_rates": learning_rates(runs),
        "tokens": pd.concat(tokens, ignore_index=True),
    }


def clean_of(path: Path | str) -> pd.DataFrame:
    """Loss and damage of a model."""
    model = an.load(path)
    docs = an.documents("stdlib", model, length=256, limit=300, max_tokens_per_document=1024)
    both = [an.DropTop(1), an.RandomRouting()]
    found = an.sweep(model, docs, both, controls=False, progress=False).damage(full=True)
    return found.assign(tokens=read_meta(newest(path))["tokens"])


PARTS: dict[str, Callable[[], Tables]] = {
    part.__name__: part
    for part in (third, trained, overlap, training, size, larger, repeated, recipe)
}


# Where the machine is noted that measured, where it is not this one, now.
MEASURED = {
    "trained": RUNS / "trained",
    "third": RUNS / "third",
    "size": RUNS / "size",
    "larger": RUNS / "larger" / "cartesian-s0",
    "repeated": RUNS / "repeated" / "cartesian-s0",
}


def write(folder: Path, tables: Tables) -> None:
    """Part `folder.name` anew, with what made it; the old one stays until the new one is whole."""
    name, new = folder.name, folder.with_name(f"{folder.name}.new")

    def fill(path: Path) -> None:
        for table, frame in tables.items():
            frame.to_parquet(path / f"{table}.parquet", index=False)

    measured = read_plan(MEASURED[name])["manifest"] if name in MEASURED else manifest()
    command = f"python -m studies.findings {name}"
    if new.exists():  # a crash left it
        remove_folder(new)
    write_folder(new, fill, {"command": command, "measured_with": measured})
    if folder.exists():
        remove_folder(folder)
    new.rename(folder)


def asked(words: list[str]) -> list[str]:
    """The parts that are named, or all; `typer.BadParameter` with the choices."""
    for word in words:
        if word not in PARTS:
            raise typer.BadParameter(f"part is {word!r}; choose of {', '.join(PARTS)}")
    return words or list(PARTS)


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the parts.")] = RESULTS,
) -> None:
    """Compute the parts that are named and write their tables."""
    for part in asked(parts or []):
        typer.echo(part)
        write(out / part, PARTS[part]())


if __name__ == "__main__":
    typer.run(main)
