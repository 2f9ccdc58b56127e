"""Ctrl-C that waits while something is set up or taken down."""

import signal
import threading

import pytest

from cartmoe.interrupt import Interrupt, restoring


@pytest.fixture
def block():
    """block(at) -> what happened, and a block in which a SIGINT comes at that moment."""

    def build(at=None):
        happened = []

        def now(moment):
            happened.append(moment)
            if moment == at:
                signal.raise_signal(signal.SIGINT)
                happened.append(f"after {moment}")

        @restoring
        def make():
            now("before")
            happened.append("set up")
            try:
                yield "value"
            finally:
                now("leaving")
                happened.append("taken down")

        return happened, make

    return build


@pytest.mark.parametrize("at", ["before", "leaving"])
def test_ctrl_c_waits(block, at):
    """Until all is set up or taken down; then it is raised, and nothing stays."""
    happened, make = block(at)
    with pytest.raises(KeyboardInterrupt), make():
        happened.append("inside")
    inside = [] if at == "before" else ["inside"]
    after = {"before": ["after before"], "leaving": []}[at]
    down = ["leaving", *(["after leaving"] if at == "leaving" else []), "taken down"]
    assert happened == ["before", *after, "set up", *inside, *down]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_inside_it_is_raised_at_once(block):
    happened, make = block()
    with pytest.raises(KeyboardInterrupt), make():
        signal.raise_signal(signal.SIGINT)
    assert happened == ["before", "set up", "leaving", "taken down"]


@pytest.mark.parametrize("error", [ZeroDivisionError, GeneratorExit, KeyboardInterrupt])
def test_errors_come_out(block, error):
    happened, make = block()
    with pytest.raises(error, match="mine, and the value"), make() as value:
        raise error(f"mine, and the {value}")
    assert happened == ["before", "set up", "leaving", "taken down"]


def test_an_error_while_setting_up():
    @restoring
    def make():
        raise ValueError("of the argument")
        yield

    with pytest.raises(ValueError, match="of the argument"), make():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_blocks_nest(block):
    """An inner one that is opened while the outer is set up does not let the signal through."""
    happened, inner = block("before")

    @restoring
    def outer():
        with inner():
            happened.append("outer")
            yield
        happened.append("not reached: it came out of the block")

    with pytest.raises(KeyboardInterrupt), outer():
        happened.append("not reached")
    assert happened == ["before", "after before", "set up", "outer", "leaving", "taken down"]


def test_handlers_of_others_are_kept(block, monkeypatch):
    """They are called once the block is open; one that ignores is left to ignore."""
    happened, make = block("before")
    before = signal.signal(signal.SIGINT, lambda *args: happened.append("handled"))
    try:
        with make():
            happened.append("inside")
        assert happened[:5] == ["before", "after before", "set up", "handled", "inside"]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with make():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_within_a_training_that_notes_signals(block):
    _, make = block("before")
    with Interrupt() as interrupt, make():
        pass
    assert interrupt.signal is signal.SIGINT


def test_in_another_thread(block):
    """Where there are no handlers to set."""
    happened, make = block()

    def run():
        with make():
            happened.append("inside")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert happened == ["before", "set up", "inside", "leaving", "taken down"]


def test_it_looks_like_the_function():
    @restoring
    def make(number: int):
        """Of mine."""
        yield number

    assert (make.__name__, make.__doc__) == ("make", "Of mine.")
    with make(3) as value:
        assert value == 3
