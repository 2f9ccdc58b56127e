"""What a model under study shows of itself in a notebook."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.adapters.base import Adapter
from cartmoe.cards import card


def model_card(model: Adapter) -> str:
    """Its size, what it was trained on, and a row a router."""
    trained: Any = getattr(model, "trained_on", {})
    facts = {
        "family": model.family,
        "parameters": f"{sum(p.numel() for p in model.module.parameters()):,}",
        "tokenizer": model.tokenizer.name if model.tokenizer else "none",
        "train_seed": model.train_seed,
    }
    if "tokens" in trained:
        facts["trained on"] = f"{trained['tokens']:,} tokens of {trained.get('corpus', 'a corpus')}"
    if covered := getattr(model, "coverage", ""):
        facts["studied"] = covered
    rows = [
        {"layer": site.layer, "stage": site.stage} | model.router(site).facts
        for site in model.sites()
    ]
    return card(model.name, facts, {"routers": pd.DataFrame(rows)} if rows else {})
