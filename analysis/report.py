"""The tables and figures that a study leaves in its directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from analysis import plots, stats
from analysis.results import Results
from analysis.run import plan_path, read
from analysis.store import Store
from cartmoe.files import write_atomically

Picture = Callable[[Results], Axes]

# By file name. A picture whose conditions a study does not have is left out.
FIGURES: dict[str, tuple[set[str], Picture]] = {
    "droptop_strength": ({"DropTop"}, lambda r: plots.damage_curve(r, "DropTop")),
    "droptop_mass": ({"DropTop"}, lambda r: plots.damage_curve(r, "DropTop", x="mass_moved")),
    "noise_strength": ({"GaussianNoise"}, lambda r: plots.damage_curve(r, "GaussianNoise")),
    "noise_mass": (
        {"GaussianNoise"},
        lambda r: plots.damage_curve(r, "GaussianNoise", x="mass_moved"),
    ),
    "controls": ({"DropTop"}, plots.control_dots),
    "stages": ({"DropTop"}, plots.stage_dots),
}


def summarize(out: Path) -> str:
    """Write tables/*.csv and robustness.txt, and return what that file says.

    What was summarized already, from the same cells by the same code, is not done again.
    """
    stamp, text = out / "tables" / ".made_from", out / "robustness.txt"
    made_from = _fingerprint(out)
    if not (text.is_file() and stamp.is_file() and stamp.read_text() == made_from):
        results = read(out)
        stamp.parent.mkdir(exist_ok=True)
        tables = {"clean": results.clean(), "sites": results.sites()}
        if results.has_conditions:
            tables |= {"damage": results.damage(), "robustness": results.table()}
        for name, table in tables.items():
            write_atomically(stamp.parent / f"{name}.csv", table.to_csv(index=False))
        write_atomically(text, _describe(results))
        write_atomically(stamp, made_from)
    return text.read_text()


def plot(out: Path) -> list[Path]:
    """Draw every figure that the study has the conditions for: PNG and PDF in figures/."""
    folder = out / "figures"
    stamp = folder / ".made_from"
    made_from = _fingerprint(out)
    if not (stamp.is_file() and stamp.read_text() == made_from):
        results = read(out)
        folder.mkdir(exist_ok=True)
        have = set(results.losses.perturbation)
        for name, (needs, picture) in FIGURES.items():
            if needs <= have:
                with plots.paper_style():
                    axes = picture(results)
                    plots.save(axes, folder / name)
                    plt.close(axes.figure)
        write_atomically(stamp, made_from)
    return sorted([*folder.glob("*.png"), *folder.glob("*.pdf")])


def _fingerprint(out: Path) -> str:
    """Of all that a report is made from: the plan, the cells that are there, and this code."""
    digest = hashlib.sha256(plan_path(out).read_bytes())
    with Store(out / "results.sqlite") as store:
        digest.update("".join(sorted(store.keys())).encode())
    here = Path(__file__).parent
    for path in (here / "report.py", here / "results.py", *sorted(here.glob("[ps][lt]*/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _describe(results: Results) -> str:
    clean = results.clean()
    columns = ["model", "train_seed", "num_documents", "num_tokens", "nats", "low", "high",
               "perplexity", "bits_per_byte"]  # fmt: skip
    parts = []
    if results.finished < results.planned:
        parts.append(f"UNFINISHED: {results.finished} of {results.planned} cells are measured")
    parts.append("Clean validation loss (nats per token [95 % interval over documents])")
    parts.append(clean[columns].to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    if results.has_conditions:
        parts.append("Routing robustness (form of arXiv 2410.16077, Table 4)")
        parts.append(stats.format_robustness(results.table()))
        parts.append(_positive_control(results))
    return "\n\n".join(parts) + "\n"


def _positive_control(results: Results) -> str:
    damage = results.damage()
    if not damage.perturbation.str.startswith("RandomRouting").any():
        return "Positive control: RandomRouting was not run, so nothing shows that routing matters"
    failed = stats.positive_control(damage)
    if failed.empty:
        return "Positive control: random routing hurts every model (interval above 0): passed"
    names = ", ".join(
        f"{r.model} (seed {r.train_seed}): {r.delta_nats:+.4f} [{r.low:.4f}, {r.high:.4f}]"
        for r in failed.itertuples()
    )
    return f"Positive control FAILED: random routing is not shown to hurt {names}"
