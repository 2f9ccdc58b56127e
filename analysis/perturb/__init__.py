"""Every perturbation of routing, and conditions: where, at which point, with what effect one acts.

base.py        what a perturbation is
masks.py       experts taken away
logits.py      logits moved
decisions.py   decisions changed that are no map of logits
flips.py       the worst flips within a budget, and as many random ones
recorded.py    decisions of other runs; gates.py: gates of other models
trace.py       recorded routing; trace_files.py, trace_arrays.py: on the disk, from engines
compound.py    made of other perturbations, or of a function
catalogue.py   the dict that names them
where.py       sites and tokens; context.py, noise.py: what a perturbation may see, and draw
effects.py     the part of a changed decision that is let through
condition.py   one arm of an experiment; arms.py: arms that belong together; said.py: in words
"""

from analysis.perturb.arms import cascade_arms, site_arms, split_arms
from analysis.perturb.base import (
    Identity,
    Perturbation,
    about,
    chosen_mask,
    map_inner,
    parts_of,
)
from analysis.perturb.catalogue import PERTURBATIONS, perturbation_class, perturbation_from_dict
from analysis.perturb.compound import Compose, Custom, ResidualNoise
from analysis.perturb.condition import CLEAN, DOWNSTREAM, Clean, Condition, models_of, of_one_name
from analysis.perturb.context import Calibration, RouterContext, SiteStats, Tokens
from analysis.perturb.decisions import DropSlots, Lag, NoRouted, TopK, UniformWeights, where_tokens
from analysis.perturb.flips import Flips, Worst
from analysis.perturb.gates import GateSwap
from analysis.perturb.logits import (
    GaussianNoise,
    GumbelNoise,
    Quantize,
    RandomRouting,
    SwapRanks,
    Temperature,
)
from analysis.perturb.masks import DropChosen, DropExperts, DropTop, DropUnchosen, KeepRanks
from analysis.perturb.noise import Noise, hash_key, mix64, sequence_hash
from analysis.perturb.recorded import Replay
from analysis.perturb.said import condition_from_text
from analysis.perturb.trace import Trace
from analysis.perturb.trace_arrays import check_lengths
from analysis.perturb.where import KINDS, Where, kind_of, sites_of, token_kinds
