"""Checkpoints side by side: the same documents, the same disturbances, each other's decisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tqdm.auto import tqdm

from analysis.adapters import Adapter, check_documents, num_batches, owned
from analysis.measure.calibrate import calibrate, calibration_documents
from analysis.measure.comparison import Comparison, drifts_of
from analysis.measure.results import join
from analysis.measure.shard import measure
from analysis.measure.sweep import Asked, conditions_of, several_models
from analysis.perturb import Condition, GateSwap, Perturbation, Replay, Trace, map_inner, parts_of
from cartmoe.data import Sequences


def compare(
    models: Mapping[str, object],
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
    progress: bool = True,
) -> Comparison:
    """Measure checkpoints on the same documents under the same conditions, the same noise included.

    models          by name, the reference first: models under study, `LanguageModel`s, or paths
    perturbations   as in `sweep`; Replay("base") and GateSwap("base") mean the decisions and gates
                    of the model with that name (on itself they change nothing, to the last bit)

    The other parameters are those of `sweep`. Recorded decisions lie in a temporary directory
    meanwhile. Raises `ValueError` for fewer than two models, a dense one, tokens of different
    tokenizers, an unknown name, and sites where decisions of another model do not fit.
    """
    under_study = _named(models)
    check_documents(docs, *under_study.values())
    calibration = calibration_documents(calibration, docs, *under_study.values())
    conditions = conditions_of(perturbations, where, point, seed, controls)
    imposed = {name for c in conditions for name in _sources(c.perturbation, under_study)}
    _check_sites(conditions, under_study)
    options: dict[str, Any] = dict(batch_size=batch_size, progress=progress)
    with owned(*under_study.values()), TemporaryDirectory(prefix="routing-") as folder:
        traces = {
            name: Trace.record(model, docs, Path(folder) / name, **options)
            for name, model in under_study.items()
            if (Replay, name) in imposed
        }
        ready = [_with_parts(c, partial(_resolved, under_study, traces)) for c in conditions]
        # What tables call them may not depend on where the traces are, or ids would differ.
        shown = {c: _with_parts(c, partial(_named_after, traces)) for c in ready}
        total = num_batches(docs, batch_size) * len(ready) * len(under_study)
        measured = []
        with tqdm(total=total, unit="batch", disable=not progress) as bar:
            for name, model in under_study.items():
                bar.set_description(name)
                stats = calibrate(model, calibration)
                options = dict(batch_size=batch_size, calibration=stats, keep_tokens=tokens)
                cells = measure(model, ready, docs, **options, progress=bar.update)
                cells = [c._replace(condition=shown.get(c.condition, c.condition)) for c in cells]
                measured.append((model, cells))
        drifts, numbers = drifts_of(under_study, docs, batch_size)
    return Comparison(replace(join(measured), unit=docs.unit), tuple(under_study), drifts, numbers)


def _named(models: Mapping[str, object]) -> dict[str, Adapter]:
    if not isinstance(models, Mapping) or len(models) < 2:
        raise ValueError(
            f"models is {models!r}; give at least two by name, such as "
            '{"base": model, "tuned": other}'
        )
    return {model.name: model for model in several_models(models)}


def _sources(p: Perturbation, models: Mapping[str, Adapter]) -> list[tuple[type, str]]:
    """The models' names in it; `ValueError` for a name that is none, and no path either."""
    found = []
    part: Any
    for part in parts_of(p):
        value = getattr(part, part.source) if part.source else None
        if isinstance(value, str) and value in models:
            found.append((type(part), value))
        elif isinstance(value, str) and part.sha256 is None:
            choices = ", ".join(map(repr, models))
            raise ValueError(
                f"{part.source} is {value!r}, which is no path of one; of the models choose one of "
                f"{choices}"
            )
    return found


def _with_parts(condition: Condition, fn: Callable[[Perturbation], Perturbation]) -> Condition:
    """With fn(part) in the place of each perturbation that is made of no other."""

    def of(p: Perturbation) -> Perturbation:
        return map_inner(p, of) if p.inner() else fn(p)

    return replace(condition, perturbation=of(condition.perturbation))


def _resolved(
    models: Mapping[str, Adapter], traces: Mapping[str, Trace], p: Perturbation
) -> Perturbation:
    """With recorded decisions and models in the place of names."""
    if isinstance(p, Replay) and p.trace in traces:
        return Replay(traces[p.trace], uncaptured=p.uncaptured)
    if isinstance(p, GateSwap) and isinstance(p.checkpoint, str) and p.checkpoint in models:
        return GateSwap(models[p.checkpoint])
    return p


def _named_after(traces: Mapping[str, Trace], p: Perturbation) -> Perturbation:
    """With the model's name in the place of its trace's directory."""
    names = {str(trace.path): name for name, trace in traces.items()}
    if not isinstance(p, Replay) or p.trace not in names:
        return p
    # Not replace(): a directory of that name may be there, with another trace.
    p = copy.copy(p)
    object.__setattr__(p, "trace", names[p.trace])
    return p


def _check_sites(conditions: Iterable[Condition], models: Mapping[str, Adapter]) -> None:
    """Raise `ValueError` where one model's decisions or gates do not fit another."""
    for condition in conditions:
        for kind, source in _sources(condition.perturbation, models):
            experts = {s.place: s.num_experts for s in models[source].sites()}
            for name, model in models.items():
                for site in filter(condition.where, model.sites()):
                    have = experts.get(site.place, 0)
                    if have != site.num_experts:
                        raise ValueError(
                            f"{kind.__name__}({source!r}) does not fit {name!r}: at {site} it has "
                            f"{site.num_experts} experts, and {source!r} has {have}"
                        )
