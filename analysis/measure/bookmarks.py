"""How far a pass over a model's segments has come, on the disk: a file a batch.

A file holds what is known of a batch behind the last segment that it went through, hidden states
above all, and is named by both. It is written in one step, before the one of the segment before is
removed. Those of another measurement lie in another folder, which says what it is of.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cartmoe.files import temporary, write_atomically

ABOUT = "about.json"  # the identity, for people and for `forget_streams`
SEGMENT = ".behind-"  # in a file's name, before the number of segments


class Marked(Protocol):
    """What goes through segments, and can be taken up where it was.

    done   how many it went through
    """

    done: int

    def begin(self) -> None:
        """Before the first segment, whatever it went through."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` takes: numbers, texts and tensors."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """As it was when it gave this state, of one that is before the first segment."""
        ...


class Bookmarks:
    """Those of one measurement, in a folder within `folder` that its identity names. device: where
    tensors are when they are read."""

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], device: torch.device | str = "cpu"
    ):
        self.identity = json.dumps({**identity, "computed": _how_computed()}, sort_keys=True)
        digest = hashlib.sha256(self.identity.encode()).hexdigest()
        self.folder, self.device = folder / digest[:16], device

    def done(self, name: str) -> int:
        """Behind how many segments it is."""
        numbers = (path.suffix.removeprefix(SEGMENT) for path in self._of(name))
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def read(self, name: str) -> dict[str, Any] | None:
        """What was written last; None, with a warning, where it cannot be read."""
        path = self._path(name, self.done(name))
        try:
            found = torch.load(path, map_location=self.device, weights_only=True)
            if _checksum(found["state"]) != found["checksum"]:
                raise ValueError("its content is not as it was written")
            return found["state"]
        except Exception as error:  # whatever torch says of a damaged file
            warnings.warn(f"{path} is damaged ({error}); it is made again", stacklevel=2)
            path.unlink(missing_ok=True)
            return None

    def write(self, name: str, done: int, state: Mapping[str, Any]) -> None:
        """Plain values and tensors, behind so many segments."""
        before, path = self._of(name), self._path(name, done)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ABOUT).exists():
            write_atomically(self.folder / ABOUT, self.identity)
        with temporary(path) as new:
            whole = _own(dict(state))
            try:
                torch.save({"state": whole, "checksum": _checksum(whole)}, new)
            except RuntimeError as error:  # which torch makes of a full disk
                raise OSError(f"{path} could not be written: {error}") from error
            new.replace(path)
        for old in before:
            old.unlink(missing_ok=True)

    def remove(self) -> None:
        """All of them: what they led to is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str, done: int) -> Path:
        return self.folder / f"{name}{SEGMENT}{done}"

    def _of(self, name: str) -> list[Path]:
        return [*self.folder.glob(f"{name}{SEGMENT}*")]


def forget_streams(folder: Path, **identity: Any) -> None:
    """Remove all measurements in the folder that have this in their identity: what they led to is
    kept elsewhere. None: it must not be there."""
    for about in folder.glob(f"*/{ABOUT}"):
        with suppress(ValueError, OSError):
            said = json.loads(about.read_text(encoding="utf-8"))
            if all(said.get(name) == value for name, value in identity.items()):
                shutil.rmtree(about.parent, ignore_errors=True)


@contextmanager
def marked(marks: Bookmarks | None, name: str, what: Marked, write: bool = True) -> Iterator[None]:
    """Within the block it is as its bookmark says; behind it that says how far it has come, and
    nothing is in memory. Without bookmarks it stays there as it is."""
    if marks is None:
        yield
        return
    if marks.done(name) > what.done and (state := marks.read(name)):
        what.restore(state)
    yield
    if write and what.done > marks.done(name):
        marks.write(name, what.done, what.state())
    what.begin()


def _how_computed() -> list[Any]:
    """What changes last bits."""
    casts = [
        str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
        for kind in ("cpu", "cuda")
    ]
    capability = torch.backends.cpu.get_cpu_capability()
    precision = torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    return [torch.__version__, threads, capability, precision, *casts, _code_sha256()]


@functools.cache
def _code_sha256() -> str:
    """Of all code that may have a part in it."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("cartmoe/**/*.py"), *root.glob("analysis/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _own(value: Any) -> Any:
    """The same without what else lies in the memory of its tensors, which would be written, too."""
    if isinstance(value, Tensor):
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    if isinstance(value, dict):
        return {key: _own(each) for key, each in value.items()}
    return [_own(each) for each in value] if isinstance(value, list | tuple) else value


def _checksum(value: Any, start: int = 0) -> int:
    """CRC-32 of all that is in it."""
    if isinstance(value, Tensor):
        flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(flat.numpy().data, start)
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    if isinstance(value, list):
        return functools.reduce(lambda crc, part: _checksum(part, crc), value, start)
    return zlib.crc32(repr(value).encode(), start)
