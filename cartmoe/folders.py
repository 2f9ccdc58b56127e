"""Folders with a manifest: written whole or not at all, and checked byte by byte when read."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from cartmoe.files import sync_directory

MANIFEST = "manifest.json"
FORMAT = 1


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder with the files that `fill(path)` writes, and size and SHA-256 of each.

    They are written beside it, synced, and renamed: a crash leaves nothing under its name. What
    killed writers of the same folder left is removed. Raises `FileExistsError` if there is one.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, folder.name)
    temporary = _aside(folder)
    temporary.mkdir()
    try:
        fill(temporary)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        # Without a newline at the end, so that it is no JSON once any byte is cut off.
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
        (temporary / MANIFEST).write_text(manifest, encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)
            _sync(path)
        sync_directory(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a crash never leaves half of it under its name."""
    aside = _aside(folder)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(parent: Path, name: str = "*") -> None:
    """Remove what killed writers of parent/name left; "*" stands for any name."""
    name = name if name == "*" else glob.escape(name)
    for path in parent.glob(f".{name}.partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def damage(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the folder, naming the file; None where every byte is as it was written.

    names   files to check, default: all that the manifest has
    """
    try:
        files = read_manifest(folder)
        for name in files if names is None else names:
            path, expected = folder / name, files[name]
            size = path.stat().st_size
            if size != expected["bytes"]:  # before reading it all
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"the SHA-256 of {name} is not that of {MANIFEST}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def read_manifest(folder: Path) -> dict[str, dict]:
    """{file: {"bytes": ..., "sha256": ...}}; raises what reading and parsing raise."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder / MANIFEST} has format {manifest['format']!r}, not {FORMAT}")
    return manifest["files"]


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
