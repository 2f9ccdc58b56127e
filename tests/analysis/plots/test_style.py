"""Colors of families, to eyes of every kind; axes that a notebook shows once."""

from __future__ import annotations

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from analysis import plots, stats
from analysis.plots.style import FAMILY_STYLE, OTHER_STYLE, model_styles
from analysis.stats.bootstrap import Bootstrap

from ..synthetic import study

# Machado, Oliveira and Fernandes (IEEE TVCG 15, 2009), severity 1, of linear RGB.
EYES = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
LEAST = 0.15  # Okabe and Ito's colors of before came down to 0.076 here: hash and top_p, deutan


def oklab(color: str, eye: str) -> np.ndarray:
    """Ottosson's Oklab (2020) of a color as that eye sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(EYES[eye] @ linear, 0, 1)
    lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
           [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
           [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return lab @ np.cbrt(lms @ seen)


def apart(one: str, other: str, eye: str) -> float:
    return float(np.linalg.norm(oklab(one, eye) - oklab(other, eye)))


@pytest.mark.parametrize("eye", EYES)
def test_families_are_told_apart(eye):
    for (a, (one, _)), (b, (other, _)) in combinations(FAMILY_STYLE.items(), 2):
        assert apart(one, other, eye) >= LEAST, (a, b)


def test_the_measure_finds_colors_that_are_alike():
    """Those of hash and top_p before."""
    assert (
        apart("#009E73", "#CC79A7", "deutan") < 0.08 < 0.25 < apart("#009E73", "#CC79A7", "normal")
    )


def test_every_look_differs_by_marker_too():
    looks = list(FAMILY_STYLE.values())
    assert len({marker for _, marker in looks}) == len({color for color, _ in looks}) == len(looks)
    others = {marker for _, marker in OTHER_STYLE}
    assert not others & {marker for _, marker in looks}
    assert len(set(OTHER_STYLE)) == len(OTHER_STYLE) == 20


def test_a_dark_style_is_legible(frame):
    """What is drawn beside families' colors is of the style's ink."""
    with plt.style.context("dark_background"):
        _, ax = plt.subplots(layout="constrained")
        plots.control_dots(frame, ax=ax)
        (stripe, *_), zero = ax.patches, ax.get_lines()[-1]
        assert max(to_rgb(stripe.get_facecolor())) < 0.2
        assert min(to_rgb(zero.get_color())) > 0.5
        dense = model_styles(frame.assign(model="dense", family="dense"))["dense"]
        assert to_rgb(dense["color"]) == (1, 1, 1)
    assert model_styles(frame.assign(model="dense", family="dense"))["dense"]["color"] == "#000000"


@pytest.fixture
def frame():
    return stats.damage(study(documents=5), bootstrap=Bootstrap(resamples=99))


def test_axes_of_ours_show_their_figure_once_in_a_notebook(frame):
    """Whether a cell ends with the axes, the figure or something else."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    try:
        for drawing in (plots.damage_curve(frame), plots.dose_panels(frame, doses=["strength"])):
            figure = getattr(drawing, "figure", drawing)
            shell.display_formatter.formatters["image/png"].for_type(
                type(figure), lambda one: b"a picture"
            )
            with capture_output() as shown:
                shell.displayhook(drawing)
            (output,) = shown.outputs
            assert output.data == {"image/png": b"a picture"}
            assert not plt.fignum_exists(figure.number)  # or the cell's end would show it again
    finally:
        InteractiveShell.clear_instance()


def test_a_users_own_style_and_grid_are_kept(frame):
    with plt.style.context("ggplot"):
        figure, axes = plt.subplots(2, 2, layout="constrained")
        ax = plots.damage_curve(frame, ax=axes[1, 0])
        assert ax.get_facecolor() == axes[0, 0].get_facecolor() != (1, 1, 1, 1)
        assert ax.xaxis.label.get_fontsize() == axes[0, 0].xaxis.label.get_fontsize()
    assert not any(ax.has_data() for ax in figure.axes if ax is not axes[1, 0])
