"""Free-running text under a perturbation: how long does it stay the clean text?

Shapes: B rows, P tokens of the prompt, N new ones, L = P + N - 1 (the last one is not read),
T = B * N, V vocabulary, M numbers, D documents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from analysis.adapters import Adapter, batches, num_batches, owned, owning, routed_adapter, run
from analysis.measure.calibrate import calibrate, calibration_documents
from analysis.measure.intervene import Intervention
from analysis.measure.rows import SequenceRows, means
from analysis.measure.sweep import Asked, conditions_of
from analysis.perturb import CLEAN, Calibration, Condition, Tokens, models_of, token_kinds
from analysis.stats import Bootstrap, label
from cartmoe.config import check_choice, check_whole
from cartmoe.data import IGNORE, Sequences

PHASES = ("prompt", "decoding", "both")


@owning
@torch.no_grad()
def generation_agreement(
    model: object,
    docs: Sequences,
    perturbations: Asked,
    *,
    prompt: int = 64,
    new: int = 64,
    phases: tuple[str, ...] = PHASES,
    where: str = "all",
    point: Literal["logits", "scores"] = "logits",
    seed: int = 0,
    calibration: Sequences | None = None,
    batch_size: int = 16,
    bootstrap: Bootstrap = Bootstrap(),
    progress: bool = True,
) -> pd.DataFrame:
    """Agreement of greedy continuations under perturbations with the clean ones.

    prompt    tokens given: the first ones of each document (of the first of its sequences in
              `docs` that has as many); documents without such a sequence are left out
    new       tokens that are then generated, each the most probable one (of equals the lowest id)
    phases    perturb the routers at the "prompt"'s positions, while "decoding", or at "both"; while
              decoding the first new token is still the clean one, so that `equal` is at least 1/new
    where, point, seed   for perturbations that are no `Condition` of their own

    A row a condition and phase: the columns that name it, phase, num_documents, prompt, new, and
    with BCa bounds over documents (NAME_low, NAME_high) and means of a document's
    equal    share of the new tokens that are the clean text's at the same position
    prefix   tokens up to the first that differs, at most `new`

    The noise of a position is the same in every forward, so a text does not depend on how it is
    computed. Raises `ValueError` for a dense model, conditions with positions of their own, unknown
    phases, numbers below 1, and where no sequence has `prompt` tokens.
    """
    model = routed_adapter(model)
    prompt = check_whole("prompt", prompt, 1)
    new = check_whole("new", new, 1)
    phases = (phases,) if isinstance(phases, str) else tuple(phases)
    for phase in phases:
        check_choice("phases", phase, PHASES)
    conditions = conditions_of(perturbations, where, point, seed)
    for c in conditions:
        if c.where.positions:
            raise ValueError(f"where is '{c.where}'; here the phases say at which positions")
        if c.downstream != "reroute":
            raise ValueError(f"downstream is {c.downstream!r}; generated text can only 'reroute'")
        c.perturbation.check(model.sites())
    if not conditions or not phases:
        raise ValueError(f"nothing is asked for: {len(conditions)} conditions, phases {phases}")
    arms = [(c, phase, _in_phase(c, phase, prompt)) for c in conditions for phase in phases]
    prompts = _prompts(docs, prompt)
    stats = calibrate(model, calibration_documents(calibration, docs, model))
    kinds_V = token_kinds(model, [c.where for c in conditions])
    rows = SequenceRows()
    total = num_batches(prompts, batch_size) * len(arms)
    bar = tqdm(total=total, unit="text batch", disable=not progress)
    with owned(*models_of(conditions)), bar:
        for batch in batches(model, prompts, batch_size):
            decoder = Decoder(model, batch, prompt, new, stats, kinds_V)
            clean_BN = decoder.text(CLEAN, batch.targets_SL[:, prompt - 1 :])
            for number, (_, _, condition) in enumerate(arms):
                equal_BN = decoder.text(condition, clean_BN) == clean_BN
                equal_B = equal_BN.double().mean(-1).cpu().numpy()
                prefix_B = equal_BN.long().cumprod(-1).sum(-1).cpu().numpy()
                rows.append(batch, arm=number, num_tokens=1, equal=equal_B, prefix=prefix_B)
                bar.update()
    table = pd.DataFrame([c.columns() | {"phase": phase} for c, phase, _ in arms])
    table = table.drop(columns=["condition", "expects"])
    table.insert(0, "label", label(table))
    table = table.assign(num_documents=len(prompts), prompt=prompt, new=new)
    found = means(rows.frame(), ["arm"], bootstrap)  # of documents, each once
    return table.join(found.drop(columns=["arm", "num_documents", "num_tokens"]))


def _in_phase(condition: Condition, phase: str, prompt: int) -> Condition:
    """At the positions of that phase alone."""
    positions = {"prompt": (0, prompt), "decoding": (prompt, None), "both": None}[phase]
    return replace(condition, where=replace(condition.where, positions=positions))


def _prompts(docs: Sequences, prompt: int) -> Sequences:
    """The first sequence of each document that has so many tokens."""
    long_S = ((docs.targets_SL != IGNORE).sum(-1) >= prompt).tolist()
    first: dict[str, int] = {}
    for row, document in enumerate(docs.document_id):
        if long_S[row]:
            first.setdefault(document, row)
    if not first:
        longest = int((docs.targets_SL != IGNORE).sum(-1).max()) if len(docs) else 0
        raise ValueError(
            f"prompt is {prompt}; no sequence has so many tokens (the longest has {longest})"
        )
    return docs.take(list(first.values()))


class Decoder:
    """Greedy continuations of one batch of prompts.

    A text is guessed, and one forward over prompt and guess says what each next token would have
    been. By causality these are right up to the first wrong guess, and right there; the rest is the
    next guess. So each forward settles at least one token of every row, and all those that were
    guessed right: where the perturbed text is the clean one, a single forward does. Every forward
    has the same shape, so that the clean and the perturbed texts are rounded alike.
    """

    def __init__(
        self,
        model: Adapter,
        batch: Sequences,
        prompt: int,
        new: int,
        stats: Calibration,
        kinds_V: Tensor | None = None,
    ):
        self.model, self.stats, self.new, self.kinds_V = model, stats, new, kinds_V
        self.prompt_BP, self.ids_B = batch.tokens_SL[:, :prompt], batch.sequence_id_S
        self.draws: dict = {}  # of positions and sequences that every text has

    def text(self, condition: Condition, guess_BN: Tensor) -> Tensor:
        """(B, new) ids under the condition. The guess may be of any length, and
        have negative ids for none."""
        B = len(self.prompt_BP)
        text_BN = self.prompt_BP.new_zeros(B, self.new)
        width = min(self.new, guess_BN.shape[1])
        text_BN[:, :width] = guess_BN[:, :width].clamp(min=0)
        number_N = torch.arange(self.new, device=text_BN.device)
        settled_B1 = text_BN.new_zeros(B, 1)
        while (settled_B1 < self.new).any():
            next_BN = self._next(condition, torch.cat([self.prompt_BP, text_BN[:, :-1]], 1))
            right_BN = (next_BN == text_BN) | (number_N < settled_B1)
            settled_now_B1 = right_BN.long().cumprod(-1).sum(-1, keepdim=True) + 1
            # Settled tokens stay, so that rounding cannot take them back.
            text_BN = torch.where(number_N < settled_B1, text_BN, next_BN)
            settled_B1 = settled_now_B1.clamp(max=self.new)
        return text_BN

    def _next(self, condition: Condition, tokens_BL: Tensor) -> Tensor:
        """(B, new) the most probable token after the prompt and after each new one but the last."""
        segments = self.model.segments()
        if condition == CLEAN:
            state = run(segments, tokens_BL)
        else:
            intervention = Intervention(condition, self.stats, check=True)
            intervention.begin(Tokens.of(tokens_BL, self.ids_B, self.kinds_V), self.draws)
            with intervention.attached(self.model):
                state = run(segments, tokens_BL)
        start = self.prompt_BP.shape[1] - 1
        hidden_TD = state.hidden_BLD[:, start:].flatten(0, 1)
        return self.model.logits(hidden_TD).argmax(-1).view(-1, self.new)  # of equals the first
