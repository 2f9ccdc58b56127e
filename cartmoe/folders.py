"""Folders with a manifest: written whole or not at all, and checked byte by byte when read.

manifest.json   {"sha256": its own (see `cartmoe.sealed`), "format": 2, "key": what decides the
                content, "files": {name: size and SHA-256}}; a folder that is not of a cache has no
                key
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cartmoe.files import remove_leftovers, sync, temporary
from cartmoe.sealed import read_sealed, seal, unseal

MANIFEST = "manifest.json"
FORMAT = 2


def check_directory(path: Path) -> None:
    """Raise `FileExistsError` where a file is in the way of a directory at the path."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            below = "" if part == path else f" is below {part}, which"
            raise FileExistsError(f"{path}{below} is a file; name a directory")


def check_new(folder: Path) -> None:
    """Raise `FileExistsError` if there is something at the path, or a file above it."""
    check_directory(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; nothing is overwritten")


def write_folder(folder: Path, fill: Callable[[Path], None], key: Any = None) -> None:
    """Make the folder with the files that `fill(path)` writes, and its manifest.

    A crash leaves nothing under its name. Raises as `check_new`.
    """
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary(folder) as new:
        new.mkdir()
        fill(new)
        files = {path.name: fingerprint(path) for path in sorted(new.iterdir())}
        manifest = seal(_head(key) | {"files": files})
        (new / MANIFEST).write_text(manifest, encoding="utf-8")
        for path in new.iterdir():
            path.chmod(0o644)
            sync(path)
        sync(new)
        new.rename(folder)
    sync(folder.parent)


def cached_folder(cache: Path, name: str, key: Any, fill: Callable[[Path], None]) -> Path:
    """The folder of `cache` that `fill(path)` makes, found or made now.

    key   plain JSON of everything that decides the content; name is for people

    A folder that differs from its manifest is made anew, with a warning. Processes that make the
    same folder at once all succeed; the first to finish stays.
    """
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache)
    digest = hashlib.sha256(json.dumps(_head(key)).encode()).hexdigest()
    folder = cache / f"{name}-{digest[:16]}"
    if folder.exists():
        problem = damage(folder, key=key)
        if problem is None:
            return folder
        warnings.warn(f"{folder} is damaged ({problem}); it is made anew", stacklevel=3)
        with suppress(FileNotFoundError):  # another process was faster
            remove_folder(folder)
    try:
        write_folder(folder, fill, key)
    except OSError:
        if not folder.exists():
            raise
        # Another process was faster, and what it made is the same.
    return folder


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a crash never leaves half of it under its name."""
    with temporary(folder) as aside:
        folder.rename(aside)


def damage(folder: Path, names: Iterable[str] | None = None, key: Any = None) -> str | None:
    """What is wrong with the folder, naming the file; None where every byte is as it was written.

    names   files to check, default: all that the manifest has
    """
    try:
        manifest = unseal((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} cannot be read: it is not as it was written"
    files = manifest.pop("files")
    if manifest != _head(key):
        return f"{MANIFEST} is of something else, or in another format"
    wanted = files if names is None else {name: files.get(name) for name in names}
    problems = (differing(folder / name, known) for name, known in wanted.items())
    return next(filter(None, problems), None)


def fingerprint(path: Path) -> dict[str, Any]:
    """{"bytes": its size, "sha256": of its content}."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def differing(path: Path, known: Mapping[str, Any] | None) -> str | None:
    """How the file differs from its fingerprint (None: it has none), or None where it does not."""
    try:
        size = path.stat().st_size
        if known is None:
            return f"{path.name} is not of it"
        if size != known["bytes"]:  # before reading it all
            return f"{path.name} has {size} bytes instead of {known['bytes']}"
        if _sha256(path) != known["sha256"]:
            return f"the SHA-256 of {path.name} is not that of when it was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None


def read_manifest(folder: Path) -> dict[str, dict]:
    """{file: {"bytes": ..., "sha256": ...}} of a folder in which `damage` found nothing."""
    return read_sealed(folder / MANIFEST)["files"]


def _head(key: Any) -> dict[str, Any]:
    """What a manifest says besides the files."""
    return {"format": FORMAT} | ({} if key is None else {"key": key})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
