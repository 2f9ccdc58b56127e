"""Models under study, behind one protocol.

base.py      the protocol, running a model by its segments, decisions as vectors
cartmoe.py   the compact models
load.py      from a path or an object to a model under study, and documents that fit it
"""

from analysis.adapters.base import (
    Adapter,
    DenseRouting,
    RoutedFlow,
    Segment,
    State,
    as_adapter,
    check_documents,
    clean_routing,
    routed_adapter,
)
from analysis.adapters.cartmoe import CartMoEAdapter
from analysis.adapters.load import adapt, documents, load
