"""Ctrl-C and SIGTERM that wait for a good moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
