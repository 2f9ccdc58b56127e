"""The words beside figures, and that they agree with what others say."""

import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml  # comes with jupyterlab

import analysis as an
from analysis.report.cite import BIBTEX
from analysis.report.figures import FIGURES
from analysis.report.study import plot
from analysis.study.run import run
from analysis.study.study import Study

from ..synthetic import arm, losses, study
from .test_study import results_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def done(write_study, checkpoint_of, tmp_path_factory):
    """The directory of a finished study of one model."""
    place = tmp_path_factory.mktemp("captions")
    models = [{"path": str(checkpoint_of("cartesian")), "name": "mine"}]
    conditions = [{"perturbation": ["DropTop", "GaussianNoise"]}]
    path = write_study(place / "s.toml", train=None, models=models, conditions=conditions)
    run(Study.read(path), place / "out", progress=False)
    return place / "out"


def test_every_figure_of_a_study_has_its_words_beside_it(done, tmp_path):
    files = plot(done, to=tmp_path)
    stems = {path.with_suffix("") for path in files}
    assert {path.suffix for path in files} == {".png", ".pdf", ".svg", ".txt"}
    assert len(files) == 4 * len(stems)
    for stem in stems:
        text = stem.with_suffix(".txt").read_text()
        assert text == an.caption(done, stem.name)
        assert text.startswith(FIGURES[stem.name].says)
        for said in (
            "n = 4 documents of ",
            "tokens (bytes)",
            "95 % BCa over documents",
            "One training seed a model",
            "Models and their millions of parameters: mine ",
            "\n\nMethods. ",
            "Computed in fp32 on cpu",
            "torch 2.",
            BIBTEX,
        ):
            assert said in text, said
        assert "Unfinished" not in text


def test_what_is_read_from_a_figure():
    """The ends of what it is there for, with interval and whose they are."""
    results = results_of(study())
    damage = results.damage(full=True)
    own = damage[damage.label == "DropTop(1)"].set_index("model")
    said = re.search(r"Largest: \+([\d.]+) \[.*?\] nats per token \((.*?)\); smallest: "
                     r"\+([\d.]+) \[.*?\] nats per token \((.*?)\)\.",
                     an.caption(results, "controls"))  # fmt: skip
    for value, name, model in ((said[1], said[2], own.delta_nats.idxmax()),
                               (said[3], said[4], own.delta_nats.idxmin())):  # fmt: skip
        assert name == f"{model}, seed 0, DropTop(1)"
        assert float(value) == pytest.approx(own.delta_nats[model], abs=6e-4)


def test_conditions_and_their_definitions():
    results = results_of(study())
    text = an.caption(results, "noise_mass")
    assert "Conditions: GaussianNoise(0.25); GaussianNoise(0.5); GaussianNoise(1);" in text
    assert (
        "GaussianNoise: The logits z become z + sigma * s * n, n standard normal and s by default "
        in text
    )
    assert "DropTop" not in text
    everything = an.caption(results)
    assert "DropTop: The m highest logits" in everything
    assert "wrong experts" not in everything  # ResidualNoise was not run


def test_seeds_and_states():
    one, two = (losses([arm("DropTop", 1, 0.5)], documents=5, train_seed=seed) for seed in (0, 1))
    results = results_of(pd.concat([one, two]))
    text = an.caption(dataclasses.replace(results, planned=9))
    assert "Training seeds: cartesian 2; of several what is drawn large is their mean" in text
    assert "Unfinished: 4 of 9 cells." in text
    assert "? from fewer than 20 documents" in text
    assert "n = 5 documents, " in text
    assert "Computed" not in text  # a sweep says nothing of versions
    assert "One training seed a model" in an.caption(results_of(one))


def test_clean_runs_alone():
    table = losses([arm("DropTop", 1, 0.5)])
    clean = table[table.perturbation == "clean"].assign(condition="clean")
    text = an.caption(dataclasses.replace(results_of(table), losses=clean))
    assert text.startswith("n = 20 documents, ")
    assert "DropTop" not in text


def test_mistakes(tmp_path):
    results = results_of(losses([arm("DropTop", 1, 0.5)]))
    with pytest.raises(ValueError, match="figure is 'control'; choose one of 'controls', "):
        an.caption(results, "control")
    with pytest.raises(ValueError, match="figure is 'split', of which these results have nothing"):
        an.caption(results, "split")
    with pytest.raises(FileNotFoundError, match="holds no study"):
        an.caption(tmp_path)


def test_kept_results_have_words(tmp_path):
    results = results_of(losses([arm("DropTop", 1, 0.5)]))
    results.save(tmp_path / "kept")
    assert an.caption(tmp_path / "kept", "controls") == an.caption(results, "controls")


def test_how_to_cite_is_what_the_citation_file_says():
    ours = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = ours["references"]
    text = " ".join(BIBTEX.replace("{", "").replace("}", "").split())
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    for said in (
        f"title = {ours['title']},", f"author = {ours['authors'][0]['name']},",
        f"version = {ours['version']},", f"license = {ours['license']}", f"author = {authors},",
        f"title = {paper['title']},", f"year = {paper['year']},",
        f"booktitle = {paper['collection-title']},",
        f"eprint = {paper['identifiers'][0]['value'].removeprefix('arXiv:')},",
    ):  # fmt: skip
        assert said in text, said
