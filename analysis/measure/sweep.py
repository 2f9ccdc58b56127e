"""A sweep: the short form of a study, for a notebook and one model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tqdm.auto import tqdm

from analysis.adapters import check_documents, num_batches, owning, routed_adapter
from analysis.measure.calibrate import calibrate
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

CONTROLS = (
    *(Identity(), DropChosen(1), DropUnchosen(1), RandomRouting(), NoRouted()),
    ResidualNoise(DropTop(1)),
)
CALIBRATION = 32  # sequences that a sweep calibrates on unless it is told others

Asked = Perturbation | Condition | Sequence[Perturbation | Condition]


@owning
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
    progress: bool = True,
) -> Results:
    """Measure perturbations of one model in memory; `run` is its long form.

    docs          from `analysis.documents`
    where, point, seed   for perturbations that are no `Condition` of their own
    controls      also measure identity, DropChosen, DropUnchosen, RandomRouting, NoRouted, and
                  ResidualNoise as large as DropTop(1)
    calibration   documents that RandomRouting draws from; by default the first 32 of `docs`
    tokens        keep every token's loss, for quantiles and groups of tokens
    """
    model = routed_adapter(model)
    check_documents(docs, model)
    conditions = conditions_of(perturbations, where, point, seed, controls)
    total = num_batches(docs, batch_size) * len(conditions)
    stats = calibrate(model, calibration or docs[:CALIBRATION])
    options: dict[str, Any] = dict(batch_size=batch_size, calibration=stats, keep_tokens=tokens)
    with tqdm(total=total, unit="batch", disable=not progress) as bar:
        cells = measure(model, conditions, docs, **options, progress=bar.update)
    return join([(model, cells)])


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
