"""Tables of sums in, tables of damage with intervals out.

bootstrap.py   intervals of ratios of sums, resampling whole documents
pairs.py       rows of losses -> one checkpoint's conditions paired with its clean run
doses.py       how much each condition disturbed the routing
damage.py      damage of every condition, contrasts of two conditions or two checkpoints
seeds.py       two models over their training seeds
contrasts.py   one model against each other one: named beforehand, adjusted for their number
curves.py      damage curves in a few numbers
robustness.py  the paper's Table 4, its controls, and its printed form
parts.py       a condition's damage beside what other conditions make of it
split.py       set, weights and mass (Shapley)
cascade.py     with and without the routers behind; single sites against all of them
gap.py         the worst flips against as many random ones
efficiency.py  damage per flip and per mass moved
tokens.py      every token's loss, a condition at a time
tails.py       how unevenly damage is spread over tokens
groups.py      damage by position, frequency and domain
relation.py    damage of dropping an expert against what it shares with those that take over
"""

from analysis.stats.cascade import additivity, cascade
from analysis.stats.contrasts import family_contrasts, format_contrasts
from analysis.stats.curves import curve_summary
from analysis.stats.damage import clean_table, contrast_models, damage, difference
from analysis.stats.doses import doses
from analysis.stats.efficiency import per_dose
from analysis.stats.gap import gap
from analysis.stats.groups import damage_by
from analysis.stats.pairs import label
from analysis.stats.relation import relation
from analysis.stats.robustness import format_robustness, positive_control, robustness_table
from analysis.stats.seeds import over_seeds
from analysis.stats.split import split
from analysis.stats.tails import tail_curve, tails

__all__ = [
    "additivity",
    "cascade",
    "clean_table",
    "contrast_models",
    "curve_summary",
    "damage",
    "damage_by",
    "difference",
    "doses",
    "family_contrasts",
    "format_contrasts",
    "format_robustness",
    "gap",
    "label",
    "over_seeds",
    "per_dose",
    "positive_control",
    "relation",
    "robustness_table",
    "split",
    "tail_curve",
    "tails",
]
