"""Experts in each other's place: real forwards beside linear estimates.

Shapes: T tokens, K slots, C conditions, S sequences, L length, D documents, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from analysis.adapters import Router, owning, routed_adapter
from analysis.overlap.measure import measure_overlap
from analysis.overlap.removal import rises
from analysis.overlap.routed import by_document, routed_tokens
from analysis.perturb import DOWNSTREAM, Condition, Perturbation, RouterContext, Where, sites_of
from analysis.stats import SITE, Bootstrap, check_columns
from cartmoe.config import check_choice, check_whole
from cartmoe.data import Sequences
from cartmoe.fields import Count, declared
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

LINEAR = {"value": "linear", "low": "linear_low", "high": "linear_high"}


@declared
class Substitute(Perturbation):
    """Expert `by` runs in the slots of `expert`, at its weight; where it is chosen already its
    weights add."""

    expert: Count
    by: Count

    def __post_init__(self) -> None:
        if self.by == self.expert:
            raise ValueError(f"by is {self.by}; it must be another one than expert")

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for an expert that a router does not have."""
        for site in sites:
            for name, number in {"expert": self.expert, "by": self.by}.items():
                if number >= site.num_experts:
                    last = site.num_experts - 1
                    raise ValueError(f"{name} is {number}; {site.name} has experts 0..{last}")

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The same slots with the same weights."""
        ids_TK = torch.where(routing.ids_TK == self.expert, self.by, routing.ids_TK)
        return routing._replace(ids_TK=ids_TK)


@owning
def substitution(
    model: object,
    docs: Sequences,
    site: Any = None,
    *,
    lowest: int = 8,
    random: int = 16,
    downstream: Literal["reroute", "replay"] = "reroute",
    batch_size: int = 16,
    bootstrap: Bootstrap = Bootstrap(),
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """What it costs that expert_j runs in expert_i's slots at its weight, for all pairs to first
    order, and measured by real forwards on some of them.

    site         a `RouterSite`, "layer 2 stage 1", ...; of several (None: all) each for itself
    lowest       pairs to measure that have the lowest linear estimates
    random       pairs to measure that are drawn from all others
    downstream   "reroute": later routers work from the stream that reaches them; "replay": they
                 decide as in the clean run

    A row an ordered pair: model, family, train_seed, layer, stage, expert_i, expert_j; in nats per
    token routed to expert_i linear (the metric "substitution", whose gradient goes through the
    weights of later routers, but not through their choice) with jackknife bounds linear_low and
    linear_high, and measured with BCa bounds over documents, low and high; num_tokens routed to
    expert_i; chosen ("lowest", "random" or "", which has no measured); probability with which the
    pair was to be measured (weigh by its inverse); downstream, num_documents. A pair whose expert_i
    has no token is NaN and is never chosen. Bounds are NaN where a resample of documents may have
    no token.

    Raises `ValueError` for a dense model, sites that do not exist or have one expert alone, and
    numbers out of range.
    """
    lowest = check_whole("lowest", lowest, 0)
    random = check_whole("random", random, 0)
    check_choice("downstream", downstream, DOWNSTREAM)
    if not lowest + random:
        raise ValueError(
            "lowest and random are 0; the linear estimates alone are in "
            "measure_overlap(model, docs, 'substitution')"
        )
    model = routed_adapter(model)
    for own in sites_of(model, site, "site"):
        if own.num_experts == 1:
            raise ValueError(f"site is {site!r}; {own.name} has no other expert to run instead")
    options: Any = dict(batch_size=batch_size, seed=seed, progress=progress)
    options |= dict(confidence=bootstrap.confidence)
    table = measure_overlap(model, docs, "substitution", site, **options).table("substitution")
    table = table.rename(columns=LINEAR)[[*SITE, "expert_i", "expert_j", *LINEAR.values()]]
    by_site = routed_tokens(model, docs, batch_size)
    routed = {own.place: counts_SE for own, counts_SE in by_site.items()}
    tokens = [routed[p.layer, p.stage][:, p.expert_i].sum() for p in table.itertuples()]
    table = table.assign(
        measured=np.nan, low=np.nan, high=np.nan, num_tokens=np.array(tokens, np.int64)
    )
    choices = [_choose(pairs, lowest, random, seed) for _, pairs in table.groupby(SITE, sort=False)]
    table = table.join(pd.concat(choices)).assign(downstream=downstream)
    rows = table.index[table.chosen != ""]
    places = table.loc[rows, ["layer", "stage", "expert_i", "expert_j"]].to_numpy().tolist()
    conditions = [
        Condition(Substitute(i, j), Where(layer, stage), downstream=downstream)
        for layer, stage, i, j in places
    ]
    nats_CD = rises(model, docs, conditions, batch_size, progress)
    routed_CD = by_document(docs, [routed[layer, stage][:, i] for layer, stage, i, _ in places])
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without tokens of an expert
        found = bootstrap.intervals(nats_CD, routed_CD)
    table.loc[rows, ["measured", "low", "high"]] = np.transpose(found)
    return table.assign(num_documents=routed_CD.shape[1])


def calibration(frame: pd.DataFrame) -> pd.DataFrame:
    """How well the linear estimates of `substitution` say what was measured.

    A row a site and downstream: intercept and slope of measured on linear and mean_error (measured
    - linear), each pair weighed by the inverse of the probability with which it was to be measured,
    so that they speak of all pairs; rank_correlation (Spearman's, of the measured pairs, not
    weighed); num_pairs measured and num_all; mean_measured over all pairs as it is estimated from
    those, and its standard error mean_measured_se (0 if all were measured). Where none were drawn
    at random, all of it speaks of the lowest alone and mean_measured_se is NaN.
    """
    keys = [*SITE, "downstream"]
    check_columns("pairs of substitution", frame, [*keys, "chosen", "probability"])
    groups = frame.groupby(keys, sort=False)
    return pd.DataFrame([dict(zip(keys, key, strict=True)) | _calibrate(f) for key, f in groups])


def _calibrate(pairs: pd.DataFrame) -> dict[str, float]:
    done = pairs[pairs.chosen != ""]
    x, y = done.linear.to_numpy(), done.measured.to_numpy()
    weight = (1 / done.probability).to_numpy()
    weight = weight / weight.sum()
    mean_x, mean_y = weight @ x, weight @ y
    with np.errstate(invalid="ignore", divide="ignore"):  # of equal estimates there is no slope
        slope = (weight @ ((x - mean_x) * (y - mean_y))) / (weight @ (x - mean_x) ** 2)
    # The lowest are all measured; of the others a sample without replacement (Cochran, Sampling
    # Techniques, 1977, ch. 2 and 5).
    drawn, total = done[done.chosen == "random"].measured, pairs.linear.notna().sum()
    n, others = len(drawn), total - (done.chosen == "lowest").sum()
    error = 0.0 if n == others else others / total * np.sqrt(1 - n / others) * drawn.sem()
    return {
        "intercept": mean_y - slope * mean_x,
        "slope": slope,
        "mean_error": mean_y - mean_x,
        "rank_correlation": done.linear.rank().corr(done.measured.rank()),
        "num_pairs": len(done),
        "num_all": total,
        "mean_measured": mean_y,
        "mean_measured_se": error,
    }


def _choose(pairs: pd.DataFrame, lowest: int, random: int, seed: int) -> pd.DataFrame:
    """chosen and probability of one site's pairs."""
    order = pairs.linear.dropna().sort_values(kind="stable").index
    low, others = order[:lowest], order[lowest:]
    key = [seed, *pairs[["layer", "stage"]].iloc[0]]
    drawn = np.random.default_rng(key).permutation(others)[:random]
    probability = pd.Series(np.nan, pairs.index)
    probability[low], probability[others] = 1.0, len(drawn) / max(1, len(others))
    chosen = pd.Series("", pairs.index)
    chosen[low], chosen[drawn] = "lowest", "random"
    return pd.DataFrame({"chosen": chosen, "probability": probability})
