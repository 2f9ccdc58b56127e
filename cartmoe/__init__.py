"""CartesianMoE (arXiv 2410.16077) and its baselines; knows nothing of who observes it.

The names stand in __init__.pyi; what is behind one is imported when it is first used.
"""

import os

import lazy_loader

from cartmoe.shadow import warn_if_shadowed

# Before torch loads OpenMP: its threads spin while they wait, by default for so long that a busy
# neighbor on the machine makes training ten times slower. So short a spin makes that four times,
# and costs a few percent where there is none (benchmarks/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
warn_if_shadowed()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
