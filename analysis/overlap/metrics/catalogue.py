"""Every metric by its name."""

from __future__ import annotations

from analysis.overlap.metrics import composite, first_order, output_stream, usage_metrics, weights
from analysis.overlap.metrics.base import Metric

METRICS: dict[str, Metric] = {
    **usage_metrics.METRICS,
    **weights.METRICS,
    **output_stream.METRICS,
    **first_order.METRICS,
    **composite.METRICS,
}
