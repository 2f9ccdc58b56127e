"""Log likelihoods of continuations, clean and under conditions, which share the clean pass.

Shapes: B rows of a batch, L tokens of the longest, T = B * L, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.adapters import Adapter, batches, owned, owning, run
from analysis.measure import CleanPass, Intervention, prepared
from analysis.perturb import CLEAN, Calibration, Condition, models_of, token_kinds
from cartmoe.data import IGNORE, Sequences
from cartmoe.losses import rows_at_once


class Question(NamedTuple):
    """Tokens of which the last ones are to be told.

    tokens       all, without the last of them they are what the model reads
    answer       how many of them, at the end, count
    sequence_id  keys the noise: of all answers to one question it is the same
    document     of the task, for people
    """

    tokens: tuple[int, ...]
    answer: int
    sequence_id: int
    document: str


class Score(NamedTuple):
    """Nats of the answer's tokens, and whether each of them is the most probable one."""

    log_likelihood: float
    greedy: bool


def questions_as_sequences(questions: Sequence[Question], pad: int) -> Sequences:
    """A row a question, padded at its end with `pad`."""
    length = max((len(question.tokens) - 1 for question in questions), default=0)
    tokens_SL = torch.full((len(questions), length), pad)
    targets_SL = torch.full_like(tokens_SL, IGNORE)
    for row, (tokens, answer, _, _) in enumerate(questions):
        ids, last = torch.tensor(tokens), len(tokens) - 1
        tokens_SL[row, :last] = ids[:-1]
        targets_SL[row, last - answer : last] = ids[1:][last - answer :]
    return Sequences(
        tokens_SL,
        targets_SL,
        torch.tensor([question.sequence_id for question in questions], dtype=torch.int64),
        [question.document for question in questions],
        ["task"] * len(questions),
        torch.ones(len(questions), dtype=torch.int64),
    )


@owning
@torch.no_grad()
def scores(
    model: Adapter,
    questions: Sequence[Question],
    conditions: Sequence[Condition],
    calibration: Calibration,
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda rows_done: None,
) -> dict[Condition, list[Score]]:
    """Of each condition and of `CLEAN`, a score a question, in their order.

    A batch is read once without a perturbation, and under each condition from the first segment on
    in which it acts. Questions of like length are read together; neither padding nor neighbors
    change a score.
    """
    kinds_V = token_kinds(model, [condition.where for condition in conditions])
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].tokens), i))
    found: dict[Condition, list[Score]] = {c: [] for c in (CLEAN, *conditions)}
    with owned(*models_of(conditions)):
        for start in range(0, len(order), batch_size):
            some = [questions[i] for i in order[start : start + batch_size]]
            (batch,) = batches(model, questions_as_sequences(some, 0), len(some))
            clean = CleanPass.of(model, batch, kinds_V)
            found[CLEAN] += _scores(model, clean.states[-1].hidden_BLD, batch.targets_SL)
            for condition in conditions:
                hidden_BLD = _perturbed(model, clean, condition, calibration)
                found[condition] += _scores(model, hidden_BLD, batch.targets_SL)
            progress(len(some))
    back = np.argsort(order)
    return {condition: [each[i] for i in back] for condition, each in found.items()}


def _perturbed(
    model: Adapter, clean: CleanPass, condition: Condition, calibration: Calibration
) -> Tensor:
    """(B, L, D) the last hidden states under the condition."""
    intervention = Intervention(
        prepared(model, clean, condition), calibration, clean.routings, check=True
    )
    with intervention.rerunning(model, clean) as (segments, start):
        return run(segments, start).hidden_BLD


def _scores(model: Adapter, hidden_BLD: Tensor, targets_BL: Tensor) -> list[Score]:
    """A score a row: of its targets."""
    wanted_BL = targets_BL != IGNORE
    hidden_TD, targets_T = hidden_BLD[wanted_BL], targets_BL[wanted_BL]
    log_p_T = torch.empty(len(targets_T), dtype=torch.float64)
    best_T = torch.empty(len(targets_T), dtype=torch.bool)
    size = rows_at_once(hidden_TD.device, model.vocab_size)
    for rows in torch.arange(len(targets_T)).split(size):
        log_p = model.logits(hidden_TD[rows]).log_softmax(-1)
        own_T1 = targets_T[rows, None]
        log_p_T[rows] = log_p.gather(-1, own_T1)[:, 0].double().cpu()
        best_T[rows] = (log_p.argmax(-1, keepdim=True) == own_T1)[:, 0].cpu()
    counts = wanted_BL.sum(-1).tolist()
    parts = zip(log_p_T.split(counts), best_T.split(counts), strict=True)
    return [Score(float(p.sum()), bool(best.all())) for p, best in parts]
