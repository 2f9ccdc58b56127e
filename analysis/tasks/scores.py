"""Log likelihoods of continuations, clean and under conditions, which share the clean pass.

Shapes: B rows of a batch, L tokens of the longest, P positions that answers have in a batch, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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


def as_sequences(questions: Sequence[Question]) -> Sequences:
    """A row a question, padded at its end."""
    length = max((len(question.tokens) - 1 for question in questions), default=0)
    tokens_SL = torch.zeros(len(questions), length, dtype=torch.int64)
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
    calibration: Calibration | None = None,
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda questions_done: None,
) -> dict[Condition, list[Score]]:
    """Of each condition and of `CLEAN`, a score a question, in their order.

    A batch is read once without a perturbation, and under each condition from the first segment on
    in which it acts. Questions that differ in their last token alone are read as one, and those of
    like length together; neither padding nor neighbors change a score.
    """
    kinds_V = token_kinds(model, [condition.where for condition in conditions])
    found = {c: [Score(0.0, True)] * len(questions) for c in (CLEAN, *conditions)}
    with owned(*models_of(conditions)):
        for rows in _rows_together(questions, batch_size):
            asked = [[questions[i] for i in row] for row in rows]
            (batch,) = batches(model, as_sequences([row[0] for row in asked]), len(rows))
            clean = CleanPass.of(model, batch, kinds_V)
            for condition in found:
                hidden_BLD = clean.states[-1].hidden_BLD
                if condition != CLEAN:
                    hidden_BLD = _perturbed(model, clean, condition, calibration)
                given = _scores(model, hidden_BLD, asked)
                for row, own in zip(rows, given, strict=True):
                    for i, score in zip(row, own, strict=True):
                        found[condition][i] = score
            progress(sum(map(len, rows)))
    return found


def _rows_together(questions: Sequence[Question], batch_size: int) -> Iterator[list[list[int]]]:
    """Numbers of the questions that one row answers, so many rows at a time, the longest first."""
    same: dict[tuple, list[int]] = {}
    for i, question in enumerate(questions):
        read = question.tokens[:-1], question.answer, question.sequence_id
        same.setdefault(read, []).append(i)
    rows = sorted(same.values(), key=lambda row: (-len(questions[row[0]].tokens), row))
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _perturbed(
    model: Adapter, clean: CleanPass, condition: Condition, calibration: Calibration | None
) -> Tensor:
    """(B, L, D) the last hidden states under the condition."""
    intervention = Intervention(
        prepared(model, clean, condition), calibration, clean.routings, check=True
    )
    with intervention.rerunning(model, clean) as (segments, start):
        return run(segments, start).hidden_BLD


def _scores(
    model: Adapter, hidden_BLD: Tensor, asked: Sequence[Sequence[Question]]
) -> list[list[Score]]:
    """Of each row, a score for each of its questions."""
    places, asks, first = [], [], 0  # (row, position) of answers; (place, token) that are asked for
    for row, questions in enumerate(asked):
        last, answer = len(questions[0].tokens) - 1, questions[0].answer
        places += [(row, position) for position in range(last - answer, last)]
        for question in questions:
            asks += [(first + n, token) for n, token in enumerate(question.tokens[-answer:])]
        first += answer
    rows_P, positions_P = torch.tensor(places).T
    place_A, token_A = torch.tensor(asks).T
    hidden_PD = hidden_BLD[rows_P, positions_P]
    log_p_A = torch.empty(len(asks), dtype=torch.float64)
    best_A = torch.empty(len(asks), dtype=torch.bool)
    for some in torch.arange(len(places)).split(rows_at_once(hidden_PD.device, model.vocab_size)):
        log_p = model.logits(hidden_PD[some]).log_softmax(-1)
        here_A = torch.isin(place_A, some)
        place, token = place_A[here_A] - some[0], token_A[here_A]
        log_p_A[here_A] = log_p[place, token].double().cpu()
        best_A[here_A] = log_p.argmax(-1).cpu()[place] == token
    parts = [question.answer for questions in asked for question in questions]
    both = zip(log_p_A.split(parts), best_A.split(parts), strict=True)
    made = iter([Score(float(p.sum()), bool(best.all())) for p, best in both])
    return [[next(made) for _ in questions] for questions in asked]
