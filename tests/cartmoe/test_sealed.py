"""Sealed JSON: every byte counts."""

import json

import pytest

from cartmoe.sealed import read_sealed, seal, unseal, write_sealed

VALUE = {"format": 1, "of": [1, 2.5, None, "ü"], "nested": {"NaN": float("inf")}}


def test_round_trip(tmp_path):
    write_sealed(tmp_path / "x.json", VALUE)
    assert read_sealed(tmp_path / "x.json") == VALUE
    assert json.loads((tmp_path / "x.json").read_text()).keys() == {"sha256", *VALUE}


def test_every_flip_and_every_cut(tmp_path):
    path, text = tmp_path / "x.json", seal(VALUE).encode()
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"x\.json is not as it was written"):
            read_sealed(path)
    for length in range(len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(ValueError, match=r"x\.json is not as it was written"):
            read_sealed(path)


def test_foreign_text():
    for text in ("", "{}", json.dumps(VALUE), "[" * 10_000):
        with pytest.raises(ValueError, match="SHA-256"):
            unseal(text)
