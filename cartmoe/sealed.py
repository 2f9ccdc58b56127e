"""JSON files that carry the SHA-256 of their own text, so that no flipped bit is read as content.

The digest is the first field, of the object's text without it:

    {
     "sha256": "9f86d081...",
     "format": 1, ...
    }
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cartmoe.files import write_atomically

_HEAD, _TAIL = '{\n "sha256": "', '",'
_BEGIN = len(_HEAD) + 64  # of what follows the digest


def seal(value: Mapping[str, Any]) -> str:
    """The file's text; `value` is plain JSON, not empty, without a field "sha256"."""
    body = json.dumps(value, indent=1)[1:]
    return f"{_HEAD}{_sha256(body)}{_TAIL}{body}"


def unseal(text: str) -> dict[str, Any]:
    """The value of `seal`; `ValueError` for a text that differs from it in any byte."""
    body = text[_BEGIN + len(_TAIL) :]
    if text != f"{_HEAD}{_sha256(body)}{_TAIL}{body}":
        raise ValueError("its content does not have the SHA-256 that stands at its beginning")
    return {name: value for name, value in json.loads(text).items() if name != "sha256"}


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write it in one step."""
    write_atomically(path, seal(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises `FileNotFoundError`, and `ValueError` naming a file that
    was damaged or edited since, or is of a version that did not seal it."""
    try:
        return unseal(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not as it was written: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
