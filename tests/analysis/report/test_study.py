"""What a study says of itself: which tables, which verdicts, and what it may not claim."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from analysis.measure import sweep
from analysis.measure.results import Results, join
from analysis.measure.shard import measure
from analysis.perturb.arms import cascade_arms, site_arms, split_arms
from analysis.perturb.compound import ResidualNoise
from analysis.perturb.condition import Condition
from analysis.perturb.decisions import TopK
from analysis.perturb.flips import Worst
from analysis.perturb.logits import GaussianNoise, RandomRouting
from analysis.perturb.masks import DropTop
from analysis.report.figures import FIGURES, drawn
from analysis.report.text import describe, measured, sampling, tables
from analysis.study.specs import Data

from ..synthetic import arm, losses, routing, sites, study


def results_of(table: pd.DataFrame, **options) -> Results:
    cells = table.drop_duplicates(["model", "train_seed", "condition"])
    doses = routing(table)
    clean = doses[doses.perturbation == doses.perturbation.iloc[0]].assign(
        condition="clean", perturbation="clean", entropy=0.0, margin=0.0, routed_share=0.0,
        routed_ratio=0.0,
    )  # fmt: skip
    doses = pd.concat([doses, clean.drop_duplicates(["model", "layer", "sequence_id"])])
    return Results(table, doses, sites(), len(cells), len(cells), **options)


@pytest.fixture(scope="module")
def made(model_of, shard, calibration_of):
    """Everything there is to take apart, on two models of a second."""
    measured = []
    for model in (model_of("smoe_share"), model_of("cartesian")):
        arms = [
            *split_arms(DropTop(1)), *cascade_arms(DropTop(1)), *site_arms(model, DropTop(1)),
            *[Condition(Worst(n, choose=c)) for n in (1, 2) for c in ("worst", "random")],
            *[Condition(p) for p in (GaussianNoise(0.5), GaussianNoise(1.0), RandomRouting())],
        ]  # fmt: skip
        options = dict(calibration=calibration_of(model), keep_tokens=True)
        measured.append((model, measure(model, list(dict.fromkeys(arms)), shard, **options)))
    return join(measured)


def test_from_a_sweep_to_every_table(made):
    """One line a table, each in agreement with the damages that were measured."""
    damage = made.damage(full=True).set_index(["model", "label"]).delta_nats
    for model in damage.index.levels[0]:
        whole = damage[model, "DropTop(1)"]

        def parts(table, model=model):
            return table[table.model == model].set_index("part").delta_nats

        split = parts(made.split("DropTop(1)"))
        assert split[["set", "weights", "mass"]].sum() == pytest.approx(whole, rel=1e-9, abs=1e-12)
        cascade = parts(made.cascade("DropTop(1)"))
        replay = damage[model, "DropTop(1), replay"]
        assert cascade["cascade"] == pytest.approx(whole - replay, rel=1e-9, abs=1e-12)
        alone = parts(made.additivity("DropTop(1)"))
        number = 4 if model == "cartesian" else 2
        assert alone.index.str.startswith("layer").sum() == number
        assert alone["joint"] == pytest.approx(whole)
        gap = parts(made.gap("Worst(1)"))
        assert gap["worst"] > gap["random"]
        assert gap["gap"] == pytest.approx(gap["worst"] - gap["random"])
        means = made.tails().set_index(["model", "condition"])["mean"]
        assert means[model, "Worst(2)"] == pytest.approx(damage[model, "Worst(2)"], rel=1e-4)
        for by in ("position", "frequency", "domain"):
            groups = made.damage_by(by, ["Worst(1)"])
            groups = groups[groups.model == model]
            mean = (groups.delta_nats * groups.num_tokens).sum() / groups.num_tokens.sum()
            assert mean == pytest.approx(damage[model, "Worst(1)"], rel=1e-4)
    price = made.gap("Worst(1)").set_index("part").price
    assert (price["worst"] > 0).all()
    per_dose = made.per_dose().set_index("label")
    assert per_dose.per_flip["Worst(1)"].notna().all()
    contrasts = made.contrasts("cartesian", ["DropTop(1)"], margin=10.0)
    assert contrasts.verdict.tolist() == ["equivalent within margin"]


def test_every_figure_is_drawn_from_a_whole_study(made):
    for name, shown in FIGURES.items():
        table = shown.table(made)
        assert len(table), name
        plt.close(drawn(shown, table, made))


def test_the_text_has_every_section(made):
    contrasts = {"reference": "cartesian", "conditions": ["DropTop(1)", "not run"], "margin": 0.05}
    text = describe(made, contrasts=contrasts)
    assert text.startswith(f"{made.finished} of {made.planned} cells are measured")
    for section in (
        "Damage divided", "Cascade", "Damages at single sites", "Robustness gap", "Damage per dose",
        "Rise of single tokens' losses", "Contrasts named beforehand", "equivalence margin 0.05",
    ):  # fmt: skip
        assert section in text
    names = {"clean", "sites", "damage", "robustness", "per_dose", "split", "cascade", "additivity",
             "gap", "by_domain", "by_position", "by_frequency", "tails", "contrasts"}  # fmt: skip
    assert tables(made, contrasts).keys() == names


def test_only_what_was_measured_is_said():
    results = results_of(study(documents=3))
    made = tables(results)
    assert made.keys() == {
        "clean", "sites", "damage", "robustness", "per_dose", "by_domain",
    }  # fmt: skip
    text = describe(results, made)
    assert "Damage divided" not in text
    assert "Contrasts" not in text
    with pytest.raises(ValueError, match="was not kept: give tokens=True to sweep"):
        results.tails()
    with pytest.raises(ValueError, match="was not kept"):
        results.damage_by("position")


def test_contrasts_of_a_half_finished_study_are_those_that_are_there():
    results = results_of(study(documents=3))
    asked = {"reference": "cartesian", "conditions": ["DropTop(1)", "Lag(1)"], "margin": None}
    assert measured(results, asked) == asked | {"conditions": ["DropTop(1)"]}
    assert measured(results, asked | {"margin": 0})["margin"] is None
    for nothing in ({"reference": "olmoe"}, {"conditions": ["Lag(1)"]}):
        assert measured(results, asked | nothing) is None


def test_cells_that_are_missing_or_failed_are_counted_and_named():
    table = losses([arm("DropTop", 1, 0.5), arm("RandomRouting", 1, 1.0)])
    failed = table[table.perturbation == "DropTop"].head(1).assign(shard=2, reason="signal 9")
    results = dataclasses.replace(results_of(table), failed=failed, planned=5)
    text = describe(results)
    assert text.startswith("UNFINISHED: 3 of 5 cells are measured")
    assert "FAILED: 1 cells killed their workers\n  cartesian (seed 0): DropTop(1), shard 2" in text
    assert "UNFINISHED" not in describe(dataclasses.replace(results, planned=3))


@pytest.mark.parametrize(
    ("options", "dose", "failed"),
    [
        ({"expects": "selection"}, "changed", True),
        ({"expects": "weights"}, "mass_moved", True),
        ({"expects": "output"}, "output_change", True),
        ({"expects": "selection"}, "mass_moved", False),
        ({"expects": "selection"}, "flips", False),  # more experts: none is given up
        ({"expects": "none"}, "changed", False),
        ({"expects": "selection", "effect": "weights"}, "changed", False),
        ({"expects": "selection", "effect": "part set+mass"}, "changed", True),
        ({"expects": "weights", "effect": "part mass"}, "mass_moved", False),
    ],
)
def test_conditions_must_change_what_they_expect(options, dose, failed):
    """Those of one's own too, which no list of perturbations knows."""
    table = losses([arm("Mine", 1, 0.5, **options), arm("RandomRouting", 1, 1.0)])
    results = results_of(table)
    rows = results.routing.perturbation == "Mine"
    results.routing.loc[rows, dose] = 0.0
    text = describe(results)
    assert ("FAILED, changed nothing" in text) == failed
    if failed:
        name = results.damage(full=True).label.iloc[0]
        assert f"cartesian (seed 0): {name} has {dose} of 0" in text


def test_more_experts_and_noise_on_the_output_are_no_failures(model_of, shard):
    arms = [TopK(4), ResidualNoise(DropTop(1)), Condition(DropTop(1), effect="weights")]
    results = sweep(model_of("smoe_share"), shard, arms, progress=False)
    assert "FAILED, changed nothing" not in describe(results)
    same = sweep(model_of("smoe_share"), shard, [TopK(2)], progress=False)
    assert "TopK(2) has changed of 0" in describe(same)


def test_a_sweep_takes_all_arms_and_keeps_tokens(model_of, shard):
    arms = split_arms(DropTop(1), where="layer 0")
    results = sweep(model_of("top_p"), shard, arms, controls=False, tokens=True, progress=False)
    name = "DropTop(1), layer 0"
    assert results.split().condition.unique().tolist() == [name]
    assert results.tails().condition.tolist()[0] == name
    whole = results.damage(full=True).set_index("label").delta_nats[name]
    parts = results.split(name).set_index("part").delta_nats
    assert parts[["set", "weights", "mass"]].sum() == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            Data(documents=96, max_tokens=256),
            "Text: 96 documents at most of stdlib (validation), of each domain as large a share as "
            "it has of that text; 256 tokens of each at most, in windows spread over it",
        ),
        (Data(max_tokens=9, windows="first"), "9 tokens of each at most, from its beginning"),
        (Data("x", documents=None), "all documents of x (validation), of each domain"),
        (Data(split="train"), "of stdlib (train), of each domain as large a share as it has of"),
    ],
)
def test_how_text_was_sampled(data, expected):
    assert expected in sampling(dataclasses.asdict(data))
