"""Losses and routing of made-up models, for tests of the tables and the pictures."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from analysis.stats.columns import label

FAMILIES = ["dense", "smoe", "smoe_share", "hash", "fine_grained", "top_p", "cartesian"]
PLAIN = {"where": "all", "point": "logits", "effect": "full", "downstream": "reroute"}


def arm(perturbation: str, strength: float = np.nan, cost: float = 0.0, **options: str) -> dict:
    """One condition and the nats per token that it costs on average."""
    name, _, own = perturbation.rstrip(")").partition("(")
    parameters = {"Worst": dict(flips=strength, per="token", rounds=1, choose="worst")}.get(
        name, {}
    )
    parameters |= dict(option.split("=") for option in own.split(", ") if "=" in option)
    if own == "ratio":
        parameters["ratio"] = strength
    named = {"perturbation": perturbation, "strength": strength, "cost": cost}
    named |= {"name": name, "parameters": json.dumps(parameters)}
    expects = "none" if perturbation in ("clean", "Identity") else "selection"
    return named | PLAIN | {"expects": expects} | options


def losses(
    arms: list[dict],
    model: str = "cartesian",
    family: str | None = None,
    train_seed: int = 0,
    documents: int = 20,
    eval_seeds: int = 1,
    clean: float = 1.2,
    rng: int = 0,
) -> pd.DataFrame:
    """A tidy table of losses; arms that cost 0 equal the clean run bit for bit."""
    draw = np.random.default_rng(rng)
    lengths = draw.integers(1, 4, documents)
    unit = pd.DataFrame(
        {"document_id": np.repeat([f"doc{i:03}" for i in range(documents)], lengths)}
    )
    unit["sequence_id"] = [f"{d}/{i}" for i, d in enumerate(unit.document_id)]
    unit["domain"] = "made up"
    unit["num_tokens"] = draw.integers(100, 256, len(unit))
    unit["num_bytes"] = unit.num_tokens * 4 + draw.integers(0, 50, len(unit))
    fragile = np.repeat(draw.gamma(8.0, 1 / 8, documents), lengths)  # documents differ
    hard = np.repeat(draw.gamma(20.0, 1 / 20, documents), lengths)
    unit["clean_nll"] = unit.num_tokens * clean * hard
    unit = unit.assign(model=model, family=family or model, train_seed=train_seed)
    tables = []
    for a in [arm("clean"), *arms]:
        seeds = range(eval_seeds) if a["perturbation"] == "GaussianNoise" else [0]
        for eval_seed in seeds:
            noise = 1 + 0.05 * draw.standard_normal(len(unit))
            delta = a["cost"] * fragile * noise * unit.num_tokens
            options = {k: v for k, v in a.items() if k != "cost"}
            tables.append(
                unit.drop(columns="clean_nll").assign(
                    **options,
                    eval_seed=eval_seed,
                    condition=str(options | {"eval_seed": eval_seed}),
                    nll_sum=unit.clean_nll + delta,
                    kl_sum=0.8 * delta.abs(),
                    num_agree=unit.num_tokens * np.exp(-abs(a["cost"])),
                    delta_max=5 * np.abs(delta / unit.num_tokens),
                )
            )
    return pd.concat(tables, ignore_index=True)


def routing(losses: pd.DataFrame, layers: tuple[int, ...] = (0, 2)) -> pd.DataFrame:
    """Doses that grow with the strength of a condition and saturate."""
    keep = ["model", "family", "train_seed", "condition", "perturbation", "strength", *PLAIN]
    keep += ["name", "parameters"]
    rows = losses[losses.perturbation != "clean"]
    rows = rows[[*keep, "eval_seed", "document_id", "sequence_id", "num_tokens"]]
    dose = 1 - np.exp(-rows.strength.fillna(3.0))
    tokens = rows.num_tokens
    rows = rows.assign(
        flips=0.6 * dose * tokens,
        flips_total=0.65 * dose * tokens,
        changed=0.9 * dose * tokens,
        mass_moved=0.7 * dose * tokens,
        mass_lost=0.5 * dose * tokens,
        active=2.0 * tokens,
        output_change=0.3 * dose * tokens,
    )
    return pd.concat([rows.assign(layer=layer, stage=0) for layer in layers], ignore_index=True)


def study(train_seeds: tuple[int, ...] = (0,), documents: int = 40) -> pd.DataFrame:
    """All seven families under the conditions of Table 4, its controls and a noise curve."""
    tables = []
    for i, family in enumerate(FAMILIES):
        scale = 1 + 0.25 * ((i * 5) % 7)
        arms = [
            arm("Identity"),
            *[arm("DropTop", m, scale * 0.6 * m**1.3) for m in (1, 2, 3, 4)],
            arm("DropTop", 1, scale * 0.7, point="scores"),
            arm("DropChosen", 1, scale * 0.35),
            arm("DropUnchosen", 1, scale * 0.004),
            arm("RandomRouting", 1, scale * 2.5),
            arm("NoRouted", cost=scale * 4.0),
            *[arm("GaussianNoise", s, scale * 0.3 * s**1.2) for s in (0.25, 0.5, 1, 2, 4)],
        ]
        stages = 2 if family == "cartesian" else 1
        for stage in range(stages):
            for point in ("logits", "scores"):
                cost = scale * (0.6 if stages == 1 else 0.25 + 0.1 * stage)
                arms.append(arm("DropTop", 1, cost, where=f"stage {stage}", point=point))
        for train_seed in train_seeds:
            tables.append(
                losses(
                    [] if family == "dense" else arms,
                    model=family,
                    train_seed=train_seed,
                    documents=documents,
                    eval_seeds=2,
                    clean=1.3 - 0.02 * i + 0.01 * train_seed,
                    rng=7 + train_seed,
                )
            )
    return pd.concat(tables, ignore_index=True)


def sites() -> pd.DataFrame:
    """K, renormalization and the routed share of the families in `study`."""
    rows = []
    for family in FAMILIES[1:]:
        for layer in (0, 2):
            for stage in range(2 if family == "cartesian" else 1):
                top_k = np.nan if family == "top_p" else 2
                values = {"top_k": top_k, "renormalize": family != "top_p", "active": 2.6}
                values["routed_share"] = 0.55
                for metric, value in values.items():
                    rows.append((family, 0, layer, stage, metric, float(value)))
    return pd.DataFrame(rows, columns=["model", "train_seed", "layer", "stage", "metric", "value"])


def set_costs(table: pd.DataFrame, costs: dict[str, float | np.ndarray]) -> pd.DataFrame:
    """Losses in which the condition of this label costs exactly so much per token; an array: of
    each document in the order of their ids."""
    names = label(table)
    clean = table[table.perturbation == "clean"].set_index("sequence_id")
    document = np.unique(table.document_id, return_inverse=True)[1]
    out = table.copy()
    for name, cost in costs.items():
        assert (names == name).any(), name
        rows = names == name
        per_token = np.broadcast_to(cost, document.max() + 1)[document[rows]]
        base = clean.nll_sum[table.sequence_id[rows]].to_numpy()
        out.loc[rows, "nll_sum"] = base + per_token * table.num_tokens[rows]
    return out


def tokens(losses: pd.DataFrame, vocabulary: int = 50, rng: int = 0):
    """Every token's loss, as `Results.tokens`: those of a sequence differ and have its sum."""
    draw = np.random.default_rng(rng)
    frames = {}
    for key, rows in losses.groupby(["model", "train_seed", "condition", "perturbation"]):
        nll = [
            (row.nll_sum * share).astype(np.float32).tobytes()
            for row in rows.itertuples()
            for share in [draw.dirichlet(np.full(row.num_tokens, 2.0))]
        ]
        frame = rows[["document_id", "sequence_id"]].assign(nll=nll)
        if key[3] == "clean":
            targets = [
                (vocabulary * draw.random(n) ** 3).astype(np.int32).tobytes()
                for n in rows.num_tokens
            ]
            frame = frame.assign(targets=targets)
        name = "clean" if key[3] == "clean" else key[2]
        frames[key[0], key[1], name] = frame
    return lambda *key: frames[key]
