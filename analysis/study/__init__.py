"""Studies: models x conditions x data, measured cell by cell and kept.

specs.py, study.py          what a study is made of; the grid
parse.py, reading.py        written as TOML; schema.py: its JSON schema
given.py, models.py, training.py   its models, named, found, trained; texts.py: what they read
plan.py                     its cells, each with its whole identity (provenance.py)
worker.py, pool.py, executors.py   cells computed here, in processes, on a cluster
machine.py                  how many processes there may be
store.py, folder.py         cells kept; a study's directory read back
run.py, estimate.py         running it, and what that would take; of a model that is larger than
                            memory larger.py, told.py
"""

from analysis.study.estimate import dry_run
from analysis.study.executors import dask, processes
from analysis.study.folder import STORE, STREAMS, progress_of, read, read_plan
from analysis.study.machine import free_workers, is_streamed
from analysis.study.provenance import manifest, source_sha256
from analysis.study.run import run, threads_of
from analysis.study.schema import study_schema
from analysis.study.store import Store
from analysis.study.study import Study
from analysis.study.texts import documents_of
