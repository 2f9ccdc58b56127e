"""Tasks of lm-eval under perturbations of routing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from analysis.adapters import Adapter, owned
from analysis.measure import Asked, calibrate, conditions_of, key_columns, models_in
from analysis.perturb import CLEAN, Calibration, Condition, sites_of
from analysis.tasks.continuations import Prompt, continuations
from analysis.tasks.results import TaskResults
from analysis.tasks.samples import sample_table
from analysis.tasks.scores import Question, questions_as_sequences, scores
from cartmoe.config import check_whole
from cartmoe.data import Sequences

CALIBRATION = 32  # questions that a model is calibrated on unless documents are given
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
    calibration   documents that RandomRouting draws from; by default the first questions

    Every question is asked once; all conditions share its clean pass. The noise of a token depends
    on its document and position alone, so the answers to a question are compared under the same
    one, whatever the batch size. Greedy generation alone is compared.

    Raises `ImportError` without lm-eval, `ValueError` for tasks that there are not, and as `sweep`.
    """
    try:
        from analysis.tasks.harness import Asking, Tasks  # lm-eval takes seconds to import
    except ImportError as error:
        raise ImportError('tasks need pip install "cartmoe[eval]"') from error

    batch_size = check_whole("batch_size", batch_size, 1)
    conditions = conditions_of(perturbations, where, point, seed)
    models = models_in(model)
    names = [tasks] if isinstance(tasks, str) else [*tasks]
    most = None if limit is None else check_whole("limit", limit, 1)
    asked = Tasks(names, include_path, num_fewshot=num_fewshot, limit=most)
    tables = []
    for one in models:
        if one.tokenizer is None:
            raise ValueError(f"{one.name} has no tokenizer; tasks are texts")
        for condition in conditions:
            condition.perturbation.check(sites_of(one, condition.where, tokens=True))
        with owned(one), tqdm(unit="question", disable=not progress) as bar:
            answerer = Answerer(one, conditions, calibration, batch_size, bar)
            asking = Asking(one, answerer, max_length or context_length(one))
            for condition in (CLEAN, *conditions):
                asking.condition = condition
                table = sample_table(asked.samples(asking))
                named = key_columns(one.name, one.family, one.train_seed, condition)
                tables.append(pd.DataFrame([named] * len(table)).join(table))
    return TaskResults(pd.concat(tables, ignore_index=True))


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
        self.stats: Calibration | None = None

    def __call__(self, questions: Sequence[Question | Prompt]) -> dict[Condition, list[Any]]:
        if self.stats is None:
            docs = self.documents
            self.stats = calibrate(self.model, as_documents(questions) if docs is None else docs)
        self.bar.total = (self.bar.total or 0) + len(questions)
        compute: Any = continuations if isinstance(questions[0], Prompt) else scores
        how = dict(batch_size=self.batch_size, progress=self.bar.update)
        return compute(self.model, questions, self.conditions, self.stats, **how)


def as_documents(questions: Sequence[Question | Prompt]) -> Sequences:
    """The first questions, every token of which counts."""
    whole = [
        Question(q.tokens, len(q.tokens) - 1, q.sequence_id, q.document)
        for q in questions[:CALIBRATION]
    ]
    return questions_as_sequences(whole, 0)


def context_length(model: Adapter) -> int:
    """Tokens that it was made for: of its configuration, or of its training."""
    config = getattr(model.module, "config", None)
    known = getattr(config, "max_position_embeddings", None)
    trained = getattr(model, "trained_on", {}).get("train", {}).get("length")
    return known or trained or LONGEST


def files_sha256(folder: Path) -> str:
    """Of all that lies in a directory with tasks, beside the version of lm-eval. Raises
    `FileNotFoundError` where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"include_path is {str(folder)!r}, which is no directory")
    digest = hashlib.sha256(version("lm_eval").encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
