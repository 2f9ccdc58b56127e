"""Did a change of the code change a number? Every table of the workbench, on models of a second.

    python -m benchmarks.tables DIR          write them all there, a file each (minutes)
    python -m benchmarks.tables DIR OTHER    compare two such folders, every number

Before and after the change, on one machine. Seconds are not compared.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import analysis as an

EFFECTS = ["full", "selection", "weights", "no_refill", "part set", "part weights", "part mass"]
EFFECTS += ["part set+weights", "part set+mass", "part weights+mass"]
BOTH: dict[str, Any] = dict(point=["logits", "scores"], downstream=["reroute", "replay"])
# One example a perturbation under every effect, and more of some under none but their own.
EVERY: list[dict[str, Any]] = [
    *(dict(perturbation=name) for name in ("Identity", "NoRouted", "DropSlots", "RandomRouting")),
    *(dict(perturbation=name) for name in ("DropChosen", "DropUnchosen", "UniformWeights")),
    *(dict(perturbation=name) for name in ("SwapRanks", "GumbelNoise", "Temperature")),
    dict(perturbation="DropTop", m=1),
    dict(perturbation="KeepRanks", ranks=[1, 3]),
    dict(perturbation="TopK", k=1),
    dict(perturbation="DropExperts", fraction=0.5),
    dict(perturbation="GaussianNoise", sigma=2.0),
    dict(perturbation="Quantize", to=2),
    dict(perturbation="Lag", n=1),
    dict(perturbation="Worst", flips=1),
    dict(perturbation="Compose", parts=[dict(name="DropTop", m=1), dict(name="DropSlots")]),
    dict(perturbation="ResidualNoise", of=dict(name="DropTop", m=1)),
    dict(perturbation="Custom", function="benchmarks.tables:soften", title="soften"),
]
MORE: list[dict[str, Any]] = [
    dict(perturbation="DropTop", m=[2, 3], where=["all", "stage 0", "stage 1", "layer 2"]),
    dict(perturbation="DropTop", m=1, where=["positions 2:9", "tokens digit", "layer 0 stage 0"]),
    dict(perturbation="DropTop", m=1, where=["layer 0 stage 1", "layer 2 stage 0"]),
    dict(perturbation="DropTop", m=1, where="layer 2 stage 1"),
    dict(perturbation="DropTop", ratio=[0.25, 0.5]),
    dict(perturbation="TopK", k=[3, 5]),
    dict(perturbation="DropExperts", which=["most_used", "least_used"]),
    dict(perturbation="DropExperts", ids=[0, 2]),
    dict(perturbation="DropSlots", probability=0.3, renormalize=True),
    dict(perturbation="GaussianNoise", sigma=[0.5, 1.0], eval_seed=[0, 1]),
    dict(perturbation="GaussianNoise", sigma=1.0, scale=["site", "absolute"], within="chosen"),
    dict(perturbation="RandomRouting", share=0.5, draw=["reservoir", "permute"]),
    dict(perturbation="UniformWeights", mix=0.5),
    dict(perturbation="Quantize", to=["bf16", "fp8"]),
    dict(perturbation="Lag", n=2, over=["tokens", "sites"]),
    dict(perturbation="Worst", flips=2, rounds=2, per=["token", "sequence"]),
    dict(perturbation="Worst", flips=[1, 2], choose="random"),
    dict(perturbation="ResidualNoise", of=dict(name="GaussianNoise", sigma=2.0)),
]
SHAPE = dict(d_model=16, ffn_width=32, num_layers=3, num_heads=2, num_experts=6, init_std=0.3)
FAMILIES = ["dense", "smoe", "smoe_share", "hash", "fine_grained", "top_p", "cartesian"]
VARIANTS = {
    "parallel": dict(family="cartesian", composition="parallel"),
    "sigmoid": dict(family="smoe_share", score="sigmoid"),
    "raw": dict(family="smoe", renormalize=False),
    "top1": dict(family="smoe_share", top_k=1),
}
TIMES = ["seconds", "price"]
QUIET: dict[str, Any] = dict(progress=False)
FEW = an.Bootstrap(resamples=99)


def soften(logits_TE, ctx):
    """For `Custom`."""
    return logits_TE * 0.5


def write(folder: Path) -> None:
    """All of them."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    os.chdir(folder)  # paths are part of what conditions are known by
    os.environ["CARTMOE_CACHE"] = str(folder.resolve() / "cache")
    _write_texts(Path("texts"))
    data = dict(corpus="texts", length=32, documents=6, max_tokens=64, shard=3)
    train = dict(families=FAMILIES, seeds=[0, 1], steps=3, batch_size=2, precision="fp32")
    train |= dict(checkpoint_every=1, keep=3, model=SHAPE, variants=VARIANTS)
    measure = dict(batch_size=2, calibration=3, tokens=True, threads=1)
    first: dict[str, Any] = dict(name="first", data=data, train=train, measure=measure)
    first["conditions"] = [dict(perturbation=["DropTop", "RandomRouting"])]
    first["contrasts"] = dict(reference="cartesian", conditions=["DropTop(1)"], margin=0.05)
    _study(first)
    trained = sorted(Path("first/models").iterdir())
    zero = [path for path in trained if path.name.endswith("-s0")]
    docs = an.documents("texts", length=32, limit=6, max_tokens_per_document=64)
    every = an.documents("texts", length=32, max_tokens_per_document=64)  # those of studies too
    trace = an.Trace.record(an.load("first/models/cartesian-s1"), every, "trace", **QUIET)
    models = [dict(path=str(path), name=path.name[:-3]) for path in zero]
    conditions = [one | BOTH | dict(effect=EFFECTS) for one in EVERY] + [one | BOTH for one in MORE]
    swap = dict(perturbation="GateSwap", checkpoint="first/models/cartesian-s1")
    replay = dict(perturbation="Replay", trace="trace")
    conditions += [one | dict(models=["cartesian"], effect=EFFECTS) for one in (swap, replay)]
    _study(dict(name="every", data=data, measure=measure, models=models, conditions=conditions))
    _in_memory([an.load(path) for path in zero if not path.name.startswith("dense")], docs, trace)
    cartesian = an.load("first/models/cartesian-s0")
    _of_checkpoints(cartesian, docs)
    _of_factorial(cartesian)


def _study(table: dict) -> None:
    name = table["name"]
    results = an.run(an.Study.from_dict(table), name, progress=False)
    an.export(name, "csv")  # type: ignore[operator]
    for what in ("clean", "table", "damage", "sites", "split", "cascade", "additivity", "gap"):
        _keep(getattr(results, what)(), name, what)
    _keep(results.per_dose(), name, "per_dose")
    _keep(results.tails(), name, "tails")
    _keep(results.tail_curve(["DropTop(1)"]), name, "tail_curve")
    for by in ("position", "frequency", "domain"):
        _keep(results.damage_by(by, ["DropTop(1)"]), name, f"by_{by}")
    if name == "first":
        _keep(results.contrasts("cartesian", ["DropTop(1)"], 0.05), name, "contrasts")
        seeds = an.stats.over_seeds(results.losses, "cartesian", "smoe", "DropTop(1)")
        _keep(seeds, name, "over_seeds")
    else:
        _keep(an.stats.curve_summary(results.damage(full=True), "GaussianNoise"), name, "curves")


def _in_memory(models: list, docs, trace) -> None:
    drop = an.DropTop(1)
    for model in models:
        arms = [*an.split_arms(drop), *an.cascade_arms(drop), *an.site_arms(model, drop)]
        results = an.sweep(model, docs, [*arms, an.Worst(1)], tokens=True, batch_size=2, **QUIET)
        _keep(results.damage(full=True), "sweep", model.name)
        for site in model.sites():
            found = an.regret(model, docs, site, n=3, batch_size=2, bootstrap=FEW, **QUIET)
            _keep(found, "regret", f"{model.name} {site.layer} {site.stage}")
        flips = an.flip_prediction(model, docs, [0.5, 1.0], draws=4, batch_size=2, bootstrap=FEW)
        _keep(flips, "flips", model.name)
        options: dict[str, Any] = dict(prompt=12, new=8, batch_size=2, bootstrap=FEW, **QUIET)
        text = an.generation_agreement(model, docs, [drop, an.GaussianNoise(1.0)], **options)
        _keep(text, "generation", model.name)
        for probe in ("all", "routed", "either"):
            overlap = an.measure_overlap(model, docs, None, None, probe, batch_size=2, **QUIET)
            _keep_overlap(overlap, probe, model.name)
        function = an.measure_overlap(model, docs, ["substitution", "removal_linear"], **QUIET)
        _keep_overlap(function, "function", model.name)
        options = dict(lowest=2, random=3, batch_size=2, bootstrap=FEW, **QUIET)
        for downstream in ("reroute", "replay"):
            pairs = an.substitution(model, docs, downstream=downstream, **options)
            _keep(pairs, f"substitution {downstream}", model.name)
            _keep(an.calibration(pairs), f"calibration {downstream}", model.name)
        for refill in (True, False):
            options = dict(refill=refill, batch_size=2, bootstrap=FEW, **QUIET)
            _keep(an.expert_damage(model, docs, **options), f"removal {refill}", model.name)
        stats = an.calibrate(model, docs, rows=50, batch_size=2)
        with an.perturbed(model, an.RandomRouting(), stats=stats), torch.no_grad():
            logits = model.model(docs.tokens_SL[:2])
        _keep(pd.DataFrame(logits.flatten(0, 1).numpy()), "perturbed", model.name)
    relation = an.relate(models, docs, batch_size=2, **QUIET)
    for damage in ("per_mass", "damage"):
        _keep(relation.table(damage, bootstrap=an.Bootstrap(resamples=499)), "relation", damage)
    _keep(relation.experts, "relation", "experts")
    _keep(relation.takeover, "relation", "takeover")
    recorded = [trace.routing(place) for place in trace.sites]
    for place, (ids, weights, _) in zip(trace.sites, recorded, strict=True):
        _keep(pd.DataFrame(np.concatenate([ids, weights], 1)), "trace", f"{place}")


def _of_checkpoints(cartesian, docs) -> None:
    drop = an.DropTop(1)
    tuned = an.load("first/models/cartesian-s1", name="tuned")
    asked = [drop, an.Replay("base"), an.GateSwap("base")]
    options: dict[str, Any] = dict(batch_size=2, **QUIET)
    comparison = an.compare({"base": cartesian, "tuned": tuned}, docs, asked, **options)
    for what in ("drift", "damage_difference", "drift_cost", "table"):
        _keep(getattr(comparison, what)(), "compare", what)
    run = "first/models/cartesian-s0"
    _keep(an.saturation(run, docs, batch_size=2, progress=False), "training", "saturation")
    training = an.over_training(run, docs, drop, ["cka", "lift"], batch_size=2, progress=False)
    _keep(training.damage, "training", "damage")
    _keep_overlap(training.overlap, "training", "overlap")


def _of_factorial(model) -> None:
    docs = an.documents("factorial", model, length=32, limit=12, max_tokens_per_document=64)
    metrics = ["lift", "cka", "token_js", "domain_specialization"]
    overlap = an.measure_overlap(model, docs, metrics, batch_size=2, **QUIET)
    _keep(an.truth_scores(overlap, "factorial", resamples=99), "truth", "scores")
    found = an.factor_information(model, docs, "factorial", shuffles=19, batch_size=2)
    _keep(found, "truth", "information")


def _keep(table: pd.DataFrame, *names: str) -> None:
    path = Path("tables") / f"{' '.join(names)}.pkl"
    path.parent.mkdir(exist_ok=True)
    assert not path.exists(), path
    table.to_pickle(path)


def _keep_overlap(overlap, *names: str) -> None:
    for name in ("experts", "sites", "pairs"):
        _keep(getattr(overlap, name), *names, name)


def _write_texts(folder: Path) -> None:
    for i in range(60):
        draw = random.Random(i)
        words = [f"{draw.choice('bcdfgklm')}{draw.choice('aeiou')}{draw.randrange(99)}" * 2
                 for _ in range(9)]  # fmt: skip
        path = folder / "xyz"[i % 3] / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(draw.choice(words) for _ in range(60)))


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two folders, a line each; columns that only the second one has do not
    count."""
    names = [sorted(path.name for path in (folder / "tables").iterdir()) for folder in (one, other)]
    differing = [f"only in one folder: {name}" for name in sorted(set(names[0]) ^ set(names[1]))]
    numbers = 0
    for name in sorted(set(names[0]) & set(names[1])):
        before, after = (pd.read_pickle(folder / "tables" / name) for folder in (one, other))
        lost = [column for column in before if column not in after]
        columns = [c for c in before if c in after and c not in TIMES]
        before, after = before[columns], after[columns]
        if lost or before.shape != after.shape:
            differing.append(f"{name}: {before.shape} and {after.shape}; lost {lost}")
            continue
        numbers += before.size
        same = (before == after) | (before.isna() & after.isna())
        for column in columns if not isinstance(columns, pd.RangeIndex) else []:
            if not same[column].all():
                row = int(np.flatnonzero(~same[column].to_numpy())[0])
                pair = before[column].iloc[row], after[column].iloc[row]
                count = int((~same[column]).sum())
                differing.append(
                    f"{name}, {column}: {count} of {len(same)}, first row {row}: {pair}"
                )
    print(f"{numbers} numbers and names in {len(names[0])} tables compared")
    return differing


if __name__ == "__main__":
    folders = [Path(argument).resolve() for argument in sys.argv[1:]]
    if len(folders) == 1:
        write(folders[0])
    else:
        found = compare(*folders)
        print("\n".join(found) or "all the same")
        sys.exit(bool(found))
