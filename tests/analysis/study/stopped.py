"""A process that runs a study and kills itself: python -m tests.analysis.study.stopped STUDY OUT

It dies behind the fourth file that it writes about a layer, and has then printed how many layers it
read since it began to measure.
"""

import json
import os
import signal
import sys
from pathlib import Path

import analysis as an
from analysis.adapters.shelf import Shelf
from analysis.measure import by_segment
from analysis.measure.bookmarks import Bookmarks

own, read, begun = Bookmarks.write, Shelf._read, by_segment.batches
reads: list[str] = []
writes: list[int] = []


def write(self, *args):
    own(self, *args)
    writes.append(1)
    if len(writes) == 4:
        print(len(reads), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def counted(self, group):
    if group in self.layers:
        reads.append(group)
    read(self, group)


def begin(*args):
    reads.clear()
    return begun(*args)


Bookmarks.write, Shelf._read, by_segment.batches = write, counted, begin  # type: ignore
study = an.Study.from_dict(json.loads(Path(sys.argv[1]).read_text()))
an.run(study, sys.argv[2], progress=False, threads=1)
print(len(reads))
