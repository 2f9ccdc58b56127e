"""Models under study, behind one protocol.

base.py      the protocol: a model, and the router of a site
running.py   running one by its segments; decisions as vectors
cartmoe.py   the compact models; stand_in.py: functions in their experts' place
transformers.py  pretrained models; pretrained.py: their directories, and tokenizers
given.py     what tokens a forward of such a model is given
body.py      such a model up to its head, by segments
seams.py     where routers meet experts in anybody's code; attach.py: asked once, and checked
seat.py      what sits there meanwhile; router.py, tap.py: a router asked through its own forward
stream.py    layers run one by one; layouts.py: weights of experts however they are kept
owned.py     one measures it at a time, undisturbed
load.py      from a path or an object to a model under study, and documents that fit it
"""

from analysis.adapters.base import (
    Adapter,
    Experts,
    Given,
    Router,
    Segment,
    State,
    as_adapter,
    check_documents,
    routed_adapter,
)
from analysis.adapters.cartmoe import CartMoEAdapter
from analysis.adapters.load import adapt, documents, load, models, skeleton
from analysis.adapters.owned import owned, owning, using
from analysis.adapters.pretrained import (
    is_pretrained,
    pretrained_sha256,
    tokenizer_in,
    weight_files,
)
from analysis.adapters.running import (
    DenseRouting,
    RoutedFlow,
    Watch,
    batches,
    branches,
    clean_routing,
    num_batches,
    run,
    steps,
)
