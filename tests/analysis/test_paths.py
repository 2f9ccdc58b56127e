"""Whatever takes a path names the argument that is none, and knows a home by its ~."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import analysis as an
from cartmoe.data import prepare

ENTRANCES: list[tuple[str, Callable[[Any], Any]]] = [
    *[("path", make) for make in (an.load, an.Trace, an.Trace.load, an.Study.read)],
    ("corpus", lambda value: an.documents(value, length=8)),
    ("corpus", prepare),
    ("tokenizer", lambda value: prepare("stdlib", value)),
    ("out", an.read),
    ("out", lambda value: an.run({}, value)),
    ("run_folder", lambda value: an.saturation(value, None)),
]


@pytest.mark.parametrize(("name", "entrance"), ENTRANCES)
def test_what_is_no_path(name, entrance):
    for value, said in {7: "a int", ("a",): "a tuple", b"a": "a bytes"}.items():
        with pytest.raises(ValueError, match=f"{name} is {said}; give a path"):
            entrance(value)
    nobodys = "~there-is-no-such-user/a"
    with pytest.raises(ValueError, match=f"{name} is '{nobodys}', in which ~ is no home"):
        entrance(nobodys)


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a text, and another")
    assert len(an.documents("~/mine", length=64)) == 1
    ids = [np.array([[[0, 1]]] * 3)]
    assert an.Trace.from_arrays(ids, [1], "~/trace", num_experts=2).path == tmp_path / "trace"
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "run")):
        an.load(Path("~/run"))
