from .bootstrap import Bootstrap, Intervals, check_confidence, interval_texts
from .cascade import additivity, cascade, sites_in
from .contrasts import family_contrasts, format_contrasts
from .curves import curve_summary
from .damage import clean_table, contrast_models, damage, difference
from .doses import doses, per_dose
from .gap import gap
from .groups import damage_by
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
from .relation import ALL, APART, LOAD, relation
from .robustness import find, format_robustness, positive_control, robustness_table
from .seeds import over_seeds
from .split import split
from .tokens import tail_curve, tails
