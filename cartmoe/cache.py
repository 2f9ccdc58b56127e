"""Folders that are made once: whole or absent, checked byte by byte, safe among processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "manifest.json"


def cached_folder(cache: Path, name: str, key: dict, make: Callable[[Path], None]) -> Path:
    """The folder of `cache` that `make(path)` fills, found or made now.

    key   plain JSON of everything that decides the content; name is for people

    Its manifest.json holds the key, and size and SHA-256 of every file. A folder that differs from
    its manifest is made anew, with a warning. Processes that make the same folder at once all
    succeed; the first to finish stays. What killed processes of this machine left is removed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    folder = cache / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if folder.exists():
        damage = _damage(folder, key)
        if damage is None:
            return folder
        warnings.warn(f"{folder} is damaged ({damage}); it is made anew", stacklevel=3)
        with _temporary(cache) as aside, suppress(FileNotFoundError):
            folder.rename(aside / "damaged")
    with _temporary(cache) as new:
        make(new)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in new.iterdir()}
        manifest = {"key": key, "files": dict(sorted(files.items()))}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*new.iterdir(), new):
            _sync(path)
        try:
            new.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster, and what it made is the same.
    _sync(cache)
    return folder


def read_manifest(folder: Path) -> dict:
    """{"key": ..., "files": {name: {"bytes": ..., "sha256": ...}}}"""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _damage(folder: Path, key: dict) -> str | None:
    """What is wrong with the folder, in words."""
    try:
        manifest = read_manifest(folder)
        if manifest["key"] != key:
            return f"{MANIFEST} is of something else"
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:  # before reading it all
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"the SHA-256 of {name} differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold a file's content or a folder's entries before we go on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _prefix() -> str:
    return f".making.{socket.gethostname()}."


@contextmanager
def _temporary(cache: Path) -> Iterator[Path]:
    """A folder beside the final one, named for its maker, so that others can tell if it lives."""
    path = cache / f"{_prefix()}{os.getpid()}.{uuid.uuid4().hex}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # gone where it was renamed


def _remove_leftovers(cache: Path) -> None:
    for path in cache.iterdir():
        if path.name.startswith(_prefix()):
            try:
                os.kill(int(path.name.split(".")[-2]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:  # alive, of another user
                pass
