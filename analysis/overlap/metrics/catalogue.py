"""Every metric by its name."""

from __future__ import annotations

from analysis.overlap.metrics import composite, first_order, outputs, usage, weights
from analysis.overlap.metrics.base import Metric

METRICS: dict[str, Metric] = {
    **usage.METRICS,
    **weights.METRICS,
    **outputs.METRICS,
    **first_order.METRICS,
    **composite.METRICS,
}
