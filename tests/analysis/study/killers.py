"""Perturbations of one's own that do harm, for workers to import."""

import os
import signal
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import ClassVar

from analysis.perturb.base import Perturbation


@dataclass(frozen=True)
class Kills(Perturbation):
    """Kills the process that it works in: each time, or with a marker only until that is there."""

    expects: ClassVar[str] = "none"
    marker: str = ""

    def __call__(self, logits_TE, ctx):
        if self.marker and Path(self.marker).exists():
            return logits_TE
        assert parent_process(), "not a worker, but the process of the tests"
        if self.marker:
            Path(self.marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fails(Perturbation):
    """Raises an ordinary error."""

    expects: ClassVar[str] = "none"

    def __call__(self, logits_TE, ctx):
        raise ValueError("this perturbation never works")
