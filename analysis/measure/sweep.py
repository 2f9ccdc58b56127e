"""A sweep: the short form of a study, for a notebook and one model in memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from analysis.adapters import Adapter, check_documents, load, num_batches, owned, routed_adapter
from analysis.measure.bookmarks import forget_streams
from analysis.measure.calibrate import Calibrating, calibration_documents
from analysis.measure.results import Results, join
from analysis.measure.shard import measure
from analysis.perturb import (
    Condition,
    DropChosen,
    DropTop,
    DropUnchosen,
    Identity,
    NoRouted,
    Perturbation,
    RandomRouting,
    ResidualNoise,
    Where,
    of_one_name,
)
from cartmoe.data import Sequences
from cartmoe.files import path_of
from cartmoe.folders import check_directory
from cartmoe.lock import locked

CONTROLS = (
    *(Identity(), DropChosen(1), DropUnchosen(1), RandomRouting(), NoRouted()),
    ResidualNoise(DropTop(1)),
)

Asked = Perturbation | Condition | Sequence[Perturbation | Condition]


def sweep(
    model: object,
    docs: Sequences,
    perturbations: Asked,
    *,
    where: str = "all",
    point: Literal["logits", "scores"] = "logits",
    seed: int = 0,
    controls: bool = True,
    calibration: Sequences | None = None,
    batch_size: int = 16,
    tokens: bool = False,
    streams: str | Path | None = None,
    progress: bool = True,
) -> Results:
    """Measure perturbations of models in memory on the same documents; `run` is its long form.

    model         a model under study, a `cartmoe.LanguageModel`, or several: a list, in which seeds
                  of one model keep its name, or by a name of yours; paths too
    docs          from `analysis.documents`
    where, point, seed   for perturbations that are no `Condition` of their own
    controls      also measure identity, DropChosen, DropUnchosen, RandomRouting, NoRouted, and
                  ResidualNoise as large as DropTop(1)
    calibration   documents that RandomRouting draws from; by default the first 32 of `docs`
    tokens        keep every token's loss, for quantiles and groups of tokens
    streams       of models that are larger than memory (`load(path, stream=True)`): a folder that
                  hidden states lie in between layers, in place of memory; the same call again goes
                  on behind the last layer that was done
    """
    models = several_models(model)
    check_documents(docs, *models)
    conditions = conditions_of(perturbations, where, point, seed, controls)
    calibration = calibration_documents(calibration, docs, *models)
    folder = streams_folder(streams, models)
    total = num_batches(docs, batch_size) * len(conditions) * len(models)
    measured = []
    alone = locked(folder) if folder else nullcontext()
    bars = tqdm(total=total, unit="batch", disable=not progress)
    with alone, owned(*models), bars as bar:
        for one in models:
            stats = Calibrating(one, calibration)
            options: dict[str, Any] = dict(batch_size=batch_size, calibration=stats)
            options |= dict(keep_tokens=tokens, streams=folder, progress=bar.update)
            measured.append((one, measure(one, conditions, docs, **options)))
        if folder:  # this sweep's alone, now that all models are through
            own = dict(data=docs.sha256, conditions=[condition.id for condition in conditions])
            for one in models:
                forget_streams(folder, model=one.identity, **own)
                forget_streams(folder, model=one.identity, calibration=stats.sha256, data=None)
    return replace(join(measured), unit=docs.unit)


def streams_folder(given: str | Path | None, models: Sequence[Adapter]) -> Path | None:
    """Where hidden states are kept; `ValueError` where no model is streamed, or it is no folder."""
    if given is None:
        return None
    if not any(getattr(model, "streamed", False) for model in models):
        raise ValueError(
            "streams is for models that are larger than memory: analysis.load(path, stream=True)"
        )
    folder = path_of("streams", given)
    check_directory(folder)
    return folder


def models_in(models: object) -> list[Adapter]:
    """One model, models in a list, or by names that they have here, the caller's keeping their own;
    what is a path is loaded. Raises `ValueError` for names that conditions cannot have, two of one
    name and train_seed, none, and dense models."""
    if isinstance(models, str) or not isinstance(models, Mapping | Sequence):
        return [_loaded(models)]
    if not models:
        raise ValueError("models is empty; give at least one")
    if isinstance(models, Mapping):
        found = [_renamed(name, model) for name, model in models.items()]
    else:
        found = [_loaded(model) for model in models]
        for model in found:
            _check_name(model.name)
    seen = Counter((model.name, model.train_seed) for model in found)
    for (name, seed), times in seen.items():
        if times > 1:
            raise ValueError(
                f"models has {times} of the name {name!r} and train_seed {seed}; give them names: "
                "{'one': ..., 'other': ...}"
            )
    return found


def several_models(models: object) -> list[Adapter]:
    """Models that are to read the same tokens. Raises as `models_in`, and `ValueError` for tokens
    of different tokenizers."""
    found = models_in(models)
    known = [(model.name, model.tokenizer) for model in found if model.tokenizer is not None]
    if len({tokenizer.identity for _, tokenizer in known}) > 1:
        listed = ", ".join(f"{name}: {tokenizer.name!r}" for name, tokenizer in known)
        raise ValueError(f"models read tokens of different tokenizers ({listed})")
    return found


def _loaded(model: object) -> Adapter:
    return routed_adapter(load(model) if isinstance(model, str | Path) else model)


def _renamed(name: object, model: object) -> Adapter:
    _check_name(name)
    other = copy.copy(_loaded(model))
    other.name = str(name)
    return other


def _check_name(name: object) -> None:
    """Raise `ValueError` for what conditions cannot name a model by."""
    if not isinstance(name, str) or not name or set(name) & set("/(),"):
        raise ValueError(f"models has the name {name!r}; it must be a text without / ( ) ,")


def conditions_of(
    perturbations: Asked,
    where: str = "all",
    point: Literal["logits", "scores"] = "logits",
    seed: int = 0,
    controls: bool = False,
) -> list[Condition]:
    """What was asked for as conditions, each once; `ValueError` for what tables cannot name, or
    cannot tell apart."""
    if isinstance(perturbations, Perturbation | Condition):
        perturbations = [perturbations]
    if isinstance(perturbations, str | type) or not isinstance(perturbations, Iterable):
        raise ValueError(
            f"perturbations is {perturbations!r}; give an object such as analysis.DropTop(1), or a "
            "list of them"
        )
    asked = [
        p if isinstance(p, Condition) else Condition(p, Where.parse(where), point, eval_seed=seed)
        for p in (*perturbations, *(CONTROLS if controls else ()))
    ]
    for condition in asked:
        if not isinstance(condition.perturbation, Perturbation):
            raise ValueError(
                f"perturbations has {condition.perturbation!r}, which tables cannot name; make "
                "it a frozen dataclass derived from analysis.Perturbation, or an analysis.Custom"
            )
    for name, same in of_one_name(asked).items():
        raise ValueError(f"perturbations has {len(same)} that tables call {name!r}: {same}")
    return list(dict.fromkeys(asked))
