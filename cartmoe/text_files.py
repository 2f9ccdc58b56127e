"""Files of the user's as texts: which of them are read, and how those of each kind are."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cartmoe.foreign import named, read_text


def files_below(root: Path) -> dict[str, Path]:
    """By name, those that can be read, also where links to folders lead; in a fixed order. Warns of
    others that look like text, of which none is read."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    seen = {root.resolve()}
    for folder, below, names in os.walk(root, followlinks=True):
        # Not .git, .venv, .ipynb_checkpoints; nor a folder twice, of which links may make a circle.
        there = {name: Path(folder, name).resolve() for name in sorted(below) if name[0] != "."}
        below[:] = [name for name, place in there.items() if place not in seen]
        seen |= {there[name] for name in below}
        for name in names:
            path = Path(folder, name)
            if name[0] == ".":
                continue
            if suffix_of(path) and path.is_file():
                files[path.relative_to(root).as_posix()] = path
            elif path.name.lower().endswith(LIKE_TEXT):  # a link to nothing, or a pipe, too
                left_out.append(path.relative_to(root).as_posix())
    if left_out and files:
        warnings.warn(
            f"corpus {str(root)!r}: {len(left_out)} files are left out, such as "
            f"{_printed(sorted(left_out)[0])}; {', '.join(READERS)} files are read",
            stacklevel=2,
        )
    for name in files:
        check_text(f"corpus {str(root)!r} has a file whose name", name)
    return dict(sorted(files.items()))


def check_text(what: str, text: str) -> None:
    """Raise `ValueError` for a text that has no UTF-8, such as an old file name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8: {_printed(text)}; rename it") from None


def _printed(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def suffix_of(path: Path) -> str:
    """Empty where it is none that can be read."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), "")


def _text_file(name: str, path: Path) -> Iterator[tuple[str, str, str]]:
    text = read_text(path)
    folder, _, rest = name.partition("/")
    yield name, folder if rest else path.suffix[1:], text


def _json_lines(name: str, path: Path) -> Iterator[tuple[str, str, str]]:
    with path.open("rb") as file:
        yield from _parse_lines(name, path, file)


def _zst_lines(name: str, path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f'{path} needs zstandard: pip install "cartmoe[data]"') from error

    def chunks() -> Iterator[bytes]:
        # zstandard.open() would stop after the first frame, of which parallel compressors write
        # many, and take half of one for all of it.
        frame = None
        with path.open("rb") as file, named(f"{path} is not a whole zstandard file"):
            while chunk := file.read(1 << 17):
                while chunk:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(chunk)
                    chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            if frame:
                raise ValueError("it ends within a frame")

    yield from _parse_lines(name, path, _lines(chunks()))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _parse_lines(name: str, path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with named(f"{path}:{number} is not JSON"):
            record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{path}:{number} is no object with a string "text"')
        meta = record.get("meta")
        domain = meta.get("pile_set_name") if isinstance(meta, dict) else None
        if not isinstance(domain, str | None) or "\0" in (domain or ""):
            raise ValueError(
                f"{path}:{number} has the pile_set_name {domain!r}; it must be a text, without NUL"
            )
        # JSON can spell lone surrogates, which have no UTF-8.
        domain, text = (
            part.encode("utf-8", "replace").decode()
            for part in (domain or "unknown", record["text"])
        )
        yield f"{name}:{number}", domain, text


# What is not read, but somebody may think that it is.
LIKE_TEXT = (
    ".txt",
    ".md",
    ".py",
    ".jsonl",
    ".zst",
    ".gz",
    ".json",
    ".parquet",
    ".csv",
    ".bz2",
    ".xz",
)

READERS: dict[str, Callable[[str, Path], Iterator[tuple[str, str, str]]]] = {
    ".txt": _text_file,
    ".md": _text_file,
    ".py": _text_file,
    ".jsonl": _json_lines,
    ".jsonl.zst": _zst_lines,
}
