"""The tables and figures that a study leaves in its directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from tqdm import tqdm

from analysis import plots, stats
from analysis.perturb import PERTURBATIONS
from analysis.results import Results
from analysis.run import plan_path, read
from analysis.store import Store
from cartmoe.files import write_atomically

STAMP = ".made_from"  # what tables or figures were made from, and their names
Picture = Callable[[Results], Axes]

# By file name: a pattern of labels (see `stats.pairs.label`), and the picture. It is left out
# where no condition of the study fits the pattern.
FIGURES: dict[str, tuple[str, Picture]] = {
    "droptop_strength": (r"DropTop\(\d+\)", lambda r: plots.damage_curve(r, "DropTop")),
    "droptop_mass": (
        r"DropTop\(\d+\)",
        lambda r: plots.damage_curve(r, "DropTop", x="mass_moved"),
    ),
    "noise_strength": (
        r"GaussianNoise\([^,]+\)",
        lambda r: plots.damage_curve(r, "GaussianNoise"),
    ),
    "noise_mass": (
        r"GaussianNoise\([^,]+\)",
        lambda r: plots.damage_curve(r, "GaussianNoise", x="mass_moved"),
    ),
    "controls": (r"DropTop\(1\)", plots.control_dots),
    "stages": (r"DropTop\(1\)(, stage \d+)?(, scores)?", plots.stage_dots),
}


def summarize(out: Path) -> str:
    """Write tables/*.csv and robustness.txt, and return what that file says.

    What was summarized already, from the same cells by the same code, is not done again.
    """
    folder, text, made_from = out / "tables", out / "robustness.txt", _fingerprint(out)
    if _made(folder, made_from) is None or not text.is_file():
        results = read(out)
        folder.mkdir(exist_ok=True)
        tables = {"clean": results.clean(), "sites": results.sites()}
        if results.has_conditions:
            tables |= {"damage": results.damage(), "robustness": results.table()}
        for name, table in tables.items():
            write_atomically(folder / f"{name}.csv", table.to_csv(index=False))
        write_atomically(text, _describe(results))
        _note(folder, made_from, [f"{name}.csv" for name in tables])
    return text.read_text()


def plot(out: Path, progress: bool = False) -> list[Path]:
    """Draw every figure that the study has the conditions for: PNG and PDF in figures/."""
    folder, made_from = out / "figures", _fingerprint(out)
    files = _made(folder, made_from)
    if files is None:
        results = read(out)
        folder.mkdir(exist_ok=True)
        labels = results.damage().label if results.has_conditions else pd.Series([], dtype=str)
        files = []
        drawable = [n for n, (needs, _) in FIGURES.items() if labels.str.fullmatch(needs).any()]
        for name in tqdm(drawable, desc="drawing", unit="figure", disable=not progress):
            with plots.paper_style():
                axes = FIGURES[name][1](results)
                files += plots.save(axes, folder / name)
                plt.close(axes.figure)
        _note(folder, made_from, [file.name for file in files])
    return files


def _made(folder: Path, made_from: str) -> list[Path] | None:
    """What was made there, unless it was from something else or is not all there anymore."""
    stamp = folder / STAMP
    known, *names = stamp.read_text().splitlines() if stamp.is_file() else [None]
    files = [folder / name for name in names]
    return files if known == made_from and all(file.is_file() for file in files) else None


def _note(folder: Path, made_from: str, names: list[str]) -> None:
    """Note what was made; what an earlier study made here and this one does not have is removed."""
    stamp = folder / STAMP
    for name in stamp.read_text().splitlines()[1:] if stamp.is_file() else []:
        if name not in names:
            (folder / name).unlink(missing_ok=True)
    write_atomically(stamp, "\n".join([made_from, *names]) + "\n")


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
    parts.append(
        "Clean validation loss (nats per token [95 % interval over documents; of the standard "
        "library, over packages])"
    )
    parts.append(clean[columns].to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    if results.has_conditions:
        parts.append("Routing robustness (form of arXiv 2410.16077, Table 4)")
        parts.append(stats.format_robustness(results.table()))
        parts += [*_identity(results), _positive_control(results), *_without_effect(results)]
    return "\n\n".join(parts) + "\n"


def _identity(results: Results) -> list[str]:
    """The verdict on the hooks themselves: an identity that is not exactly 0 voids the study."""
    damage = results.damage()
    identity = damage[damage.perturbation == "Identity"]
    if identity.empty:
        return []
    wrong = identity[(identity[["delta_nats", "kl", "mass_moved"]] != 0).any(axis=1)]
    if wrong.empty:
        return ["Identity control: hooks alone change nothing, to the last bit: passed"]
    names = ", ".join(
        f"{r.model} (seed {r.train_seed}): {r.delta_nats:g}" for r in wrong.itertuples()
    )
    return [f"Identity control FAILED: hooks alone change the loss of {names}"]


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


def _without_effect(results: Results) -> list[str]:
    """Conditions that did not change what they are there to change: they failed, and say nothing
    of robustness."""
    damage = results.damage()
    dose = {"selection": "flips", "weights": "mass_moved"}
    failed = [
        f"{row['model']} (seed {row['train_seed']}): {row['label']} has {dose[expects]} of 0"
        for row in damage.to_dict("records")
        if (expects := PERTURBATIONS[row["perturbation"].split("(")[0]].expects) in dose
        and row[dose[expects]] == 0
        and row["strength"] != 0
    ]
    return [f"FAILED, changed nothing: {'; '.join(failed)}"] if failed else []
