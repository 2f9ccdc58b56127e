"""Pictures look as they did when they were last looked at: against stored ones, with a tolerance.

What is to look otherwise is drawn anew, and looked at, before it is kept:
pytest tests/analysis/plots/test_images.py --mpl-generate-path=tests/analysis/plots/baseline
"""

from __future__ import annotations

import pandas as pd
import pytest

from analysis import plots
from analysis.stats import damage
from analysis.stats.bootstrap import Bootstrap

from ..synthetic import study
from .test_overlap import NAMES
from .test_parts import PICTURES, Tables

LOOK = dict(tolerance=4, savefig_kwargs={"dpi": 80}, style="default")


@pytest.fixture(scope="module")
def results():
    return Tables()


@pytest.fixture(scope="module")
def frame():
    """Three training seeds."""
    return damage(study((0, 1, 2), documents=8), bootstrap=Bootstrap(resamples=199))


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.mpl_image_compare(**LOOK)
def test_damage_apart(name, results):
    kind, draw = PICTURES[name]
    return draw(getattr(results, kind)()).figure


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.mpl_image_compare(**LOOK)
def test_overlap(name, pictures):
    return pictures[name]().figure


@pytest.mark.parametrize("name", ["damage_curve", "control_dots", "stage_dots"])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.mpl_image_compare(**LOOK)
def test_damage(name, seeds, frame: pd.DataFrame):
    return getattr(plots, name)(frame[frame.train_seed < seeds]).figure
