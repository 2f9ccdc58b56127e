"""A study's tables as files."""

import sys

import pandas as pd
import pytest

from analysis.report.study import export
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
        table = results.damage() if path.stem == "damage" else getattr(results, path.stem)
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
