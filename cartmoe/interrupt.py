"""Ctrl-C and SIGTERM that wait for a good moment."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
P = ParamSpec("P")
T = TypeVar("T")


class Interrupt:
    """Within the block, the first SIGINT or SIGTERM is only noted in `signal`.

    The second raises `KeyboardInterrupt` at once, unless `patient`: torchrun hands on a Ctrl-C
    that its processes got already. Outside the main thread signals are left alone.
    """

    def __init__(self, patient: bool = False):
        self.patient = patient
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        main = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS if main}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and not self.patient:
            raise KeyboardInterrupt("stopped at once, without a checkpoint of this step")
        self.signal = signal.Signals(number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def restoring(make: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """`contextlib.contextmanager` for what must not stay behind, such as hooks.

    A Ctrl-C waits while the part before the yield runs, and while the part after it does; so there
    is none between a hook and the note of how to remove it. One moment is left that Python gives
    no means to guard: between the block's last instruction and the first of `__exit__`. What was
    set up is then undone when the exception is let go of, and with it the generator.
    """
    block = contextmanager(make)

    @functools.wraps(make)
    def restored(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Restoring(block(*args, **kwargs))

    return restored


class _Restoring(AbstractContextManager):
    def __init__(self, block: AbstractContextManager):
        self.block = block

    def __enter__(self):
        entered = False
        try:
            with Later():
                value = self.block.__enter__()
                entered = True
            return value
        except BaseException:
            if entered:  # a Ctrl-C that has waited
                self.__exit__(*sys.exc_info())
            raise

    def __exit__(self, *exception):
        left = False
        try:
            with Later():
                left = True
                return self.block.__exit__(*exception)
        except BaseException:
            if not left:  # a Ctrl-C before it could be told to wait
                self.__exit__(*sys.exc_info())
            raise


class Later:
    """Within the block a Ctrl-C is only noted; it is raised at the end. Blocks nest.

    For what must be done whole, and for what calls C code that now and then lets go of the
    exception: of 6,400 signals while pandas and sqlite3 wrote cells, 35 came to nothing.
    """

    def __enter__(self) -> None:
        self.noted, self.before = False, None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):  # else it is ignored, deadly, or not Python's
                self.before = before
                signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True

    def __exit__(self, *exception: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        if self.noted:
            signal.raise_signal(signal.SIGINT)
