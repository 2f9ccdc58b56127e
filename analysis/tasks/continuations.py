"""Greedy continuations of prompts, clean and under conditions.

Shapes: B rows of a batch, P tokens of a prompt, N new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from analysis.adapters import Adapter, batches, owned, owning
from analysis.measure import Decoder
from analysis.perturb import CLEAN, Calibration, Condition, models_of, token_kinds
from analysis.tasks.scores import Question, as_sequences
from analysis.tasks.words import Words

FIRST = 16  # new tokens after which one looks whether a text has ended; then four times as many


class Prompt(NamedTuple):
    """A text that is to go on.

    tokens        of it
    new           tokens at most
    until         texts that end it, and do not belong to it
    sequence_id, document   see `Question`
    """

    tokens: tuple[int, ...]
    new: int
    until: tuple[str, ...]
    sequence_id: int
    document: str


@owning
@torch.no_grad()
def continuations(
    model: Adapter,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    calibration: Calibration,
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda rows_done: None,
) -> dict[Condition, list[str]]:
    """Of each condition and of `CLEAN`, a text a prompt, in their order.

    Prompts of one length are read together, so that there is no padding. The clean text is the
    first guess of the others (see `Decoder`).
    """
    kinds_V, words = token_kinds(model, [c.where for c in conditions]), Words(model)
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((len(prompt.tokens), prompt.new, prompt.until), []).append(i)
    found = {c: [""] * len(prompts) for c in (CLEAN, *conditions)}
    with owned(*models_of(conditions)):
        for (length, new, until), rows in groups.items():
            for start in range(0, len(rows), batch_size):
                some = rows[start : start + batch_size]
                asked = [
                    Question((*p.tokens, 0), 1, p.sequence_id, p.document)
                    for p in (prompts[i] for i in some)
                ]
                (batch,) = batches(model, as_sequences(asked), len(some))
                guess_BN = torch.zeros(len(some), 0, dtype=torch.int64, device=model.device)
                for condition in (CLEAN, *conditions):
                    ids_BN, size = guess_BN, min(FIRST, new)
                    while True:
                        decoder = Decoder(model, batch, length, size, calibration, kinds_V)
                        ids_BN = decoder.text(condition, ids_BN)
                        texts = [_text(words, ids, until) for ids in ids_BN.tolist()]
                        if size == new or all(ended for _, ended in texts):
                            break
                        size = min(4 * size, new)
                    if condition == CLEAN:
                        guess_BN = ids_BN
                    for i, (text, _) in zip(some, texts, strict=True):
                        found[condition][i] = text
                progress(len(some))
    return found


def _text(words: Words, ids: list[int], until: Sequence[str]) -> tuple[str, bool]:
    """The text up to its end, and whether it has one."""
    ends = {*words.ends, *(words.token(stop) for stop in until)}
    end = next((i for i, id in enumerate(ids) if id in ends), len(ids))
    text, ended = words.decode(ids[:end]), end < len(ids)
    for stop in until:
        if stop and stop in text:
            text, ended = text[: text.index(stop)], True
    return text, ended
