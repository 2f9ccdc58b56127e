"""The studies that come with the project can be read, and hold what they say."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.perturb.catalogue import PERTURBATIONS
from analysis.study.study import Study
from cartmoe import FAMILIES, ModelConfig
from cartmoe.shipped import shipped_names

from .tiny import tiny_study

ROOT = Path(__file__).parents[1]
CATALOGUE = ROOT / "studies" / "catalogue.toml"
MODELS = ROOT / "studies" / "models.toml"
TRAINED = [ROOT / "studies" / f"{name}.toml" for name in ("quick", "trained")]
PRETRAINED = ROOT / "studies" / "pretrained.toml"
OTHERS = {CATALOGUE, MODELS, PRETRAINED, *TRAINED}
STUDIES = sorted(set((ROOT / "studies").glob("*.toml")) - OTHERS)
NINE = [*FAMILIES, "parallel", "unshared"]
# Conditions by perturbation, all different ones.
CONDITIONS = {
    "scratch": dict(DropTop=6 + 3, GaussianNoise=5),
    "small": dict(DropTop=14 + 3, GaussianNoise=10, DropChosen=2, DropUnchosen=2, RandomRouting=2),
    "paper": dict(DropTop=6 + 4, GaussianNoise=5),
}
CONTROLS = dict.fromkeys(
    [*("Identity", "DropChosen", "DropUnchosen", "RandomRouting", "NoRouted", "ResidualNoise")], 1
)


def test_all_are_here():
    assert {path.stem for path in STUDIES} == set(CONDITIONS)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_reading(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # neither corpus nor tokenizer is there
    study = Study.read(path)
    assert study.name == path.stem
    counts = Counter(type(condition.perturbation).__name__ for condition in study.conditions)
    assert counts == CONTROLS | CONDITIONS[study.name]
    seeds = 3 if study.name == "small" else 1
    assert [(m.name, m.train_seed) for m in study.models] == [
        (family, seed) for family in FAMILIES for seed in range(seeds)
    ]
    assert all(m.train.length == study.data.length for m in study.models)
    assert list(tmp_path.iterdir()) == []


def test_the_catalogue(tmp_path, monkeypatch):
    """It names every perturbation. What `make catalogue` makes before it is all that it lacks."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no trace") as caught:
        Study.read(CATALOGUE)
    lines = str(caught.value).splitlines()
    assert [line.partition(", and ")[0].split()[-1] for line in lines] == [
        f"'runs/traces/{model}'" for model in ("smoe_share", "cartesian")
    ]
    text = CATALOGUE.read_text()
    assert all(f'"{name}"' in text for name in PERTURBATIONS if name != "Custom")
    own, _, _ = text.partition("# ---- routing of another model")
    (tmp_path / "own.toml").write_text(own)
    study = Study.read(tmp_path / "own.toml")
    assert [(m.name, m.train_seed) for m in study.models] == [(name, 0) for name in NINE[1:]]


def test_the_models_that_come_with_the_project():
    """Trained alike, for at least ten million tokens, with checkpoints to look back at."""
    study = Study.read(MODELS)
    asked = {(m.name, m.train_seed) for m in study.models}
    assert asked == {(name, seed) for name in NINE for seed in range(3)}
    assert len({replace(m.train, seed=0) for m in study.models}) == 1
    train = study.models[0].train
    size = train.batch_size * train.length
    assert train.steps * size >= 10_000_000
    assert len([step for step in train.milestones if step * size <= 10_100_000]) >= 11
    for model in study.models:
        if model.name in FAMILIES:
            assert model.config == ModelConfig.preset("micro", model.name)


def test_a_pretrained_model_beside_compact_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study.read(PRETRAINED)
    assert [(m.name, bool(m.hf), bool(m.path)) for m in study.models] == [
        ("olmoe", True, False), ("smoe", False, True), ("cartesian", False, True),
    ]  # fmt: skip
    asked = {type(c.perturbation).__name__ for c in study.conditions}
    assert asked >= {"DropTop", "GaussianNoise", *CONTROLS}


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_studies_of_those_models(path, tmp_path, monkeypatch):
    """They train nothing, and say beforehand what they compare."""
    monkeypatch.chdir(tmp_path)
    study = Study.read(path)
    asked = {(m.name, m.train_seed) for m in study.models}
    shipped = {tuple(name.rsplit("-s", 1)) for name in shipped_names()}
    every = {(name, int(seed)) for name, seed in shipped}
    assert asked == (every if path.stem == "trained" else {(name, 0) for name in NINE})
    assert all(m.path and m.config is None for m in study.models)
    asked = {type(c.perturbation).__name__ for c in study.conditions}
    assert asked >= {"DropTop", "GaussianNoise", *CONTROLS}
    assert path.stem == "quick" or study.contrasts.margin == 0.05


def test_presets():
    """A study's models are the preset of its size, whatever else it sets."""
    for path, preset in zip(STUDIES, ("base", "micro", "small"), strict=True):
        for model in Study.read(path).models:
            assert model.config == ModelConfig.preset(preset, model.name)


def test_from_scratch_is_the_main_one():
    """The same questions of models that are trained first."""
    scratch, quick = (Study.read(ROOT / "studies" / f"{n}.toml") for n in ("scratch", "quick"))
    assert (scratch.conditions, scratch.measure) == (quick.conditions, quick.measure)
    assert scratch.data == quick.data


def test_the_tiny_study_is_the_main_one(tmp_path):
    """So that what the other tests run is what users run."""
    (tmp_path / "tiny.toml").write_text(tiny_study())
    tiny, main = Study.read(tmp_path / "tiny.toml"), Study.read(ROOT / "studies" / "scratch.toml")
    assert tiny.conditions == main.conditions
    assert [m.name for m in tiny.models] == [m.name for m in main.models]
    assert tiny.models[0].config.d_model == 32
    assert (tiny.models[0].train.steps, tiny.data.length) == (3, 64)
