"""What a measurement of overlap was asked for, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.adapters import Adapter, check_documents, needs_gradients, routed_adapter
from analysis.overlap.metrics import METRICS, PAIR_EXPERTS, PROBES, Metric, second_stage
from analysis.perturb import sites_of
from cartmoe.config import check_choice, check_whole
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite

DAMAGE = "function"  # the kind that is itself damage, and is measured only where it is named


def check_request(
    model: object, metrics: str | Sequence[str] | None, sites: Any, probe: str
) -> tuple[Adapter, list[RouterSite], Sequence[str]]:
    """The model as a model under study, its sites and the names, each once, of metrics that were
    asked for; raises as `measure_overlap`."""
    model = routed_adapter(model)
    chosen = sites_of(model, sites, "sites")
    check_choice("probe", probe, PROBES)
    fitting = {name: m for name, m in METRICS.items() if fits(model, chosen, name, m)}
    if metrics is None:
        return model, chosen, [name for name, m in fitting.items() if m.kind != DAMAGE]
    names = metric_names(metrics, METRICS)
    for name in names:
        check_choice(f"metric for these sites of {model.name}", name, fitting)
        if fitting[name].kind == DAMAGE:
            needs_gradients(f"metric {name!r}", model)
    return model, chosen, names


def check_run(
    model: object, docs: Sequences, sites: Any, batch_size: int
) -> tuple[Adapter, list[RouterSite]]:
    """The model as a model under study, and its sites that were asked for. Raises `ValueError` for
    a dense model, sites that it does not have, no documents, and no sequence at a time."""
    model = routed_adapter(model)
    batch_size = check_whole("batch_size", batch_size, 1)
    check_documents(docs, model)
    return model, sites_of(model, sites, "sites")


def check_tokens(docs: Sequences, model: Adapter, skip_first: bool) -> None:
    """Raise `ValueError` unless the documents have a token to measure on, and the model knows all
    of theirs."""
    check_documents(docs, model)
    if not (docs.targets_SL[:, int(skip_first) :] != IGNORE).any():
        rest = ": skip_first leaves out the first of each sequence" if skip_first else ""
        raise ValueError(f"docs has no token to measure on, which is one with a target{rest}")


def metric_names(metrics: str | Sequence[str], choices: Iterable[str]) -> tuple[str, ...]:
    """Each name once; `ValueError` with the choices where none is given, or another."""
    given = [metrics] if isinstance(metrics, str) else metrics
    several = isinstance(given, Iterable) and not isinstance(given, Metric)
    names = tuple(dict.fromkeys(given)) if several else ()
    if not names:
        raise ValueError(f"metrics is {metrics!r}; name some of {', '.join(choices)}")
    for name in names:
        check_choice("metric", name, choices)
    return names


def fits(model: Adapter, sites: list[RouterSite], name: str, metric: Metric) -> bool:
    """Whether the metric can be measured at these sites."""
    if metric.kind == "composite":
        seconds = {site: second_stage(model, site) for site in sites}
        if metric.table == "pairs":  # of either stage, if the first is there
            few = all(site.num_experts <= PAIR_EXPERTS for site in sites)
            return few and all(seconds[site] or site in seconds.values() for site in sites)
        return any(seconds.values())
    if name == "transition":  # from the site before
        return any(site != model.sites()[0] for site in sites)
    return name != "router_cosine" or all(model.router(site).rows is not None for site in sites)
