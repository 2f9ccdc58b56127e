"""Damage done at random, and what became of it: refused by name, without effect, or silent."""

from __future__ import annotations

import os
import random
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEED = int(os.environ.get("FAULT_SEED", "0"))  # printed with each table: the same faults again
FLIPS, CUTS = 300, 100
LONGEST = 30.0  # seconds; more is a hang


def flip(data: bytes, draw: random.Random) -> bytes:
    """One bit, every other time of a byte that is not 0: most of a database is empty."""
    places = [i for i, byte in enumerate(data) if byte] if draw.random() < 0.5 else range(len(data))
    flipped = bytearray(data)
    flipped[draw.choice(places or range(len(data)))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def cut(data: bytes, draw: random.Random) -> bytes:
    """Less of it, perhaps nothing."""
    return data[: draw.randrange(len(data))]


def faults(draw: random.Random) -> Iterator[tuple[str, Callable[[bytes, random.Random], bytes]]]:
    """Their names and functions, in a random order."""
    asked = [("flip", flip)] * FLIPS + [("cut", cut)] * CUTS
    draw.shuffle(asked)
    yield from asked


class Tally(Counter):
    """How trials of one kind ended; those that must not be are kept in `bad`."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.bad: list[str] = []
        self.draw = random.Random(f"{SEED} {kind}")

    def trial(self, name: str, act: Callable[[], Any], wanted: Any, subject: Path | None) -> None:
        """act() must raise an error that names the subject, or give what is wanted (None: it may
        give anything)."""
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = act()
        except (ValueError, OSError) as error:
            named = subject is None or subject.name in str(error)
            self["refused" if named else "not named"] += 1
            if not named:
                self.bad.append(f"{name}: {type(error).__name__} without its name: {error}")
        except Exception as error:
            self["raised"] += 1
            self.bad.append(f"{name}: {type(error).__name__}: {error}")
        else:
            same = wanted is None or found == wanted
            self["accepted" if wanted is None else "no effect" if same else "silent"] += 1
            if not same:
                self.bad.append(f"{name}: silently other")
        if time.monotonic() - start > LONGEST:
            self["hung"] += 1
            self.bad.append(f"{name}: took {time.monotonic() - start:.0f} s")

    def close(self) -> None:
        """Print a line; raise `AssertionError` where anything is bad."""
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.items()))
        print(f"\n{self.kind}: {self.total()} tried, {len(self.bad)} bad ({ends}); seed {SEED}")
        assert not self.bad, "\n".join(self.bad[:5])


def damage(
    kind: str, folder: Path, files: Callable[[Path], list[Path]], observe: Callable[[Path], Any]
) -> None:
    """Flip and cut files of a folder, one at a time, and look at it each time as a user would."""
    tally, pristine = Tally(kind), folder.with_name(f"{folder.name}-pristine")
    shutil.copytree(folder, pristine)
    wanted = observe(folder)
    assert observe(folder) == wanted
    for number, (name, spoil) in enumerate(faults(tally.draw)):
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        path = tally.draw.choice([p for p in sorted(files(folder)) if p.stat().st_size])
        path.write_bytes(spoil(path.read_bytes(), tally.draw))
        where = f"{name} {number} of {path.relative_to(folder)}"
        tally.trial(where, lambda: observe(folder), wanted, folder)
    tally.close()
