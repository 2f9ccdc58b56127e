"""Tables of sums in, tables of damage with intervals out.

bootstrap.py   intervals of ratios of sums, resampling whole documents
pairs.py       rows of losses -> one checkpoint's conditions paired with its clean run
damage.py      damage of every condition, contrasts of two conditions or two checkpoints
seeds.py       two models over their training seeds
curves.py      damage curves in a few numbers
robustness.py  the paper's Table 4, its controls, and its printed form
"""

from analysis.stats.curves import curve_summary
from analysis.stats.damage import clean_table, contrast_models, damage, difference
from analysis.stats.pairs import label
from analysis.stats.robustness import format_robustness, positive_control, robustness_table
from analysis.stats.seeds import over_seeds

__all__ = [
    "clean_table",
    "contrast_models",
    "curve_summary",
    "damage",
    "difference",
    "format_robustness",
    "label",
    "over_seeds",
    "positive_control",
    "robustness_table",
]
