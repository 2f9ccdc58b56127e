"""What the experts of a layer have in common: metrics on tensors, counts and sums.

base.py          what a metric is; units of documents and the jackknife over them
usage.py         which tokens experts are used for, and with whom: counts.py, information.py on
                 tensors, usage_stream.py over batches
weights.py       their parameters, up to SwiGLU's symmetries
outputs.py       what they compute: cka.py, vectors.py on tensors
substitution.py  what one costs in another's place, to first order: this is damage itself
composite.py     pairs (a_i, b_j) of a Cartesian layer
tables.py        all of it as tables

Nothing here knows a model, only tensors and the protocol of `analysis.adapters.base`;
`analysis.measure_overlap` runs it on one.
"""

from analysis.overlap import composite, outputs, substitution, usage, weights
from analysis.overlap.base import Metric
from analysis.overlap.tables import Overlap
from analysis.overlap.weights import ExpertWeights

METRICS: dict[str, Metric] = {
    **usage.METRICS,
    **weights.METRICS,
    **outputs.METRICS,
    **substitution.METRICS,
    **composite.METRICS,
}

__all__ = ["METRICS", "ExpertWeights", "Metric", "Overlap"]
