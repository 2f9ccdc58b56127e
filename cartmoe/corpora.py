"""Where documents come from: built-in corpora by name, the user's own files by path.

A corpus is a function that returns a `Source`: a fingerprint of everything that decides the
documents, quick to compute, and the documents themselves, read when they are iterated over.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard

from tqdm.auto import tqdm

from cartmoe.factorial import Factorial
from cartmoe.files import path_of
from cartmoe.text_files import READERS, files_below, suffix_of


class Document(NamedTuple):
    """One text. Documents of one group are never split between training and validation."""

    id: str
    group: str
    domain: str
    text: str


class Source(NamedTuple):
    """A corpus about to be read. fingerprint is the SHA-256 of all that decides the documents."""

    name: str
    fingerprint: str
    documents: Iterator[Document]


def open_source(corpus: str | Path) -> Source:
    """The source of a built-in corpus (a key of `CORPORA`), or of a file or folder.

    Options of a built-in corpus stand behind a colon: "factorial:topic=0.4,pair=0.1", of which
    `cartmoe.factorial.Factorial` tells all.

    Raises `FileNotFoundError` for what is neither, `ValueError` for options that a corpus does not
    have, a folder without files that can be read or a file of an unknown kind. Iterating over the
    documents raises `ValueError` for a file that is not UTF-8, a malformed line, and a corpus
    without any text.
    """
    if is_built_in(corpus):
        name, *options = str(corpus).split(":", 1)
        source = CORPORA[name](*options)
    else:
        source = _user_files(path_of("corpus", corpus))
    return source._replace(documents=_with_text(source))


def in_memory(texts: Mapping[str, str]) -> Source:
    """Texts by name, a document each, in one domain. Raises `ValueError` for what is no text."""
    if not texts:
        raise ValueError("corpus is empty; give at least one text by its name")
    for name, text in texts.items():
        if not (isinstance(name, str) and isinstance(text, str)):
            kinds = f"a {type(name).__name__} and a {type(text).__name__}"
            raise ValueError(f"corpus has {kinds} where it must have a name and its text")
    documents = (Document(name, _of_content(text), "text", text) for name, text in texts.items())
    digest = hashlib.sha256(json.dumps(dict(texts)).encode()).hexdigest()
    source = Source("texts given", digest, documents)
    return source._replace(documents=_with_text(source))


def _of_content(text: str) -> str:
    """The group of a text: adding others or reordering them moves it nowhere."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_built_in(corpus: object) -> TypeGuard[str]:
    """Whether it is the name of a built-in corpus, with options or without; a path never is."""
    return isinstance(corpus, str) and corpus.partition(":")[0] in CORPORA


def unit_of(corpus: object) -> str:
    """What its groups are, which statistics draw again: files of a package are not independent."""
    return "packages" if corpus == "stdlib" else "documents"


def check_options(corpus: str) -> None:
    """Raise `ValueError` for a built-in corpus with options that it does not have. Reads nothing,
    and knows nothing of paths."""
    if ":" in corpus and is_built_in(corpus):
        open_source(corpus)


def check_source(corpus: str | Path) -> None:
    """Raise as `open_source` where there is nothing to read. Opens no file."""
    if is_built_in(corpus):
        check_options(str(corpus))
    else:
        _files_at(path_of("corpus", corpus))


def read_corpus(corpus: str | Path) -> Iterator[Document]:
    """Documents of a built-in corpus or of the user's files, in a fixed order, none empty.

    A folder is read recursively: .txt, .md and .py files are a document each, whose domain is the
    first sub-folder or else the suffix; .jsonl and .jsonl.zst files hold a document a line in the
    Pile's form, {"text": ..., "meta": {"pile_set_name": domain}}. Errors as `open_source`.
    """
    return open_source(corpus).documents


def _with_text(source: Source) -> Iterator[Document]:
    empty = True
    for document in source.documents:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise ValueError(f"corpus {source.name!r} is empty: none of its files has any text")


def _fingerprint(files: dict[str, Path], *more: str) -> str:
    """SHA-256 of names and contents."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for name, path in files.items():
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


# The running Python's own standard library ---------------------------------------------------


def _stdlib(options: str = "") -> Source:
    """Four domains: "code" (without docstrings), "docstrings", "tests", "reference" (pydoc topics).

    The group is the top-level module, which its tests share; a topic is a group of its own.
    """
    if options:
        raise ValueError(f"corpus is {'stdlib:' + options!r}; 'stdlib' has no options")
    root = Path(sysconfig.get_path("stdlib"))
    own = [p for p in root.iterdir() if p.name not in ("site-packages", "dist-packages")]
    paths = sorted(p for top in own for p in ([top, *top.rglob("*.py")]) if p.suffix == ".py")
    files = {path.relative_to(root).as_posix(): path for path in paths}
    fingerprint = _fingerprint(files, "stdlib", platform.python_version())
    return Source("stdlib", fingerprint, _stdlib_documents(files))


def _stdlib_documents(files: dict[str, Path]) -> Iterator[Document]:
    modules = {_module(name) for name in files}
    for name, path in tqdm(files.items(), desc="reading", delay=1):
        if name == "pydoc_data/topics.py":
            yield from _reference()
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (SyntaxError, UnicodeDecodeError):  # the tests of Python's own decoding
            continue
        if {"test", "tests", "idle_test"} & set(name.split("/")[:-1]):
            yield Document(f"tests/{name}", _tested_module(name, modules), "tests", source)
            continue
        code, docstrings = _split_docstrings(source)
        yield Document(f"code/{name}", _module(name), "code", code)
        yield Document(f"docstrings/{name}", _module(name), "docstrings", docstrings)


def _module(name: str) -> str:
    # Without underscores, so that _strptime meets its tests, test_strptime.
    return name.split("/")[0].removesuffix(".py").strip("_")


def _tested_module(name: str, modules: set[str]) -> str:
    """json for test/test_json/..., multiprocessing for test/test_multiprocessing_fork.py."""
    top, second = name.split("/")[:2]
    if top != "test":
        return _module(name)
    subject = second.removesuffix(".py").removeprefix("test_")
    words = subject.split("_")
    prefixes = ("_".join(words[:n]) for n in range(len(words), 0, -1))
    return next((prefix for prefix in prefixes if prefix in modules), f"test.{subject}")


def _split_docstrings(source: str) -> tuple[str, str]:
    """The code without docstrings, and the docstrings: no text stands in two domains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's sources
        tree = ast.parse(source)
    # Lines as the parser counts them: str.splitlines() would also split at form feeds.
    lines, docstrings = io.StringIO(source).readlines(), []
    for node in _documented(tree):
        text = node.body[0]
        first, last = text.lineno - 1, text.end_lineno or text.lineno
        lines[first:last] = [""] * (last - first)
        docstrings.append(ast.get_docstring(node) or "")
    return "".join(lines), "\n\n".join(docstrings)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: ast.AST) -> Iterator[Documented]:
    """Modules, classes and functions with a docstring, in order of their lines."""
    if isinstance(node, Documented) and ast.get_docstring(node, clean=False):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):  # no expressions
            yield from _documented(child)


def _reference() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"reference/{name}", f"reference.{name}", "reference", text)


# Text of a known law -------------------------------------------------------------------------


def _factorial(options: str = "") -> Source:
    """Domains "topic0 style0", ...; every document is a group of its own."""
    corpus = Factorial.parse(options)
    return Source("factorial", corpus.fingerprint, _factorial_documents(corpus))


def _factorial_documents(corpus: Factorial) -> Iterator[Document]:
    for number, (domain, text) in enumerate(corpus.texts()):
        yield Document(f"{domain}/{number}", f"{domain}/{number}", domain, text)


# The user's files ----------------------------------------------------------------------------


def _user_files(root: Path) -> Source:
    files = _files_at(root)
    return Source(root.resolve().name, _fingerprint(files), _user_documents(files))


def _files_at(root: Path) -> dict[str, Path]:
    """By name, those that can be read."""
    if root.is_dir():
        files = files_below(root)
    elif root.is_file():
        files = {root.name: root} if suffix_of(root) else {}
    else:
        raise FileNotFoundError(
            f"corpus is {str(root)!r}, which is no file or folder; give a path or one of the "
            f"built-in corpora: {', '.join(map(repr, CORPORA))}"
        )
    if not files:
        raise ValueError(f"corpus {str(root)!r} has no {', '.join(READERS)} file")
    return files


def _user_documents(files: dict[str, Path]) -> Iterator[Document]:
    for name, path in tqdm(files.items(), desc="reading", delay=1):
        for id, domain, text in READERS[suffix_of(path)](name, path):
            yield Document(id, _of_content(text), domain, text)


# Each is called with the options behind its name, a text, or without any.
CORPORA: dict[str, Callable[..., Source]] = {"stdlib": _stdlib, "factorial": _factorial}
