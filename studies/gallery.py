"""The README's pictures, from the study of the catalogue: python studies/gallery.py"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import analysis as an

HERE = Path(__file__).parents[1]
LABELS = [
    *("DropTop(1)", "KeepRanks", "TopK(1)", "TopK(4)", "DropExperts(0.25)", "DropSlots(0.5)"),
    *("DropChosen(1)", "DropUnchosen(1)", "GaussianNoise(1)", "GumbelNoise(1)", "Temperature(2)"),
    *("SwapRanks", "Quantize(2, bits)", "UniformWeights(1)", "Lag(1)", "Lag(1, over=sites)"),
    *("Replay(cartesian)", "Worst(1)", "Worst(1, choose=random)", "RandomRouting(1)"),
    *("ResidualNoise(1, of=DropTop)", "NoRouted"),
]

results = an.read(HERE / "runs" / "catalogue")
damage = results.damage(full=True)
one_seed = damage[(damage.train_seed == 1) & damage.label.isin(LABELS)]
split, cascade = (table[table.train_seed == 0] for table in (results.split(), results.cascade()))
gap = results.gap()
per_token = gap[gap.per == "token"]
frequency = results.damage_by("frequency", ["DropTop(1)"])

model = an.load(HERE / "runs" / "quick" / "models" / "cartesian-s0")
docs = an.documents("stdlib", model, length=256, limit=24, max_tokens_per_document=256)
flips = an.flip_prediction(model, docs, [0.1, 0.25, 0.5, 1.0, 2.0])

pictures: dict[str, Callable[[], Any]] = {
    "catalogue": lambda: an.plots.catalogue_dots(one_seed),
    "noise": lambda: an.plots.dose_panels(damage, "GaussianNoise"),
    "gap": lambda: an.plots.gap_curve(per_token),
    "layers": lambda: an.plots.layer_profile(results),
    "split": lambda: an.plots.split_bars(split),
    "cascade": lambda: an.plots.cascade_dots(cascade),
    "tails": lambda: an.plots.tail_shares(results.tail_curve(["DropTop(1)"])),
    "frequency": lambda: an.plots.group_curve(frequency[frequency.train_seed == 0]),
    "flips": lambda: an.plots.flip_calibration(flips),
}
for name, picture in pictures.items():
    drawing = picture()
    figure = getattr(drawing, "figure", drawing)
    with an.plots.paper_style():
        figure.savefig(HERE / "gallery" / f"{name}.png", dpi=200)
    plt.close(figure)
