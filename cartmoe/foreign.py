"""What others wrote, and what their libraries raise while it is read: one line that names the file.

Libraries raise what they like: safetensors an error of its own for a full disk, tokenizers a plain
Exception, json a RecursionError, torch a RuntimeError. What is read of others goes through here.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a command tells in a line, with exit code 2: mistakes of a user's, and limits of the machine.
TOLD: tuple[type[Exception], ...] = (ValueError, OSError, FloatingPointError, ImportError)
TOLD += (sqlite3.Error, MemoryError, RecursionError)


@contextmanager
def named(subject: object, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Whatever is raised within the block is a `kind` that begins with the subject, such as a
    path; errors of the operating system are an `OSError`, whoever tells them."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        if system := re.search(r"\(os error (\d+)\)", said):  # as Rust tells them
            number = int(system[1])
            raise OSError(number, os.strerror(number), str(subject)) from error
        if isinstance(error, RecursionError):
            said = "it is nested too deeply"
        if isinstance(error, MemoryError):
            said = "it takes more memory than there is"
        raise kind(f"{subject}: {said}") from error


def told(error: BaseException) -> str:
    """What a command says of one of `TOLD`."""
    if isinstance(error, RecursionError):
        return "something is nested too deeply"
    return str(error).strip() or "out of memory" if isinstance(error, MemoryError) else str(error)


def read_text(path: Path, kind: type[ValueError] = ValueError) -> str:
    """A text in UTF-8, without the mark that some editors put before it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 text: {error}") from error


def read_object(path: Path, kind: type[ValueError] = ValueError) -> dict[str, Any]:
    """A JSON object. Raises `FileNotFoundError`, and `kind` naming the file."""
    text = read_text(path, kind)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else error
        raise kind(f"{path} is not JSON: {said}") from error
    if not isinstance(parsed, dict):
        raise kind(f"{path} is no JSON object")
    return parsed
