"""A model as lm-eval asks it: the questions of its tasks, answered under one condition after the
other from one pass over them.

lm-eval makes prompts of documents and metrics of answers; this alone stands between. Its caches are
not used: they know a question by its words, not the model or condition that answered it.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from analysis.adapters import Adapter
from analysis.perturb import CLEAN, Condition
from analysis.tasks.continuations import Prompt
from analysis.tasks.scores import Question, Score
from cartmoe.tokenizers import JsonTokenizer

Answers = dict[Condition, list[Any]]
NEW = 256  # tokens of a text that goes on, where a task does not say


class Asking(TemplateLM):
    """Answers questions under `condition`, which is set before each run of the tasks.

    answer     (questions, or prompts) -> an answer each, under every condition
    max_length tokens that the model reads at once; what is longer loses its beginning
    """

    def __init__(self, model: Adapter, answer: Callable[[Sequence[Any]], Answers], max_length: int):
        super().__init__()
        self.model, self.answer, self.max_length = model, answer, max_length
        self.condition, self.start = CLEAN, start_of(model.tokenizer)
        self.known: dict[tuple, Answers] = {}

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        start = [] if add_special_tokens is False else self.start
        return [*start, *self.model.tokenizer.encode(string).tolist()]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise TypeError("questions of tasks come with their documents")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        questions = []
        for request in requests:
            context, continuation = request.args
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                before, after = [self.prefix_token_id], self.tok_encode(continuation, False)
            questions.append(self._question(request, before, after))
        return [tuple(score) for score in self._answers(questions)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        questions, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], False),  # what starts it is the prefix
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for number, window in enumerate(windows):
                before, after = make_disjoint_window(window)
                questions.append(self._question(request, before, after, number))
                owners.append(owner)
        sums = [0.0] * len(requests)
        found: list[Score] = self._answers(questions)
        for owner, score in zip(owners, found, strict=True):
            sums[owner] += score.log_likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = []
        for request in requests:
            context, wanted = request.args[0], dict(request.args[1])
            if wanted.get("do_sample") or wanted.get("temperature"):
                raise ValueError(
                    f"task {request.task_name} samples its texts ({wanted}); only greedy ones can "
                    "be compared"
                )
            new = int(wanted.get("max_gen_toks", NEW))
            until = wanted.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            room = self.max_length - new
            if room < 1:
                raise ValueError(
                    f"max_length is {self.max_length}; task {request.task_name} writes {new} "
                    "tokens, and needs more"
                )
            tokens = tuple(self.tok_encode(context)[-room:]) or (self.prefix_token_id,)
            prompts.append(Prompt(tokens, new, stops, *_identity(request)))
        return self._answers(prompts)

    def _question(
        self, request: Instance, before: Sequence[int], after: Sequence[int], part: int = 0
    ) -> Question:
        tokens = (*before, *after)[-(self.max_length + 1) :]
        answer = min(len(after), len(tokens) - 1)
        return Question(tokens, answer, *_identity(request, part))

    def _answers(self, questions: Sequence[Any]) -> list[Any]:
        """Those under this condition; of all conditions at once, the first time."""
        key = tuple(questions)
        if key not in self.known:
            self.known[key] = self.answer(questions)
        return self.known[key][self.condition]


def start_of(tokenizer: Any) -> list[int]:
    """What stands before a text by the tokenizer's own habit: of the tokenizers library the token
    that starts a document, if its file says so, and of others always."""
    adds = True
    if isinstance(tokenizer, JsonTokenizer):
        adds = tokenizer.bos_id in Tokenizer.from_str(tokenizer.json).encode("").ids
    return [tokenizer.bos_id] if adds else []


def _identity(request: Instance, part: int = 0) -> tuple[int, str]:
    """What keys the noise of a document's questions, and what it is called."""
    document = f"{request.task_name}/{request.doc_id}"
    digest = sha256(f"{document}\0{part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1, document


class Tasks:
    """Tasks by name, of lm-eval or of the YAML files in a directory. Raises `ValueError` for names
    that there are not, with those that are near."""

    def __init__(self, names: Sequence[str], include_path: str | Path | None, **options: Any):
        """options: num_fewshot, limit."""
        if not names:
            raise ValueError("tasks is empty; name at least one")
        self.names, self.options = names, options
        if include_path is not None and not Path(include_path).is_dir():
            raise FileNotFoundError(f"include_path is {str(include_path)!r}, which is no directory")
        # lm-eval's own thousands take seconds to list.
        self.manager = TaskManager(include_path=include_path, include_defaults=not include_path)
        if include_path and not all(self.manager.match_tasks([name]) for name in names):
            self.manager = TaskManager(include_path=include_path)
        for name in names:
            if not self.manager.match_tasks([name]):
                near = get_close_matches(name, self.manager.all_tasks, 3)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` has all"
                )
                raise ValueError(f"tasks has {name!r}, which there is not; {hint}")

    def samples(self, asking: Asking) -> dict[str, list[dict[str, Any]]]:
        """By task, what is logged of each document and filter, as `asking` answers now."""
        with _own_randomness(), _quiet():
            found = simple_evaluate(
                model=asking,
                tasks=[*self.names],
                task_manager=self.manager,
                log_samples=True,
                bootstrap_iters=0,
                **self.options,
            )
        return found["samples"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval says of defaults, each time that it reads a task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """lm-eval seeds all generators anew; those of the caller go on as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
