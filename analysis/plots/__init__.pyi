from .cartesian import SHARES, SIMILAR, cartesian_usage
from .cascades import cascade_dots
from .catalogue import catalogue_dots
from .controls import control_dots
from .curves import damage_curve, dose_panels, gap_curve
from .depth import layer_profile, overlap_profile
from .heatmaps import overlap_heatmap, specialization
from .relation import relation_dots
from .saturation import saturation_curve
from .scatter import damage_against_overlap, flip_calibration
from .splits import split_bars
from .stages import stage_dots
from .style import paper_style, save
from .substitution import substitution_matrix
from .tokens import group_curve, tail_shares

__all__ = [
    "SHARES",
    "SIMILAR",
    "cartesian_usage",
    "cascade_dots",
    "catalogue_dots",
    "control_dots",
    "damage_against_overlap",
    "damage_curve",
    "dose_panels",
    "flip_calibration",
    "gap_curve",
    "group_curve",
    "layer_profile",
    "overlap_heatmap",
    "overlap_profile",
    "paper_style",
    "relation_dots",
    "saturation_curve",
    "save",
    "specialization",
    "split_bars",
    "stage_dots",
    "substitution_matrix",
    "tail_shares",
]
