"""A model as lm-eval asks it: the questions of its tasks, answered under one condition after the
other from one pass over them.

lm-eval makes prompts of documents and metrics of answers; this alone stands between. Its caches are
not used: they know a question by its words, not the model or condition that answered it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from analysis.perturb import CLEAN, Condition
from analysis.tasks.continuations import Prompt
from analysis.tasks.scores import Question
from analysis.tasks.words import Words

Answers = dict[Condition, list[Any]]
GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Asking(TemplateLM):
    """Answers questions under `condition`, which is set before each run of the tasks.

    answer      (task, its questions or prompts) -> an answer each, under every condition
    max_length  tokens that the model reads at once; what is longer loses its beginning, the same
                of all answers to one question
    """

    def __init__(
        self, words: Words, answer: Callable[[str, Sequence[Any]], Answers], max_length: int
    ):
        super().__init__()
        self.words, self.answer, self.max_length = words, answer, max_length
        self.condition = CLEAN
        self.known: dict[tuple, Answers] = {}
        self.shortened: set[str] = set()  # documents of which the beginning was left out

    @property
    def eot_token_id(self) -> int:
        return self.words.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.words.encode(string, start=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise TypeError("questions of tasks come with their documents")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        pairs = [self._encoded(request) for request in requests]
        over: dict[tuple[str, int], int] = {}
        for request, (before, after) in zip(requests, pairs, strict=True):
            document = request.task_name, request.doc_id
            much = len(before) + len(after) - 1 - self.max_length
            over[document] = max(over.get(document, 0), much)
        questions = []
        for request, (before, after) in zip(requests, pairs, strict=True):
            cut = over[request.task_name, request.doc_id]
            if cut >= len(before):
                raise ValueError(
                    f"max_length is {self.max_length}; an answer to document {request.doc_id} of "
                    f"task {request.task_name} has {len(after)} tokens, and nothing before it fits"
                )
            questions.append(self._question(request, before[cut:], after, cut=cut))
        return [tuple(score) for score in self._answers(requests, questions)]

    def _encoded(self, request: Instance) -> tuple[list[int], list[int]]:
        """Tokens of the context and of the continuation, neither of them empty."""
        context, continuation = request.args
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.words.encode(continuation, start=False)
            if after[:1] == before and len(after) > 1:
                after = after[1:]
        if not after:
            raise ValueError(
                f"task {request.task_name} has an answer, {continuation!r} to document "
                f"{request.doc_id}, that has no token of its own behind its question"
            )
        return before, after

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        asked, questions = [], []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.words.encode(request.args[0], start=False),  # the prefix does that
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for number, window in enumerate(windows):
                before, after = make_disjoint_window(window)
                questions.append(self._question(request, before, after, part=number))
                asked.append(request)
        sums = dict.fromkeys(map(id, requests), 0.0)
        for request, score in zip(asked, self._answers(asked, questions), strict=True):
            sums[id(request)] += score.log_likelihood
        return [sums[id(request)] for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = []
        for request in requests:
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
            others = sorted(wanted.keys() - GREEDY)
            if wanted["do_sample"] or others:
                how = "samples its texts" if wanted["do_sample"] else f"asks for {others[0]}"
                raise ValueError(
                    f"task {request.task_name} {how}; only plain greedy ones can be compared"
                )
            new = wanted["max_gen_toks"]
            room = self.max_length - new
            if room < 1:
                raise ValueError(
                    f"max_length is {self.max_length}; task {request.task_name} writes {new} "
                    "tokens, and needs more"
                )
            tokens = self.words.encode(request.args[0]) or [self.prefix_token_id]
            if len(tokens) > room:
                self._note_shortened(request)
            until = tuple(wanted["until"])
            prompts.append(Prompt(tuple(tokens[-room:]), new, until, *_identity(request)))
        return self._answers(requests, prompts)

    def _question(
        self,
        request: Instance,
        before: Sequence[int],
        after: Sequence[int],
        part: int = 0,
        cut: int = 0,
    ) -> Question:
        if cut > 0:
            self._note_shortened(request)
        return Question((*before, *after), len(after), *_identity(request, part))

    def _note_shortened(self, request: Instance) -> None:
        if not self.shortened:
            warnings.warn(
                f"questions are longer than max_length, {self.max_length} tokens: they lose their "
                f"beginning, that of task {request.task_name}, document {request.doc_id} first",
                stacklevel=2,
            )
        self.shortened.add(f"{request.task_name}/{request.doc_id}")

    def _answers(self, requests: Sequence[Instance], questions: Sequence[Any]) -> list[Any]:
        """Those under this condition; of all conditions at once, the first time. A question that is
        asked twice is answered once."""
        found: dict[Any, Any] = {}
        tasks: dict[str, dict[Any, None]] = {}
        for request, question in zip(requests, questions, strict=True):
            tasks.setdefault(str(request.task_name), {})[question] = None
        for task, own in tasks.items():
            key = task, *own
            if key not in self.known:
                self.known[key] = self.answer(task, [*own])
            found |= zip(own, self.known[key][self.condition], strict=True)
        return [found[question] for question in questions]


def _identity(request: Instance, part: int = 0) -> tuple[int, str]:
    """What keys the noise of a document's questions, and what it is called."""
    document = f"{request.task_name}/{request.doc_id}"
    digest = sha256(f"{document}\0{part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1, document
