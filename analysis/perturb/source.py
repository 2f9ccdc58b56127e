"""Which code a perturbation of yours is: another code is another key of what is kept."""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

OURS = ("analysis", "cartmoe", "builtins")
STDLIB = sysconfig.get_path("stdlib")
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_sha256(of: Any) -> str | None:
    """Of a class or function of yours: of the modules that it stands in, and of all of yours that
    it uses by name, from there on: functions, classes, plain numbers and texts, arrays, modules, in
    globals, closures and attributes. In a notebook, of the cells. None where nothing is yours.

    What is reached in other ways (by `getattr`, from a file, through an object's own attributes) is
    not part of it.
    """
    walk = _Walk()
    walk.visit(of)
    return walk.digest.hexdigest() if walk.seen else None


class _Walk:
    """Everything that is reached, each once, in the order of names."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: dict[int, Any] = {}  # kept, so that no other gets its id

    def visit(self, value: Any) -> None:
        """Add it, if it says anything."""
        if isinstance(value, PLAIN):
            self.add(repr(value))
        elif isinstance(value, tuple | list | set | frozenset | dict):
            self._collection(value)
        elif isinstance(value, np.ndarray | torch.Tensor):
            array = value.detach().cpu().float().numpy() if torch.is_tensor(value) else value
            self.add(f"{array.dtype}{array.shape}", array.tobytes())
        elif isinstance(value, ModuleType):
            if _is_yours(value) and self._new(value):
                self.add(_text_of(value))
        elif isinstance(value, type):
            if _is_yours(sys.modules.get(value.__module__)) and self._new(value):
                self._class(value)
        elif isinstance(value, staticmethod | classmethod):
            self.visit(value.__func__)
        elif isinstance(value, property):
            self.visit((value.fget, value.fset))
        elif isinstance(value, MethodType):
            self.visit(value.__func__)
        elif isinstance(value, partial):
            self.visit((value.func, value.args, value.keywords))
        elif isinstance(value, FunctionType):
            self.visit(vars(value).get("__wrapped__"))  # of a decorator
            if _is_yours(sys.modules.get(value.__module__)) and self._new(value):
                self._function(value)
        else:
            self.visit(type(value))

    def add(self, *parts: str | bytes) -> None:
        """What tells one code from another."""
        for part in parts:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            self.digest.update(len(data).to_bytes(8, "big") + data)

    def _new(self, value: Any) -> bool:
        if id(value) in self.seen:
            return False
        self.seen[id(value)] = value
        return True

    def _collection(self, values: Any) -> None:
        if not self._new(values):
            return
        self.add(type(values).__name__)
        if isinstance(values, dict):
            values = [part for pair in values.items() for part in pair]
        for value in sorted(values, key=repr) if isinstance(values, set | frozenset) else values:
            self.visit(value)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__[1:]:
            self.visit(base)
        self.visit(sys.modules.get(cls.__module__))
        self.add(cls.__qualname__)
        for name, value in sorted(vars(cls).items()):
            if not name.startswith("__") or isinstance(value, FunctionType):
                self.add(name)
                self.visit(value)

    def _function(self, function: FunctionType) -> None:
        self.visit(sys.modules.get(function.__module__))
        self.add(_text_of(function) or "", *_code(function.__code__))
        self.visit((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # not bound yet
                continue
        for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
            self.add(name)
            self.visit(function.__globals__[name])


def _is_yours(module: ModuleType | None) -> bool:
    """Not of this project, of Python, or installed; a notebook is."""
    if module is None or module.__name__.partition(".")[0] in OURS:
        return False
    file = getattr(module, "__file__", None)
    if file is None:  # what Python brings has a spec
        return getattr(module, "__spec__", None) is None
    return not ({"site-packages", "dist-packages"} & {*Path(file).parts} or file.startswith(STDLIB))


def _text_of(code: Any) -> str:
    """The source; "" where Python knows none."""
    try:
        file = getattr(code, "__file__", None)
        return Path(file).read_text(encoding="utf-8") if file else inspect.getsource(code)
    except (OSError, TypeError, ValueError):
        return ""


def _code(code: CodeType) -> Iterator[bytes | str]:
    """What it does, also where there is no source."""
    yield code.co_code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif isinstance(constant, PLAIN):
            yield repr(constant)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
