"""What sums over the tokens of sites, as metrics need it, and the estimates from that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from analysis.adapters import Adapter
from analysis.overlap.metrics.base import Estimate, Metric, Probe, Stream, estimate
from analysis.overlap.metrics.composite import CompositeStream, SecondStage, tokens_for
from analysis.overlap.metrics.first_order import SubstitutionStream
from analysis.overlap.metrics.output_stream import OutputStream
from analysis.overlap.metrics.usage_stream import UsageStream
from analysis.overlap.metrics.weights import ExpertWeights
from cartmoe.hooks import RouterSite


class Streams:
    """By site and kind, the streams of these metrics.

    units     of documents, that the jackknife leaves out
    labels    how many classes and domains tokens have
    options   of `OutputStream`
    """

    def __init__(
        self,
        model: Adapter,
        sites: Sequence[RouterSite],
        metrics: Mapping[str, Metric],
        units: int,
        labels: tuple[int, int],
        **options: Any,
    ):
        self.model, self.metrics = model, metrics
        self.kinds = {metric.kind for metric in metrics.values()}
        by_class = any(m.kind == "usage" and not m.units for m in metrics.values())
        make: dict[str, Callable[[RouterSite], Stream]] = {
            "usage": lambda site: UsageStream(site, units, *labels, by_class),
            "outputs": lambda site: OutputStream(model, site, units, **options),
            "function": lambda site: SubstitutionStream(model, site, units),
        }
        self._make = {kind: make[kind] for kind in make if kind in self.kinds}
        self._streams: dict[RouterSite, dict[str, Stream]] = {}
        self._layers: dict[RouterSite, Stream] = {}  # of two stages, for each of the two
        if "composite" in self.kinds:
            for first in sites:
                if second := second_stage(model, first):
                    layer = CompositeStream(model, first, second, units, tokens_for(metrics))
                    self._layers[first] = layer
                    if second in sites:
                        self._layers[second] = SecondStage(layer)

    def _of(self, site: RouterSite) -> dict[str, Stream]:
        """By kind; made when the site is first seen, since some hold as much as its experts."""
        if site not in self._streams:
            self._streams[site] = {kind: make(site) for kind, make in self._make.items()}
            if site in self._layers:
                self._streams[site]["composite"] = self._layers[site]
        return self._streams[site]

    def add(self, site: RouterSite, probe: Probe) -> None:
        """Add a batch, as the site saw it."""
        for stream in self._of(site).values():
            stream.add(probe)

    def forget(self, site: RouterSite) -> None:
        """What was summed at a site."""
        self._streams.pop(site, None)

    def estimates(self, site: RouterSite, confidence: float) -> Iterator[tuple[str, Estimate]]:
        """By name, of those metrics that speak of this site."""
        streams = self._of(site)
        sums: dict[str, Any] = {kind: stream.sums() for kind, stream in streams.items()}
        if "weights" in self.kinds:
            sums["weights"] = ExpertWeights.of(self.model, site)
        for name, metric in self.metrics.items():
            nothing_before = name == "transition" and "transition" not in sums["usage"]
            # What is of a whole layer stands with its first stage.
            of_layer = metric.table == "sites" and isinstance(streams.get(metric.kind), SecondStage)
            if metric.kind in sums and not nothing_before and not of_layer:
                yield name, estimate(metric, sums[metric.kind], confidence)


def second_stage(model: Adapter, first: RouterSite) -> RouterSite | None:
    """That of as many experts, of the two-stage layer of which this site is the first; None
    elsewhere."""
    if not getattr(model, "composed", True):
        return None
    layer = [site for site in model.sites() if site.layer == first.layer]
    if len(layer) == 2 and layer[0] == first and layer[1].num_experts == first.num_experts:
        return layer[1]
    return None
