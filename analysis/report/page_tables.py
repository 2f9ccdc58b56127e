"""Which columns of a study's tables its page shows, and what it calls them."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analysis.report.html import Cells, cells
from analysis.report.text import APART

WHO = {"model": "model", "train_seed": "seed"}
COST = {"delta_nats": "change of loss"}
PARTS = WHO | {"condition": "condition", "part": "part"} | COST | {"share": "share"}
GROUPS = WHO | {"condition": "condition", "group": "group", "num_documents": "n"} | COST
# name -> (title, column -> what it is called), in the order of the page.
SHOWN: dict[str, tuple[str, dict[str, str]]] = {
    "clean": (
        "Clean validation loss",
        WHO | {"num_documents": "n", "num_tokens": "tokens", "nats": "nats per token",
               "perplexity": "perplexity", "bits_per_byte": "bits per byte"},
    ),
    "contrasts": (
        "Contrasts named beforehand: the reference less each model",
        {"model": "model", "condition": "condition"} | COST
        | {"p": "p", "min_p": "smallest p", "p_holm": "p (Holm)", "verdict": "verdict",
           "speaks_for": "speaks for"},
    ),
    "damage": (
        "Damage of every condition",
        WHO | {"label": "condition", "num_documents": "n"} | COST
        | {"delta_bits_per_byte": "bits per byte", "mass_moved": "mass moved", "flips": "flips",
           "agreement": "agreement", "note": "note"},
    ),
    "per_dose": (
        "Damage per dose: the slopes from 0",
        WHO | {"label": "condition", "top_k": "K", "routed_share": "routed share"} | COST
        | {"per_flip": "per flip", "per_mass": "per mass moved"},
    ),
    **{name: (title, PARTS) for name, title in APART.items()},
    "tails": (
        "Rise of single tokens’ losses, and what the worst ones carry",
        WHO | {"condition": "condition", "mean": "mean", "q0.5": "median", "q0.99": "99 %",
               "max": "largest", "worst_0.01": "worst 1 % carry", "worst_0.1": "worst 10 % carry"},
    ),
    **{f"by_{by}": (f"Damage by {by}", GROUPS) for by in ("domain", "position", "frequency")},
    "sites": (
        "Routers: what is fixed, and means of the clean run",
        WHO | {"layer": "layer", "stage": "stage", "metric": "what", "value": "value"},
    ),
    "failed": (
        "Cells that killed their workers",
        WHO | {"perturbation": "perturbation", "shard": "shard", "reason": "reason"},
    ),
}  # fmt: skip


def table_cells(made: Mapping[str, pd.DataFrame]) -> list[Cells]:
    """Of each table that was made (see `analysis.report.text.tables`)."""
    return [
        cells(name, title, made[name], columns)
        for name, (title, columns) in SHOWN.items()
        if name in made and len(made[name])
    ]


def robustness_cells(made: Mapping[str, pd.DataFrame]) -> list[Cells]:
    """Table 4 in two: what the mask costs, then its controls; none where nothing was disturbed."""
    if "robustness" not in made:
        return []
    table = made["robustness"]
    split = table.columns.get_loc("identity")
    facts = {"num_documents": "n", "top_k": "K", "renormalize": "renormalized",
             "routed_share": "routed share", "clean_perplexity": "clean perplexity",
             "perplexity": "first choice disabled"}  # fmt: skip
    masks = {name: name for name in table.columns[:split] if name.startswith("DropTop")}
    controls = {name: name for name in table.columns[split:]}
    shown = {
        "Routers": facts,
        "First choice disabled: everywhere, and at each stage": masks,
        "Controls beside it": controls,
    }
    bounds = {name for name in table if name.endswith((" low", " high"))}
    return [
        cells(
            f"robustness-{number}",
            title,
            table,
            WHO | {name: said for name, said in own.items() if name not in bounds},
        )
        for number, (title, own) in enumerate(shown.items())
    ]
