"""Tasks of lm-eval under perturbations of routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from analysis.adapters import Adapter, check_documents, owned
from analysis.measure import Asked, calibrate, conditions_of, key_columns, models_in
from analysis.perturb import CLEAN, Calibration, Condition, Replay, Worst, parts_of, sites_of
from analysis.tasks.continuations import Prompt, continuations
from analysis.tasks.results import TaskResults
from analysis.tasks.samples import sample_table
from analysis.tasks.scores import Question, as_sequences, scores
from analysis.tasks.words import Words, text_config
from cartmoe.config import check_whole
from cartmoe.data import Sequences

CALIBRATION = 32  # of a task's documents, which a model is calibrated on unless others are given
LONGEST = 2048  # tokens, of a model of which nobody says how many it was made for


def evaluate(
    model: object,
    tasks: str | Sequence[str],
    perturbations: Asked,
    *,
    include_path: str | Path | None = None,
    where: str = "all",
    point: Literal["logits", "scores"] = "logits",
    seed: int = 0,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    calibration: Sequences | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> TaskResults:
    """Answers to tasks of lm-eval, clean and under each perturbation (extra [eval]).

    model         as for `sweep`, several as well
    tasks         names of lm-eval, or of the YAML files in include_path
    where, point, seed   for perturbations that are no `Condition` of their own
    num_fewshot   examples before each question; default: as the task says
    limit         documents of each task, at most
    max_length    tokens that a model reads at once; default: what it was made for
    calibration   documents that RandomRouting draws from; by default each task's own, its first

    Every question is asked once; all conditions share its clean pass. The noise of a token depends
    on its document and position alone, so the answers to a question are compared under the same
    one, whatever the batch size. Greedy generation alone is compared.

    Raises `ImportError` without lm-eval, `ValueError` for tasks that there are not, or that cannot
    be asked so, and as `sweep`.
    """
    batch_size = check_whole("batch_size", batch_size, 1)
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None:
            check_whole(name, value, least)
    conditions = conditions_of(perturbations, where, point, seed)
    models = models_in(model)
    asked = _task_set(tasks, include_path, num_fewshot, limit)
    from analysis.tasks.harness import Asking  # which is there, then

    _check(models, conditions, any(map(asked.writes, asked.tasks)), calibration)
    metrics = {name: asked.aggregations(name) for name in asked.tasks}
    tables = []
    for one in models:
        with owned(one), tqdm(unit="question", disable=not progress) as bar:
            answerer = Answerer(one, conditions, calibration, batch_size, bar)
            longest = check_whole("max_length", max_length or context_length(one), 1)
            asking = Asking(Words(one), answerer, longest)
            for condition in (CLEAN, *conditions):
                asking.condition = condition
                table = sample_table(asked.samples(asking), metrics)
                named = key_columns(one.name, one.family, one.train_seed, condition)
                tables.append(pd.DataFrame([named] * len(table)).join(table))
    return TaskResults(pd.concat(tables, ignore_index=True), asked.groups)


def _check(
    models: Sequence[Adapter],
    conditions: Sequence[Condition],
    writes: bool,
    calibration: Sequences | None,
) -> None:
    """Raise `ValueError` for what cannot be asked of one of these models, before any is asked."""
    if not conditions:
        raise ValueError("perturbations is empty; name at least one")
    for one in models:
        if one.tokenizer is None:
            raise ValueError(f"{one.name} has no tokenizer; tasks are texts")
        for condition in conditions:
            condition.perturbation.check(sites_of(one, condition.where, tokens=True))
    for condition in conditions:
        kinds = [type(part) for part in parts_of(condition.perturbation)]
        if Worst in kinds:
            raise ValueError(
                f"perturbations has {condition.perturbation.label}, which is searched for one "
                "answer; those to a question would not be compared under the same flips"
            )
        if writes and (condition.downstream != "reroute" or Replay in kinds):
            raise ValueError(
                f"perturbations has {condition.perturbation.label} with recorded decisions; a text "
                "that is written has none"
            )
    if calibration is not None:
        check_documents(calibration, *models, name="calibration")


class Answerer:
    """Answers questions, and continues prompts, under every condition at once."""

    def __init__(
        self,
        model: Adapter,
        conditions: Sequence[Condition],
        calibration: Sequences | None,
        batch_size: int,
        bar: tqdm,
    ):
        self.model, self.conditions, self.bar = model, conditions, bar
        self.documents, self.batch_size = calibration, batch_size
        self.stats: dict[str, Calibration] = {}

    def __call__(
        self, task: str, questions: Sequence[Question] | Sequence[Prompt]
    ) -> dict[Condition, list[Any]]:
        if task not in self.stats:
            docs = as_documents(questions) if self.documents is None else self.documents
            self.stats[task] = calibrate(self.model, docs)
        self.bar.total = (self.bar.total or 0) + len(questions)
        compute: Any = continuations if isinstance(questions[0], Prompt) else scores
        how = dict(batch_size=self.batch_size, progress=self.bar.update)
        return compute(self.model, questions, self.conditions, self.stats[task], **how)


def as_documents(questions: Sequence[Question] | Sequence[Prompt]) -> Sequences:
    """The first documents, of each the longest question, every token of which counts."""
    longest: dict[str, Any] = {}
    for question in questions:
        known = longest.setdefault(question.document, question)
        if len(question.tokens) > len(known.tokens):
            longest[question.document] = question
    first = [*longest.values()][:CALIBRATION]
    return as_sequences(
        [Question((0, *q.tokens), len(q.tokens), q.sequence_id, q.document) for q in first]
    )


def context_length(model: Adapter) -> int:
    """Tokens that it was made for: of its configuration, or of its training."""
    known = getattr(text_config(model.module), "max_position_embeddings", None)
    trained = getattr(model, "trained_on", {}).get("train", {}).get("length")
    return known or trained or LONGEST


def tasks_sha256(
    tasks: str | Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> str:
    """Of all that they ask, however they are named, and of lm-eval's version. Raises as `evaluate`
    does of them."""
    return _task_set(tasks, include_path, num_fewshot, limit).sha256


def _task_set(tasks: str | Sequence[str], *how: Any) -> Any:
    try:
        from analysis.tasks.loaded import TaskSet  # lm-eval takes seconds to import
    except ImportError as error:
        raise ImportError('tasks need pip install "cartmoe[eval]"') from error
    return TaskSet([tasks] if isinstance(tasks, str) else [*tasks], *how)
