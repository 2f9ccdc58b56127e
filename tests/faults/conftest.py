"""A small study that was run whole, and what else a user keeps."""

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app

from ..analysis.conftest import to_toml

SHAPE = dict(d_model=32, ffn_width=64, num_layers=2, num_heads=2, num_experts=4)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Twenty-four short texts."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for i in range(24):
        words = " ".join(str(i * k) for k in range(30))
        (folder / f"{i}.txt").write_text(f"text {i} {words}")
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Where prepared corpora lie, for this process and its children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def study_dict(corpus):
    """A study of one model and two conditions."""
    train = dict(preset="nano", families=["smoe_share"], steps=2, batch_size=2, model=SHAPE)
    return dict(
        name="small",
        data=dict(corpus=str(corpus), length=32, documents=2, max_tokens=32),
        train=train | dict(precision="fp32"),
        measure=dict(batch_size=2, calibration=2, threads=1, tokens=True),
        conditions=[dict(perturbation="DropTop", m=[1, 2])],
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, study_dict, home):
    """(its TOML, its --out) after `run`; not to be changed."""
    folder = tmp_path_factory.mktemp("study")
    path, out = folder / "small.toml", folder / "out"
    path.write_text(to_toml(study_dict))
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(out), "--no-progress"])
    assert result.exit_code == 0, result.stderr
    return path, out
