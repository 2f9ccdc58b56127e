"""What others wrote, changed at random: taken, or refused in a line; never a traceback, a hang, or
a file outside of where it belongs.

`pytest -m slow -s tests/faults`; FAULT_SEED=7 tries others.
"""

from __future__ import annotations

import json
import random
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.study.study import Study
from cartmoe import LanguageModel, ModelConfig, load, save
from cartmoe.checkpoint import import_reference, read_config
from cartmoe.corpora import read_corpus
from cartmoe.data import prepare
from cartmoe.folders import write_folder
from cartmoe.tokenizers import load_tokenizer

from ..analysis.conftest import to_toml
from ..cartmoe.test_reference import load as golden
from .campaign import Tally, cut, flip

pytestmark = pytest.mark.slow
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        10**400,
        1.5,
        -0.0,
        1e308,
        "",
        "a",
        "\0",
        "é\u2028",
    ),
    *([], {}, [[]], {"": 1}, "x" * 5000, [1] * 500, "../../etc", "nan", float("inf")),
]


def changed(value: Any, draw: random.Random) -> Any:
    """The same with something replaced, lacking or added somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        value, key = dict(value), draw.choice(list(value))
        how = draw.random()
        if how < 0.15:
            del value[key]
        elif how < 0.25:
            value[draw.choice(["x", "", "name", "path"])] = draw.choice(VALUES)
        else:
            value[key] = changed(value[key], draw)
        return value
    if isinstance(value, list) and value and draw.random() < 0.8:
        value, at = list(value), draw.randrange(len(value))
        value[at] = changed(value[at], draw)
        return value
    return draw.choice(VALUES)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def spoiled(text: str, draw: random.Random) -> bytes:
    """Its bytes, most often with a fault in them."""
    data, how = text.encode(), draw.randrange(8)
    if how == 0:
        return cut(data, draw)
    if how == 1:
        return b"\xef\xbb\xbf" + data
    if how == 2:
        return data.replace(b"\n", b"\r\n")
    if how == 3:
        return text.encode("utf-16")
    if how == 4:
        at = draw.randrange(len(data))
        return data[:at] + nested(draw.choice([10, 5000])).encode() + data[at:]
    for _ in range(draw.randrange(4)):
        data = flip(data, draw)
    return data


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_studies(study_dict, home, tmp_path):
    """2,000 of them are read; each that is taken could be planned, or that says why not."""
    tally, path = Tally("TOML of studies"), tmp_path / "wrong" / "study.toml"
    path.parent.mkdir()
    for number in range(2000):
        draw = tally.draw
        text = None
        while text is None:
            study = changed(study_dict, draw) if draw.random() < 0.7 else study_dict
            try:
                text = to_toml(study) if isinstance(study, dict) else str(study)
            except (AttributeError, TypeError):  # what TOML has no form for
                continue
        data = text.encode(errors="replace") if draw.random() < 0.7 else spoiled(text, draw)
        path.write_bytes(data)
        before = listing(tmp_path)
        if number % 40:
            tally.trial(f"study {number}", lambda: Study.read(path), None, None)
        else:
            command = ["run", str(path), "--out", str(tmp_path / "out"), "--dry-run"]
            tally.trial(f"dry run {number}", partial(invoked, command), None, None)
        assert listing(tmp_path) == before
    tally.close()


def invoked(command: list[str]) -> None:
    """Raise unless it ends with 0, or with 2 and a line or a few."""
    result = CliRunner().invoke(app, command)
    if result.exit_code not in (0, 2):
        raise RuntimeError(f"exit code {result.exit_code}: {result.exception!r}")


def test_texts(tmp_path):
    """500 JSONL files."""
    tally, path = Tally("JSONL of texts"), tmp_path / "texts.jsonl"
    lines = [
        {"text": f"text {i} of some", "meta": {"pile_set_name": "xy"[i % 2]}} for i in range(9)
    ]
    for number in range(500):
        draw = tally.draw
        some = [changed(line, draw) if draw.random() < 0.3 else line for line in lines]
        text = "\n".join(json.dumps(line) for line in some)
        path.write_bytes(spoiled(text, draw) if draw.random() < 0.6 else text.encode())
        tally.trial(f"texts {number}", lambda: list(read_corpus(path)), None, path)
    tally.close()


def test_tokenizers(corpus, tmp_path):
    """200 files of the tokenizers library."""
    tally, path = Tally("tokenizers"), tmp_path / "tokenizer.json"
    good = json.loads(prepare(corpus, "bpe:300", tmp_path / "cache").tokenizer.json)

    def use():
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode("text 7 of them, naïve")
        return tokenizer.num_bytes(ids), tokenizer.decode(ids.tolist()), tokenizer.bos_id

    for number in range(200):
        draw = tally.draw
        text = json.dumps(changed(good, draw))
        path.write_bytes(spoiled(text, draw) if draw.random() < 0.4 else text.encode())
        tally.trial(f"tokenizer {number}", use, None, path.with_suffix(""))  # used by its name
    tally.close()


def test_configurations(tmp_path):
    """300 config.json, in checkpoints whose digests are right: a fault that was written so."""
    tally, folder = Tally("configurations"), tmp_path / "kept"
    save(LanguageModel(ModelConfig("smoe", 256, 32, 64, 2, 2, num_experts=4)), folder, {})
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    config = json.loads(files["config.json"])
    for number in range(300):
        draw = tally.draw
        text = json.dumps(changed(config, draw))
        data = spoiled(text, draw) if draw.random() < 0.3 else text.encode()
        path = tmp_path / f"wrong-{number}"
        written(path, files | {"config.json": data})
        if number % 3:
            tally.trial(f"configuration {number}", partial(read_config, path), None, path)
        else:
            tally.trial(f"checkpoint {number}", partial(load, path), None, path)
    tally.close()


def written(folder: Path, files: dict[str, bytes]) -> None:
    """As a checkpoint of these files, with their digests."""

    def fill(new: Path) -> None:
        for name, data in files.items():
            (new / name).write_bytes(data)

    write_folder(folder, fill)


def spoiled_tensors(path: Path, draw: random.Random) -> bytes:
    """A safetensors file with a fault: in its bytes, in its header, in names, shapes and types."""
    how = draw.randrange(4)
    if how == 0:
        return cut(path.read_bytes(), draw)
    if how == 1:
        return flip(path.read_bytes(), draw)
    if how == 2:
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(changed(json.loads(data[8 : 8 + size]), draw)).encode()
        return struct.pack("<Q", draw.choice([len(header), 0, 2**62])) + header + data[8 + size :]
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    other = {
        0: lambda: tensor[:1],
        1: lambda: tensor.flatten(),
        2: lambda: tensor.to(torch.int64),
        3: lambda: tensor.double(),
        4: lambda: tensor.to(torch.bfloat16),
        5: lambda: torch.full_like(tensor, torch.nan),
    }
    if draw.random() < 0.8:
        tensors[draw.choice([name, "other"])] = other[draw.randrange(6)]().contiguous()
    new = path.with_name("new.safetensors")
    save_file(tensors, new)
    data = new.read_bytes()
    new.unlink()
    return data


def test_weights(tmp_path):
    """100 safetensors, in checkpoints whose digests are right."""
    tally, folder = Tally("safetensors"), tmp_path / "kept"
    save(LanguageModel(ModelConfig("smoe", 256, 32, 64, 2, 2, num_experts=4)), folder, {})
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    (weights,) = [name for name in files if name.endswith(".safetensors")]
    for number in range(100):
        path = tmp_path / f"wrong-{number}"
        written(path, files | {weights: spoiled_tensors(folder / weights, tally.draw)})
        tally.trial(f"weights {number}", partial(load, path), None, path)
    tally.close()


@pytest.fixture
def authors(tmp_path):
    """A folder as the authors' code writes it."""
    weights, config, _ = golden("cartesian_shared")
    folder = tmp_path / "authors"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_imports(authors, tmp_path):
    """300 folders of other code: nothing stays behind of one that is refused."""
    tally = Tally("imports")
    config = json.loads((authors / "config.json").read_text())
    good = {p.name: p.read_bytes() for p in authors.iterdir()}
    (weights,) = authors.glob("*.safetensors")
    for number in range(300):
        draw, wrong = tally.draw, tmp_path / f"wrong-{number}"
        files = dict(good)
        if draw.random() < 0.6:
            text = json.dumps(changed(config, draw))
            files["config.json"] = spoiled(text, draw) if draw.random() < 0.3 else text.encode()
        else:
            files[weights.name] = spoiled_tensors(weights, draw)
        wrong.mkdir()
        for name, data in files.items():
            (wrong / name).write_bytes(data)
        before, out = listing(tmp_path), tmp_path / f"out-{number}"
        tally.trial(f"import {number}", partial(import_reference, wrong, out), None, None)
        assert {p for p in listing(tmp_path) - before if out not in (p, *p.parents)} == set()
    tally.close()
