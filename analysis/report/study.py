"""The tables and figures that a study leaves in its directory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from analysis import plots
from analysis.measure import Results
from analysis.report.text import describe, tables
from analysis.study import STORE, Store, read, read_plan
from cartmoe.files import write_atomically

STAMP = ".made_from"  # what tables or figures were made from, and their names
# The table a picture is drawn from, empty where the study has nothing of it; and the picture.
Picture = tuple[Callable[[Results], pd.DataFrame], Callable[[pd.DataFrame], Axes | Figure]]


def fitting(pattern: str) -> Callable[[Results], pd.DataFrame]:
    """The table of damage if a label (see `stats.label`) fits the pattern, else none of it."""

    def table(results: Results) -> pd.DataFrame:
        damage = results.damage()
        return damage if damage.label.str.fullmatch(pattern).any() else damage[:0]

    return table


def of_tokens(table: Callable[[Results], pd.DataFrame]) -> Callable[[Results], pd.DataFrame]:
    """That table of DropTop(1) if it was measured and every token's loss was kept."""
    subject = fitting(re.escape(SUBJECT))
    return lambda r: table(r) if r.tokens and len(subject(r)) else pd.DataFrame()


def flips_per_token(results: Results) -> pd.DataFrame:
    """The robustness gaps that stand on one axis."""
    gap = results.gap()
    return gap[~gap.condition.astype(str).str.contains("per=sequence")]


SUBJECT = "DropTop(1)"
NOISE, TOP = r"GaussianNoise\([^,]+\)", r"DropTop\(\d+\)"

FIGURES: dict[str, Picture] = {
    "droptop_strength": (fitting(TOP), lambda t: plots.damage_curve(t, "DropTop")),
    "droptop_mass": (fitting(TOP), lambda t: plots.damage_curve(t, "DropTop", x="mass_moved")),
    "noise_strength": (fitting(NOISE), lambda t: plots.damage_curve(t, "GaussianNoise")),
    "noise_mass": (fitting(NOISE), lambda t: plots.damage_curve(t, "GaussianNoise", "mass_moved")),
    "noise_doses": (fitting(NOISE), lambda t: plots.dose_panels(t, "GaussianNoise")),
    "controls": (fitting(re.escape(SUBJECT)), plots.control_dots),
    "stages": (fitting(r"DropTop\(1\)(, stage \d+)?(, scores)?"), plots.stage_dots),
    "catalogue": (lambda r: r.damage(), plots.catalogue_dots),
    "split": (lambda r: r.split(), plots.split_bars),
    "cascade": (lambda r: r.cascade(), plots.cascade_dots),
    "layers": (lambda r: r.additivity(), plots.layer_profile),
    "gap": (flips_per_token, plots.gap_curve),
    "tails": (of_tokens(lambda r: r.tail_curve([SUBJECT])), plots.tail_shares),
    "position": (of_tokens(lambda r: r.damage_by("position", [SUBJECT])), plots.group_curve),
    "frequency": (of_tokens(lambda r: r.damage_by("frequency", [SUBJECT])), plots.group_curve),
}


def summarize(out: Path) -> str:
    """Write tables/*.csv and robustness.txt, and return what that file says.

    What was summarized already, from the same cells by the same code, is not done again.
    """
    folder, text, made_from = out / "tables", out / "robustness.txt", _fingerprint(out)
    if _made(folder, made_from) is None or not text.is_file():
        results = read(out)
        folder.mkdir(exist_ok=True)
        contrasts = read_plan(out)["contrasts"]
        made = tables(results, contrasts)
        for name, table in made.items():
            write_atomically(folder / f"{name}.csv", table.to_csv(index=False))
        write_atomically(text, describe(results, made, contrasts))
        _note(folder, made_from, [f"{name}.csv" for name in made])
    return text.read_text()


def plot(out: Path, progress: bool = False) -> list[Path]:
    """Draw every figure that the study has the conditions for: PNG and PDF in figures/."""
    folder, made_from = out / "figures", _fingerprint(out)
    files = _made(folder, made_from)
    if files is None:
        results = read(out)
        folder.mkdir(exist_ok=True)
        files = []
        drawn = FIGURES.items() if results.has_conditions else ()
        for name, (table_of, picture) in tqdm(
            drawn, desc="drawing", unit="figure", disable=not progress
        ):
            table = table_of(results)
            if table.empty:
                continue
            with plots.paper_style():
                drawing = picture(table)
                files += plots.save(drawing, folder / name)
                plt.close(getattr(drawing, "figure", drawing))
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
    plan = {name: value for name, value in read_plan(out).items() if name != "manifest"}
    digest = hashlib.sha256(json.dumps(plan).encode())
    with Store(out / STORE) as store:
        digest.update("".join(sorted(store.keys())).encode())
        digest.update(store.failures().sort_values("key").to_csv().encode())
    here = Path(__file__).parent
    own = [here / f"{name}.py" for name in ("report", "describe", "results")]
    for path in (*own, *sorted(here.glob("[ps][lt]*/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
