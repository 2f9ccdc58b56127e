"""What the experts of a layer have in common: metrics on tensors, counts and sums.

base.py              what a metric is; units of documents and the jackknife over them
usage.py             which tokens experts are used for, and with whom, on tensors; usage_stream.py:
                     over batches; usage_metrics.py: metrics, and company by chance
weights.py           their parameters, up to SwiGLU's symmetries
outputs.py           what they compute, on tensors; output_stream.py: over batches
first_order.py       what one costs in another's place, to first order: this is damage itself
composite.py         pairs (a_i, b_j) of a Cartesian layer; composed.py: what those put out
streams.py           what all of these need to sum;  catalogue.py: the dict that names them

Nothing here knows a model, only tensors and the protocol of `analysis.adapters`.
"""

from analysis.overlap.metrics import outputs, usage, weights
from analysis.overlap.metrics.base import (
    MAX_UNITS,
    PROBES,
    TABLES,
    Estimate,
    Metric,
    Probe,
    Sums,
    UnitSums,
    estimate,
)
from analysis.overlap.metrics.catalogue import METRICS
from analysis.overlap.metrics.composite import PAIR_EXPERTS
from analysis.overlap.metrics.streams import Streams, second_stage
from analysis.overlap.metrics.weights import ExpertWeights
