"""The trained models that come with the project, in words."""

from __future__ import annotations

import pandas as pd

from analysis.adapters import models
from analysis.stats import interval_texts, number_text
from cartmoe.shipped import BASELINES, MODELS

LEAST = 0.2  # nats per byte that random routing costs a model that has learnt to route


def models_text() -> str:
    """A line a model and a line a simpler one, and which models say nothing about routing."""
    table, simple = models(), pd.read_csv(MODELS / BASELINES).set_index("name").bits_per_byte
    shown = pd.DataFrame(
        {
            "name": table["name"],
            "parameters": [f"{n:,}" for n in table.parameters],
            "million tokens": [f"{n / 1e6:.1f}" for n in table.tokens],
            "bits per byte": interval_texts(
                table, "bits_per_byte", "bpb_low", "bpb_high", sign=False
            ),
            "RandomRouting (nats)": interval_texts(table, "random_routing"),
            "DropTop(1) (nats)": interval_texts(table, "drop_top"),
            "max violation": ["-" if pd.isna(v) else f"{v:.2f}" for v in table.max_violation],
        }
    )
    lines = [shown.to_string(index=False), "", "bits per byte of simpler models on the same text:"]
    lines += [", ".join(f"{name} {number_text(bits)}" for name, bits in simple.items()), ""]
    bar = min(bits for name, bits in simple.items() if not name.startswith("xz"))
    for row in table.itertuples():
        if row.bits_per_byte >= bar:
            lines.append(f"{row.name} knows no more of the text than the best n-gram or gzip")
        if row.random_routing < LEAST:
            lines.append(f"{row.name} has hardly learnt to route: random routing costs < {LEAST}")
    lines.append(
        f"On {table.num_documents.iloc[0]} packages that none was trained on. Intervals are over "
        "packages: another training run is not in them, so that they order no families."
    )
    return "\n".join(lines)
