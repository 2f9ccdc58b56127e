"""Conditions at work in a running model, and calibration, which only listens to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from analysis.adapters.base import Adapter, State
from analysis.conditions import Condition, Where
from analysis.context import Calibration, RouterContext, SiteStats, Tokens
from analysis.noise import Noise, mix64, sequence_hash
from analysis.perturb import Perturbation
from cartmoe.hooks import RouterSite
from cartmoe.routing import Router, Routing, expert_counts

# What an observer is told at each perturbed site: the site, R, R'.
Observer = Callable[[RouterSite, Routing, Routing], None]


class Intervention:
    """One condition, as the function that `Adapter.edit` calls at every site.

    recorded   the clean run's decisions by site, for downstream "replay"
    where      the sites to perturb, if not those of `condition.where`
    """

    def __init__(
        self,
        condition: Condition,
        calibration: Calibration | None = None,
        recorded: Mapping[RouterSite, Routing] | None = None,
        where: Callable[[RouterSite], bool] | None = None,
        observe: Observer = lambda site, base, changed: None,
    ):
        self.condition, self.calibration, self.observe = condition, calibration, observe
        self.recorded, self.where = recorded, where or condition.where

    def begin(
        self,
        tokens: Tokens,
        draws: dict,
        earlier: Mapping[RouterSite, Routing] | None = None,
    ) -> None:
        """A forward over these tokens comes next. `draws` keeps noise for all that share it."""
        self.tokens, self.draws, self.earlier = tokens, draws, dict(earlier or {})

    def __call__(self, routing: Routing, router: Router, site: RouterSite, x_TD: Tensor) -> Routing:
        replay = self.condition.downstream == "replay"
        base = self.recorded[site] if replay else routing
        changed = base
        if self.where(site):
            stats = self.calibration.sites.get(site) if self.calibration else None
            key = (site.layer, site.stage)
            noise = Noise(
                self.condition.eval_seed,
                key,
                self.tokens.sequence_T,
                self.tokens.position_T,
                self.draws,
            )
            ctx = RouterContext(
                site, base, None if replay else x_TD, self.tokens, noise, stats, self.earlier
            )
            changed = self.condition.apply(base, router, ctx)
            self.observe(site, base, changed)
        self.earlier[site] = changed
        return changed


@contextmanager
def perturbed(
    model: Adapter,
    perturbation: Perturbation,
    where: str | Where | Callable[[RouterSite], bool] = "all",
    *,
    point: str = "logits",
    effect: str = "full",
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    stats: Calibration | None = None,
) -> Iterator[dict[RouterSite, int]]:
    """Within the block, the model routes under the perturbation. Yields firings by site.

    model          a model under study, or a `cartmoe.LanguageModel`
    where          "all", "layer 2", "stage 0", ... (see `Where`), or a function of a RouterSite
    sequence_ids   (B,) int64, the ids that key the noise of the rows; by default a hash of each
                   row's tokens
    stats          from `calibrate`; some perturbations need them and say so

    On exit, also by an exception, no hook of ours is left and every other one is. Raises
    `ValueError` for wrong arguments and for a compiled model, `RuntimeError` if a site that should
    have fired did not.
    """
    model = as_adapter(model)
    selector = None
    if callable(where) and not isinstance(where, Where):
        selector, where = where, "all"
    condition = Condition(perturbation, where, point=point, effect=effect, eval_seed=seed)
    selector = selector or condition.where
    intervention = Intervention(condition, stats, where=selector)

    def begin(tokens_BL: Tensor) -> None:
        ids = sequence_hash(tokens_BL) if sequence_ids is None else torch.as_tensor(sequence_ids)
        if len(ids) != len(tokens_BL):
            raise ValueError(
                f"sequence_ids has {len(ids)} rows; the model was given {len(tokens_BL)}"
            )
        intervention.begin(Tokens.of(tokens_BL, ids.to(tokens_BL.device)), {})

    with model.on_forward(begin), model.edit(intervention, selector) as fired:
        yield fired


def as_adapter(model: object) -> Adapter:
    """The model as a model under study; what already is one is returned as it is."""
    from analysis.adapters.cartmoe import CartMoEAdapter
    from cartmoe.model import LanguageModel

    if isinstance(model, LanguageModel):
        return CartMoEAdapter(model)
    if isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; wrap it with analysis.adapt(model, tokenizer), or "
            "pass a cartmoe.LanguageModel"
        )
    return model


@torch.no_grad()
def calibrate(
    model: Adapter, sequences, *, rows: int = 2048, batch_size: int = 16, seed: int = 0
) -> Calibration:
    """Statistics of clean routing over these sequences (a `cartmoe.data.Sequences`).

    rows   logits kept of each site: those of the tokens with the lowest hash, so the reservoir
           does not depend on the batch size. Padding takes no part.
    """
    model = as_adapter(model)
    segments = model.segments()
    kept: dict[RouterSite, list[Tensor]] = {site: [] for site in model.sites()}
    counts: dict[RouterSite, Tensor] = {}
    priorities = []
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size].to(model.device)
        used_T = (batch.targets_SL >= 0).flatten()
        tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S)
        key_T = mix64(mix64(tokens.sequence_T + seed) + tokens.position_T)[used_T]
        priorities.append(key_T)
        state = State(None, batch.tokens_SL)
        for segment in segments:
            state = segment.run(state)
        model.check()
        for site, routing in zip(model.sites(), state.decisions, strict=True):
            routing = Routing(*(t[used_T] for t in routing))
            kept[site].append(routing.logits_TE)
            counts[site] = counts.get(site, 0) + expert_counts(routing)
    if not priorities:
        raise ValueError("calibration needs at least one sequence")
    order = torch.cat(priorities).argsort()[:rows]
    stats = {}
    for site, parts in kept.items():
        reservoir = torch.cat(parts)[order]
        load_E = counts[site] / counts[site].sum()
        stats[site] = SiteStats(reservoir, reservoir.double().std().item(), load_E)
    return Calibration(stats)
