"""Tasks of lm-eval, loaded once: what they ask, what their metrics are, and their identity."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

SEEDS = 0, 1234, 1234, 1234  # of random, numpy, torch and examples: lm-eval's own defaults


class TaskSet:
    """Tasks by name: of lm-eval, or of the YAML files in a directory; patterns and groups stand for
    all that they name.

    tasks   by name, those that ask
    groups  by name, the names of all tasks that are within
    sha256  of all that they ask, and of lm-eval's version

    Raises `ValueError` for names that there are not, with those that are near, and for examples
    where a task allows none; `FileNotFoundError` for a directory that there is not.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ):
        if not names:
            raise ValueError("tasks is empty; name at least one")
        if include_path is not None and not Path(include_path).is_dir():
            raise FileNotFoundError(f"include_path is {str(include_path)!r}, which is no directory")
        self.limit = limit
        with _own_randomness(), _quiet():
            self.loaded: Any = _load(names, include_path)
        self.tasks: dict[str, Any] = self.loaded["tasks"]
        within = {name: group.get_all_tasks() for name, group in self.loaded["groups"].items()}
        self.groups = {name: [task.task_name for task in own] for name, own in within.items()}
        for name, task in self.tasks.items():
            own = task.get_config("num_fewshot")
            if num_fewshot is not None and own == 0 and num_fewshot != 0:
                raise ValueError(f"num_fewshot is {num_fewshot}; task {name} is asked without any")
            value = (own or 0) if num_fewshot is None else num_fewshot
            task.set_config(key="num_fewshot", value=value)
            task.set_fewshot_seed(seed=SEEDS[3])

    @property
    def sha256(self) -> str:
        """Reads every document."""
        digest = hashlib.sha256(version("lm_eval").encode())
        for name, task in sorted(self.tasks.items()):
            said = {k: v for k, v in task.dump_config().items() if k != "metadata"}
            digest.update(json.dumps([name, said], default=str, sort_keys=True).encode())
            for document in (*task.eval_docs, *(task.fewshot_docs() or ())):
                digest.update(json.dumps(document, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    def writes(self, name: str) -> bool:
        """Whether the task asks for texts, not for likelihoods."""
        return self.tasks[name].OUTPUT_TYPE == "generate_until"

    def aggregations(self, name: str) -> dict[str, str]:
        """Of each metric, what lm-eval's own function that makes one number of it is called."""
        made = self.tasks[name].aggregation()
        return {metric: getattr(how, "__name__", str(how)) for metric, how in made.items()}

    def samples(self, model: Any) -> dict[str, list[dict[str, Any]]]:
        """By task, what lm-eval logs of each document and filter, as this model of its kind answers
        now."""
        with _own_randomness(), _quiet():
            found = evaluate(
                lm=model,
                task_dict=self.loaded,
                limit=self.limit,
                log_samples=True,
                bootstrap_iters=0,
            )
        return found["samples"]


def _load(names: Sequence[str], include_path: str | Path | None) -> Any:
    """From the directory alone if that is enough: lm-eval's own thousands take seconds to list."""
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        with contextlib.suppress(Exception):  # whatever it says of names that are its own
            if all(manager.match_tasks([name]) for name in names):
                return manager.load(_matching(manager, names))
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            near = " or ".join(get_close_matches(name, manager.all_tasks, 3))
            hint = f"did you mean {near}?" if near else "`lm-eval ls tasks` has all"
            raise ValueError(f"tasks has {name!r}, which there is not; {hint}")
    return manager.load(_matching(manager, names))


def _matching(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """What the names and patterns stand for, in their order."""
    return list(dict.fromkeys(found for name in names for found in manager.match_tasks([name])))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval says of defaults, each time that it reads a task, and bars of data."""
    logger, shown = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """The generators as lm-eval seeds them, the same for every condition; those of the caller go on
    as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            random.seed(SEEDS[0])
            np.random.seed(SEEDS[1])  # noqa: NPY002
            torch.manual_seed(SEEDS[2])
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
