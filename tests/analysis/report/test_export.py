"""A study's tables as files."""

import re
import shutil
import sys

import pandas as pd
import pytest

from analysis.report.page import write_report
from analysis.report.study import export, plot, summarize
from analysis.study.folder import read
from analysis.study.run import run
from analysis.study.study import Study


@pytest.fixture(scope="module")
def done(study_dict_of, checkpoint_of, tmp_path_factory):
    """The directory of a finished study of one model."""
    out = tmp_path_factory.mktemp("export") / "out"
    models = [{"path": str(checkpoint_of("cartesian")), "name": "cartesian"}]
    conditions = [{"perturbation": ["DropTop", "Identity"]}]
    study = study_dict_of(train=None, models=models, conditions=conditions)
    run(Study.from_dict(study), out, progress=False)
    return out


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_files_hold_the_tables(done, tmp_path, format):
    pytest.importorskip("pyarrow")
    paths = export(done, format, tmp_path / "files")
    names = ["losses", "routing", "cells", "damage"]
    assert paths == [tmp_path / "files" / f"{name}.{format}" for name in names]
    results = read(done)
    for path in paths:
        got = pd.read_parquet(path) if format == "parquet" else pd.read_csv(path)
        table = results.damage(full=True) if path.stem == "damage" else getattr(results, path.stem)
        assert len(got) == len(table) > 0
        expected = table.reset_index(drop=True)
        pd.testing.assert_frame_equal(
            got, expected, check_dtype=False, check_exact=format == "parquet"
        )
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == sorted(p.name for p in paths)


def test_its_own_folder(done):
    assert {path.parent for path in export(done, "csv")} == {done / "export"}


def test_dense(study_dict_of, checkpoint_of, tmp_path):
    models = [{"path": str(checkpoint_of("dense"))}]
    run(Study.from_dict(study_dict_of(train=None, models=models)), tmp_path, progress=False)
    assert [path.stem for path in export(tmp_path, "csv")] == ["losses", "routing", "cells"]


def test_what_is_there_stays_until_the_new_is_whole(done, tmp_path, monkeypatch):
    (path, *_) = export(done, "csv", tmp_path)
    before = path.read_bytes()

    def full(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="no space"):
        export(done, "csv", tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_mistakes(done, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="format is 'xlsx'; choose one of 'parquet', 'csv'"):
        export(done, "xlsx")
    with pytest.raises(FileNotFoundError, match="holds no study"):
        export(tmp_path, "csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow; install it: .*cartmoe\[data\]"):
        export(done)


def test_a_study_that_nobody_may_write_to(done, tmp_path):
    """It is read, summarized, drawn and exported elsewhere, and stays as it is, byte by byte."""
    study = tmp_path / "study"
    shutil.copytree(done, study)
    shutil.rmtree(study / "tables", ignore_errors=True)
    before = {path: path.stat().st_mtime_ns for path in sorted(study.rglob("*"))}
    assert "DropTop(1)" in summarize(study, tmp_path / "mine")
    assert (tmp_path / "mine" / "tables" / "damage.csv").is_file()
    (picture, *_) = plot(study, to=tmp_path / "mine")
    assert picture.parent == tmp_path / "mine" / "figures"
    export(study, "csv", tmp_path / "mine")
    assert write_report(study, tmp_path / "mine" / "page.html").is_file()
    assert before == {path: path.stat().st_mtime_ns for path in sorted(study.rglob("*"))}


@pytest.mark.parametrize("name", ["damage.csv", ".made.json"])
def test_a_damaged_table_is_made_anew(done, tmp_path, name):
    summarize(done, tmp_path)
    path = tmp_path / "tables" / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0", b"1", 1))
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))} .*made anew"):
        summarize(done, tmp_path)
    assert path.read_bytes() == content
