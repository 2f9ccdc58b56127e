"""Do margins say which decisions noise will change? Predicted against measured flips.

Shapes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.special import log_ndtr, ndtr
from tqdm.auto import tqdm

from analysis.adapters import (
    DenseRouting,
    Router,
    batches,
    check_documents,
    num_batches,
    owning,
    routed_adapter,
)
from analysis.measure.calibrate import calibrate, calibration_documents
from analysis.measure.clean import CleanPass
from analysis.measure.rows import SequenceRows, means
from analysis.perturb import Condition, GaussianNoise, Noise, RouterContext, sites_of
from analysis.stats import Bootstrap
from cartmoe.data import Sequences
from cartmoe.routing import Routing, stable_topk

STEP, REACH = 0.25, 9.0  # of the quadrature, in standard deviations of the noise


@owning
@torch.no_grad()
def flip_prediction(
    model: object,
    docs: Sequences,
    sigmas: float | Sequence[float],
    *,
    scale: Literal["token", "site", "absolute"] = "token",
    where: str = "all",
    seed: int = 0,
    draws: int = 32,
    calibration: Sequences | None = None,
    batch_size: int = 16,
    bootstrap: Bootstrap = Bootstrap(),
    progress: bool = True,
) -> pd.DataFrame:
    """Flips that `GaussianNoise` should make, going by clean logits, and those that it makes.

    sigmas, scale   of the noise: it is sigma * s * n (see `GaussianNoise`)
    where           sites. Noise is put on the clean logits of each, so what noise at one site does
                    to others has no part in it
    draws           of the simulation, where there is one

    A row a sigma and site, and for each sigma one of all sites (where "all"), with model, family,
    train_seed, where, scale, sigma, predicted_by, num_documents, num_tokens and, with BCa bounds
    over documents (NAME_low, NAME_high), means over tokens of
    margin             see `Router.margin`
    pair_predicted     Phi(-margin / (sqrt 2 sigma s)): that the noise puts the first expert that
                       is not used before the last that is
    pair_measured      that it did so, whatever other experts did
    changed_predicted  probability that the set of experts changes in any way, from all of them:
                       1 - integral of prod_{i used} SF((x - z_i) / (sigma s)) d prod_{j not used}
                       Phi((x - z_j) / (sigma s)), x the highest noisy logit of those not used
    changed_measured   that the set changed

    That holds for routers that use the k highest logits (predicted_by "margins"). With top-p or a
    selection bias it does not: their margins are in other units, the pair's columns are NaN, and
    changed_predicted is the share of `draws` independent draws of noise that change the token's set
    (predicted_by "simulation"). Where all experts are used, the pair is NaN and nothing changes.

    Raises `ValueError` for a dense model, a `where` without sites or with tokens of a kind, no
    documents, and a sigma that is not above 0.
    """
    model = routed_adapter(model)
    noises = [GaussianNoise(sigma, scale) for sigma in np.atleast_1d(np.asarray(sigmas))]
    if not noises or not all(noise.sigma > 0 for noise in noises):
        raise ValueError(f"sigmas is {sigmas!r}; give numbers above 0")
    sites = sites_of(model, where)
    check_documents(docs, model)
    stats = calibrate(model, calibration_documents(calibration, docs, model)).sites
    rows = SequenceRows()
    todo = tqdm(
        batches(model, docs, batch_size),
        total=num_batches(docs, batch_size),
        unit="batch",
        disable=not progress,
    )
    for batch in todo:
        clean = CleanPass.of(model, batch)
        for site in sites:
            routing, router, tokens = clean.routings[site], model.router(site), clean.tokens
            own = Noise(seed, site.place, tokens.sequence_T, tokens.position_T, {})
            ctx = RouterContext(site, routing, None, tokens, own, stats[site])
            by = "margins" if router.by_logits else "simulation"
            for noise in noises:
                columns = _flips(routing, router, ctx, noise, draws)
                for place in ("all", str(site)):
                    rows.add(batch, columns, where=place, sigma=noise.sigma, predicted_by=by)
    table = means(rows.frame(), ["where", "sigma", "predicted_by"], bootstrap)
    table = table.sort_values("sigma", kind="stable", ignore_index=True).assign(
        model=model.name, family=model.family, train_seed=model.train_seed, scale=scale
    )
    first = ["model", "family", "train_seed", "where", "scale"]
    return table[[*first, *(name for name in table if name not in first)]]


def _flips(
    routing: Routing, router: Router, ctx: RouterContext, noise: GaussianNoise, draws: int
) -> dict[str, Tensor]:
    """(T,) each column at one site."""
    k, E = routing.ids_TK.shape[-1], ctx.site.num_experts
    margin_T = router.margin(routing, DenseRouting(routing).count_T)
    undefined_T = torch.full_like(margin_T, torch.nan)
    columns = {"margin": margin_T, "pair_predicted": undefined_T, "pair_measured": undefined_T}
    if router.by_logits:
        unit = noise.unit(routing.logits_TE, ctx)
        std_T = noise.sigma * torch.as_tensor(unit, device=margin_T.device).double().flatten()
        std_T = std_T.expand(len(margin_T))
        predicted_T = change_probability(routing.logits_TE, k, std_T)
        if k < E:
            columns["pair_predicted"] = pair_probability(margin_T, std_T)
            pair_T2 = stable_topk(routing.scores_TE, k + 1)[:, -2:]
            last_T, next_T = noise(routing.logits_TE, ctx).gather(-1, pair_T2).unbind(-1)
            tie_T = (next_T == last_T) & (pair_T2[:, 1] < pair_T2[:, 0])
            columns["pair_measured"] = (next_T > last_T) | tie_T
    else:
        streams = (ctx.noise.stream(("prediction", i)) for i in range(draws))
        drawn = [_changed(router, replace(ctx, noise=stream), noise) for stream in streams]
        predicted_T = torch.stack(drawn).double().mean(0)
    changed_T = _changed(router, ctx, noise)
    return columns | {"changed_predicted": predicted_T, "changed_measured": changed_T}


def _changed(router: Router, ctx: RouterContext, noise: GaussianNoise) -> Tensor:
    """(T,) whether the noise leads to another set of experts."""
    changed = Condition(noise).apply(ctx.clean, router, ctx)
    return (DenseRouting(ctx.clean).used_TE != DenseRouting(changed).used_TE).any(-1)


def pair_probability(margin_T: Tensor, std_T: Tensor) -> Tensor:
    """(T,) fp64: that independent normal noise of this std on both makes up for the margin."""
    margin_T = margin_T.double()
    return torch.where(std_T > 0, ndtr(-margin_T / (math.sqrt(2) * std_T)), 0.0)


def change_probability(logits_TE: Tensor, k: int, std_T: Tensor) -> Tensor:
    """(T,) fp64: that the k highest logits are others after independent normal noise of this std.

    Nothing changes if the lowest noisy logit of the k exceeds the highest x of the others, whose
    density is F'(x), F = prod Phi((x - z_j) / std). By the trapezoidal rule, which converges
    exponentially here, in t = (x - z_(k+1)) / std from -9 to 9: beyond it there is nothing.
    """
    if k == logits_TE.shape[-1]:
        return torch.zeros_like(std_T)
    z_TE = logits_TE.double().sort(-1, descending=True).values
    a_TE = (z_TE - z_TE[:, k : k + 1]) / std_T[:, None]
    used_TK, other_TJ = a_TE[:, :k], a_TE[:, k:]
    stays_T = torch.zeros_like(std_T)
    for t in torch.arange(-REACH, REACH + STEP, STEP).tolist():
        log_below_TJ = log_ndtr(t - other_TJ)
        log_density_TJ = -((t - other_TJ) ** 2) / 2 - math.log(2 * math.pi) / 2
        hazard_T = (log_density_TJ - log_below_TJ).exp().sum(-1)
        above_T = log_ndtr(used_TK - t).sum(-1)
        stays_T += (log_below_TJ.sum(-1) + above_T).exp() * hazard_T * STEP
    return torch.where(std_T > 0, (1 - stays_T).clamp(0, 1), 0.0)
