from .bootstrap import Bootstrap, Intervals, check_confidence, interval_texts
from .cascade import additivity, cascade, sites_in
from .contrasts import family_contrasts, format_contrasts
from .curves import curve_summary
from .damage import clean_table, contrast_models, damage, difference
from .doses import doses, per_dose
from .gap import gap
from .groups import damage_by
from .metric_facts import facts_of
from .overlap_tables import INDEX, SHARED, check_one_step, square
from .pairs import (
    CHECKPOINT,
    CONDITION,
    PLAIN,
    SITE,
    Pairs,
    base_name,
    check_choice,
    check_columns,
    label,
    label_of,
    pair,
)
from .relation import ALL, LOAD, relation
from .robustness import find, format_robustness, positive_control, robustness_table
from .seeds import over_seeds
from .split import split
from .tokens import tail_curve, tails

__all__ = [
    "ALL",
    "CHECKPOINT",
    "CONDITION",
    "INDEX",
    "LOAD",
    "PLAIN",
    "SHARED",
    "SITE",
    "Bootstrap",
    "Intervals",
    "Pairs",
    "additivity",
    "base_name",
    "cascade",
    "check_choice",
    "check_columns",
    "check_confidence",
    "check_one_step",
    "clean_table",
    "contrast_models",
    "curve_summary",
    "damage",
    "damage_by",
    "difference",
    "doses",
    "facts_of",
    "family_contrasts",
    "find",
    "format_contrasts",
    "format_robustness",
    "gap",
    "interval_texts",
    "label",
    "label_of",
    "over_seeds",
    "pair",
    "per_dose",
    "positive_control",
    "relation",
    "robustness_table",
    "sites_in",
    "split",
    "square",
    "tail_curve",
    "tails",
]
