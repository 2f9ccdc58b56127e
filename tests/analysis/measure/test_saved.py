"""Results that are kept and read again, to the last bit; and what one sees of them."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

import analysis as an
from analysis.measure.results import SHORT, Results

QUIET = dict(progress=False)


@pytest.fixture(scope="module", params=[False, True], ids=["sums", "tokens"])
def results(request, model_of, shard):
    models = {"one": model_of("cartesian"), "zwei, naïve": model_of("smoe_share")}
    models = {name.replace(",", ""): model for name, model in models.items()}
    asked = [an.DropTop(1), an.Condition(an.GaussianNoise(1.0), eval_seed=3), an.Lag(100)]
    return an.sweep(models, shard, asked, tokens=request.param, **QUIET)


def assert_same(a: Results, b: Results):
    for table in ("losses", "routing", "facts", "cells", "failed"):
        pd.testing.assert_frame_equal(getattr(a, table), getattr(b, table), check_exact=True)
    assert (a.finished, a.planned, a.tokens is None) == (b.finished, b.planned, b.tokens is None)


@pytest.mark.filterwarnings("ignore:no token could be changed")
def test_back_to_the_last_bit(results, tmp_path):
    results.save(tmp_path / "deep" / "kept")
    back = an.read(tmp_path / "deep" / "kept")
    assert_same(results, back)
    full = [r.damage(full=True) for r in (results, back)]
    pd.testing.assert_frame_equal(*full, check_exact=True)
    if results.tokens is not None:
        key = ("one", 0, "clean")
        pd.testing.assert_frame_equal(results.tokens(*key), back.tokens(*key))
        pd.testing.assert_frame_equal(results.tails(), back.tails(), check_exact=True)


@pytest.mark.parametrize(
    "names", [["NA", "a,b", 'say "x"', "line\nbreak"], ["carriage\rreturn", "nan", "", "None"]]
)
def test_strange_names_come_back(results, tmp_path, names):
    old = results.losses.document_id.unique()
    losses = results.losses.assign(
        document_id=results.losses.document_id.map(dict(zip(old, names, strict=True)))
    )
    renamed = dataclasses.replace(results, losses=losses, tokens=None)
    renamed.save(tmp_path / "kept")
    assert_same(renamed, an.read(tmp_path / "kept"))


def test_nothing_is_overwritten(results, tmp_path):
    results.save(tmp_path / "kept")
    with pytest.raises(FileExistsError, match="kept exists already"):
        results.save(tmp_path / "kept")


@pytest.mark.parametrize("file", ["losses.csv", "results.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_names_the_file(results, tmp_path, file, how):
    results.save(tmp_path / "kept")
    path = tmp_path / "kept" / file
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if how == "flipped" else data[: len(data) // 2])
    error = FileNotFoundError if (how, file) == ("gone", "results.json") else ValueError
    with pytest.raises(error, match=r"kept (is not whole: .*|holds no study)"):
        an.read(tmp_path / "kept")


@pytest.mark.filterwarnings("ignore:no token could be changed")
def test_a_reader_sees_first_what_she_needs(results):
    short, full = results.damage(), results.damage(full=True)
    assert list(short) == SHORT
    assert set(SHORT) < set(full)
    assert len(full.columns) > 30
    pd.testing.assert_frame_equal(short, full[SHORT])


def test_pictures_take_either(results):
    fresh = dataclasses.replace(results)
    with pytest.warns(UserWarning, match="no token could be changed"):
        an.plots.damage_curve(fresh, "GaussianNoise")
    an.plots.damage_curve(fresh.damage(full=True), "GaussianNoise")
    with pytest.raises(ValueError, match=r"lacks the columns .*; damage\(full=True\) has all"):
        an.plots.damage_curve(fresh.damage(), "GaussianNoise")


def test_several_models_are_swept_as_each_alone(results, model_of, shard):
    alone = an.sweep(model_of("cartesian"), shard, an.DropTop(1), controls=False, **QUIET)
    mine = results.losses[(results.losses.model == "one")]
    mine = mine[mine.perturbation == "DropTop"]
    theirs = alone.losses[alone.losses.perturbation == "DropTop"]
    np.testing.assert_allclose(mine.nll_sum, theirs.nll_sum, rtol=1e-5)  # from a table, or not
    assert model_of("cartesian").name == "cartesian"  # the caller's keeps its own


def test_seeds_of_a_model_keep_their_name_in_a_list():
    seeds = [an.load("smoe-s0"), "smoe-s1"]
    docs = an.documents("stdlib", seeds[0], length=32, limit=4, max_tokens_per_document=32)
    swept = an.sweep(seeds, docs, an.DropTop(1), controls=False, **QUIET)
    assert swept.damage()[["model", "train_seed"]].to_numpy().tolist() == [["smoe", 0], ["smoe", 1]]
    with pytest.raises(ValueError, match="models has 2 of the name 'smoe' and train_seed 0"):
        an.sweep(["smoe-s0", seeds[0]], docs, an.DropTop(1), **QUIET)
    with pytest.raises(ValueError, match="models is empty"):
        an.sweep([], docs, an.DropTop(1), **QUIET)
    alone = an.sweep("smoe-s0", docs, an.DropTop(1), controls=False, **QUIET)
    assert alone.damage().delta_nats.iloc[0] == pytest.approx(swept.damage().delta_nats.iloc[0])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "models is empty; give at least one"),
        ({"a/b": None}, r"models has the name 'a/b'; it must be a text without / \( \) ,"),
        ({"dense": "dense"}, "dense has no router"),
    ],
)
def test_models_that_cannot_be_swept(model_of, shard, models, message):
    models = {
        name: model_of("dense") if model == "dense" else model for name, model in models.items()
    }
    with pytest.raises(ValueError, match=message):
        an.sweep(models, shard, an.DropTop(1), **QUIET)


def test_what_is_shown_is_a_line(results, model_of, shard):
    relation = an.relate(model_of("smoe_share"), shard, "lift", **QUIET)
    for thing in (
        results,
        model_of("smoe_share"),
        an.calibrate(model_of("smoe_share"), shard),
        relation,
    ):
        assert len(repr(thing)) < 200
        assert "\n" not in repr(thing)
    assert "Results of one, zwei naïve: 4 documents, 9 conditions" in repr(results)
