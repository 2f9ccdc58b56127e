"""[[models]] of a study: those that are there, and a place for one that its user brings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis.adapters import is_pretrained, published_config
from analysis.study.reading import TableReader
from analysis.study.specs import ModelSpec
from cartmoe.checkpoint import located
from cartmoe.shipped import named_by

GIVEN = {"path": "checkpoint or run", "hf": "model"}  # of [[models]], and what directory each is
OTHERS = ("name", "train_seed", "stream")
PUBLISHED = "published"  # in their place: what the config.json of the model to be brought says
TYPE = "model_type"
BROUGHT = "model"  # what users call the directory that they bring


def given_models(
    reader: TableReader, study: Mapping, brought: str | Path | None
) -> Iterator[ModelSpec]:
    """Each with path or hf, or several, and, to tell them apart, name and train_seed; and the one
    with `published`, in the directory that was brought, if one was."""
    places = 0
    for where, table in reader.tables("models", study):
        known = reader.known(f"{where}.", table, (*GIVEN, *OTHERS, PUBLISHED))
        kinds = [kind for kind in (*GIVEN, PUBLISHED) if kind in known]
        if len(kinds) != 1:
            reader.mistakes.append(f"{where}: give one of {', '.join((*GIVEN, PUBLISHED))}")
            continue
        (kind,) = kinds
        if kind == "path" and "stream" in known:
            reader.mistakes.append(f"{where}.stream: it is for models of the transformers library")
        if kind == PUBLISHED:
            places += 1
            yield from _brought(reader, where, known, brought)
            continue
        for text in reader.items(f"{where}.{kind}", known.pop(kind)):
            path = _place(reader, f"{where}.{kind}", kind, text)
            if path:
                own = named_by(path) or {"name": path.resolve().name}
                given = own | {kind: str(path)} | known
                yield from filter(None, [reader.attempt(where, ModelSpec, **given)])
    if places > 1:
        reader.mistakes.append(f"models: {places} are {PUBLISHED}; a user brings one")
    if brought is not None and not places:
        reader.mistakes.append(f"model: {str(brought)!r} was given, and the study has no place "
                               f"for it, [[models]] with {PUBLISHED}")  # fmt: skip


def _brought(
    reader: TableReader, where: str, known: dict[str, Any], brought: str | Path | None
) -> Iterator[ModelSpec]:
    published = dict(reader.table(f"{where}.{PUBLISHED}", known[PUBLISHED]))
    known = known | {PUBLISHED: published}
    if not isinstance(published.get(TYPE), str):
        reader.mistakes.append(f"{where}.{PUBLISHED}: give at least {TYPE}")
        return
    if brought is not None:
        path = _place(reader, BROUGHT, "hf", str(brought))
        if path is None:
            return
        have = reader.attempt(BROUGHT, published_config, path) or {}
        if have.get(TYPE) != published[TYPE]:
            reader.mistakes.append(
                f"model: {str(brought)!r} holds a model of type {have.get(TYPE)!r}; the study is "
                f"for one of type {published[TYPE]!r}"
            )
            return
        other = {k: v for k, v in published.items() if isinstance(v, int) and k in have}
        other = {k: v for k, v in other.items() if have[k] != v}
        if other:  # of another size, or with more tokens
            said = ", ".join(f"{k} {have[k]} in place of {v}" for k, v in other.items())
            text = f"{brought} is called {known.get('name')!r} in tables, and has {said}"
            warnings.warn(text, stacklevel=2)
        known |= {"hf": str(path)}
    yield from filter(None, [reader.attempt(where, ModelSpec, **known)])


def _place(reader: TableReader, where: str, kind: str, text: Any) -> Path | None:
    """Where such a model is; None with the mistake noted."""
    is_text = text and isinstance(text, str)
    path = reader.attempt(where, located, text) if is_text else None
    if path is None or not path.is_dir():
        fetched = "; nothing is fetched from a hub" if kind == "hf" else ""
        reader.mistakes.append(f"{where}: {text!r} is no {GIVEN[kind]} directory{fetched}")
        return None
    if is_pretrained(path) != (kind == "hf"):
        is_one = "holds no" if kind == "hf" else "holds a"
        other = "path" if kind == "hf" else "hf"
        instead = "" if where == BROUGHT else f"; write {other} = ..."
        said = f"{where}: {text!r} {is_one} model of the transformers library{instead}"
        reader.mistakes.append(said)
        return None
    return path
