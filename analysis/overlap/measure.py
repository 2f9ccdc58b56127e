"""What the experts of a model have in common, measured on documents: streams over one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from analysis.adapters import owned
from analysis.measure import Bookmarks, streams_folder
from analysis.overlap.by_segment import Readings, Tables, by_segment
from analysis.overlap.metrics import MAX_UNITS, METRICS, TABLES, Streams
from analysis.overlap.probes import Labels, Probes, Reading, packs_of
from analysis.overlap.request import DAMAGE, check_request, check_tokens
from analysis.overlap.tables import KEYS, VALUES, Overlap, concat, rows_of, site_columns
from analysis.overlap.traced import TracedModel, TraceProbes, check_trace_request
from analysis.perturb import Trace
from analysis.stats import INDEX, check_confidence
from cartmoe.config import check_whole
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.lock import locked

TOTAL = "none: classes are kept as one total"
FIXED = {"weights": "none: parameters", "usage": TOTAL, "outputs": TOTAL}  # by kind
FEWEST_BATCHES = 8  # where there are as many sequences: with fewer units intervals are very wide


@torch.no_grad()
def measure_overlap(
    model: object,
    docs: Sequences | None = None,
    metrics: str | Sequence[str] | None = None,
    sites: Any = None,
    probe: str = "all",
    *,
    batch_size: int = 8,
    minibatch: int = 256,
    skip_first: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
    streams: str | Path | None = None,
    progress: bool = True,
) -> Overlap:
    """Tables of what experts have in common; `METRICS` says what each metric is and its null.

    model       a model under study, a `LanguageModel`, or a `Trace`: recorded decisions tell what
                experts are used for, without a model
    docs        what it is measured on; of a trace None is each recorded sequence as a document
    metrics     names; None: all that fit the model but those of kind "function", which are damage
    sites       a `RouterSite`, a list of them, or "layer 2", "stage 0", ...; None: all
    probe       for metrics of expert outputs: "all" experts on the same tokens, those "routed" to
                expert i, or to "either" of i and j
    batch_size  sequences at a time, fewer where there would be less than 8 batches. These are made
                of whole documents, and are what the jackknife leaves out (of more than 32 several
                at once)
    minibatch   tokens of which one HSIC of debiased CKA is made
    skip_first  leave out the first token of each sequence, on which all attention dwells
    streams     of a model that is larger than memory (`load(path, stream=True)`), through which all
                batches go a layer at a time: a folder from which the same call goes on behind the
                last layer that was done

    Routing is that of the real run, as the experts were given it. Memory does not grow with the
    documents, only with the number of domains that they are of (and of a streamed model, hidden
    states of all). Tokens for which a trace has no
    decision at some site are left out, with a warning. Raises `ValueError` for a dense model,
    unknown names, metrics that do not fit the model or trace, documents without a token to measure
    on, and numbers out of range.
    """
    study: Any
    owner: Any = nullcontext()
    texts: Any = docs
    if isinstance(model, Trace):
        study, texts, chosen, wanted = check_trace_request(model, docs, metrics, sites)
    else:
        study, chosen, wanted = check_request(model, metrics, sites, probe)
        owner = owned(study)
    check_confidence(confidence)
    batch_size = check_whole("batch_size", batch_size, 1)
    minibatch = check_whole("minibatch", minibatch, 4)
    seed = check_whole("seed", seed, 0)
    check_tokens(texts, study, skip_first)
    folder = streams_folder(streams, [study])
    batch_size = min(batch_size, max(1, len(texts) // FEWEST_BATCHES))
    packs = list(packs_of(texts, batch_size, seed))
    units = min(len(packs), MAX_UNITS)
    labels = Labels.of(texts, seed)
    asked = {name: METRICS[name] for name in wanted}
    sizes = labels.num_classes, len(labels.domains)
    options = dict(probe=probe, minibatch=minibatch, seed=seed)
    sums = Streams(study, chosen, asked, units, sizes, **options)
    kind = TraceProbes if isinstance(study, TracedModel) else Probes
    probes = kind(study, texts, chosen, labels, skip_first, DAMAGE in sums.kinds)
    read = [] if sums.kinds == {"weights"} else packs  # parameters need no tokens
    resampled = ("batch of documents" if len(packs) <= MAX_UNITS else "batches of documents", units)

    def rows_at(site: RouterSite) -> Tables:
        found: Tables = []
        for name, values in sums.estimates(site, confidence) if site in chosen else ():
            metric = asked[name]
            unit, num_units = resampled if metric.units else (FIXED[metric.kind], 0)
            columns = site_columns(study, site) | {"metric": name}
            domains = labels.domains if name == "domain_specialization" else ()
            rows = rows_of(columns, metric.table, values, site, domains)
            found.append((metric.table, rows.assign(unit=unit, num_units=num_units)))
        return found

    taken = [
        (pack[first : first + batch_size], number % units, (seed, number, first))
        for number, pack in enumerate(read)
        for first in range(0, len(pack), batch_size)
    ]
    quiet = not progress
    with owner:
        if read and getattr(study, "streamed", False):
            marks = None
            if folder:
                said = options | dict(batch_size=batch_size, skip_first=skip_first)
                said |= dict(metrics=sorted(asked), sites=[site.name for site in chosen])
                said |= dict(model=study.identity, data=texts.sha256, confidence=confidence)
                said |= dict(name=study.name, train_seed=study.train_seed)
                marks = Bookmarks(folder, said, study.device)
            each = [Reading(probes, *one) for one in taken]
            with locked(folder) if folder else nullcontext():
                found = by_segment(Readings(study, each, sums, rows_at), marks, quiet)
                if marks:
                    marks.remove()
        else:
            for rows, *how in tqdm(taken, unit="batch", disable=quiet):
                for site, seen in probes.of(rows, *how):
                    sums.add(site, seen)
            found = [rows for site in chosen for rows in rows_at(site)]
    probes.check()
    tables = {table: [pd.DataFrame(columns=[*KEYS, *INDEX[table], *VALUES])] for table in TABLES}
    for table, rows in found:
        tables[table].append(rows)
    return Overlap(**{table: concat(frames) for table, frames in tables.items()})
