"""Models under study, behind one protocol.

base.py      the protocol: a model, and the router of a site
running.py   running one by its segments; decisions as vectors
cartmoe.py   the compact models; stand_in.py: functions in their experts' place
forward.py   what stands in a module's place; identity.py: what a model in memory is
transformers.py  pretrained models; pretrained.py: their directories, and tokenizers
form.py, given.py  how such a model is called, and with what tokens; body.py: by segments
seams.py     where routers meet experts in anybody's code; attach.py, lists.py: asked once;
             checks.py: or refused
seat.py      what sits there meanwhile: fused.py, where experts are called together, listed.py, one
             by one; router.py, tap.py: a router asked through its own forward
stream.py    layers run one by one; layouts.py: weights of experts however they are kept
owned.py     one measures it at a time, undisturbed
load.py      from a path or an object to a model under study; corpus.py: documents that fit it
card.py      what a model shows of itself in a notebook
"""

from analysis.adapters.base import (
    Adapter,
    Experts,
    Given,
    Router,
    Segment,
    State,
    as_adapter,
    routed_adapter,
)
from analysis.adapters.cartmoe import CartMoEAdapter
from analysis.adapters.corpus import documents, tokenizer_of
from analysis.adapters.load import (
    adapt,
    identity_of,
    load,
    models,
    sites_of_path,
    skeleton,
)
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
    check_documents,
    clean_routing,
    needs_gradients,
    num_batches,
    run,
    steps,
)
from analysis.adapters.shape import Shape, published_config, shallow, shape_of
