"""Conditions at work in a running model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.adapters import Adapter, Experts, Given, Router, Segment, State, as_adapter, using
from analysis.measure.cached import CachedRows
from analysis.measure.clean import CleanPass
from analysis.measure.reuse import Table
from analysis.perturb import (
    Calibration,
    Condition,
    Noise,
    Perturbation,
    ResidualNoise,
    RouterContext,
    Tokens,
    Where,
    sites_of,
    token_kinds,
)
from cartmoe.hooks import RouterSite
from cartmoe.interrupt import restoring
from cartmoe.routing import Routing

# What an observer is told at each perturbed site: the site, R, R'.
Observer = Callable[[RouterSite, Routing, Routing], None]


class Intervention:
    """One condition, as the function that `Adapter.hooked` calls at every site.

    recorded   the clean run's decisions by site, for downstream "replay"
    where      the sites to perturb, if not those of `condition.where`
    tables     by site, what stands in its experts' place
    check      whether a perturbation of yours is asked twice (`Condition.apply_purely`)
    """

    def __init__(
        self,
        condition: Condition,
        calibration: Calibration | None = None,
        recorded: Mapping[RouterSite, Routing] | None = None,
        where: Callable[[RouterSite], bool] | None = None,
        observe: Observer = lambda site, base, changed: None,
        tables: Mapping[RouterSite, Table] | None = None,
        check: bool = False,
    ):
        self.condition, self.calibration, self.observe = condition, calibration, observe
        self.recorded, self.where = recorded or {}, where or condition.where
        self.tables, self.check = tables or {}, check
        self.tokens: Any = None  # Tokens, once they are announced

    def begin(
        self, tokens: Tokens, draws: dict, earlier: Mapping[RouterSite, Routing] | None = None
    ) -> None:
        """A forward over these tokens comes next. `draws` keeps noise for all that share it.

        earlier   decisions of sites that it will not run, nobody having perturbed them
        """
        self.tokens, self.draws = tokens, draws
        self.touched: dict[RouterSite, Tensor] = {}  # (T,) bool: what the condition could change
        self.earlier, self.own = dict(earlier or {}), dict(earlier or {})

    @restoring
    def attached(
        self, model: Adapter, where: Callable[[RouterSite], bool] | None = None
    ) -> Iterator[None]:
        """Within the block the model runs under the condition; `where`: the sites that will run,
        by default all."""
        self.model = model
        self.intended: dict[RouterSite, Routing] = {}
        self.outputs: dict[RouterSite, Tensor] = {}  # under what was intended
        noisy = isinstance(self.condition.perturbation, ResidualNoise)
        with model.hooked(
            router=self,
            experts=self._experts if noisy or self.tables else None,
            output=self._add_noise if noisy else None,
            where=where,
        ):
            yield

    @restoring
    def rerunning(self, model: Adapter, clean: CleanPass) -> Iterator[tuple[list[Segment], State]]:
        """Within the block a forward over the clean pass's tokens runs under the condition, from
        the first segment in which it acts: the segments from there, and the stream before them."""
        first = clean.first_segment(self.where)
        remaining = {site for segment in clean.segments[first:] for site in segment.sites}
        earlier = {s: r for s, r in clean.routings.items() if s not in remaining}
        self.begin(clean.tokens, clean.draws, earlier)
        with self.attached(model, remaining.__contains__):
            yield clean.segments[first:], clean.states[first]

    def __call__(self, routing: Routing, router: Router, site: RouterSite, x_TD: Tensor) -> Routing:
        condition, tokens = self.condition, self.tokens
        if tokens is None or len(tokens.token_ids_T) != len(routing.ids_TK):
            raise RuntimeError(
                f"{site.name} decided about {len(routing.ids_TK)} tokens that nobody announced: "
                "within `perturbed` a model must run as a whole; to measure it, pass the "
                "perturbation to sweep"
            )
        replay = condition.downstream == "replay"
        base = self.recorded[site] if replay else routing
        changed = base
        if self.where(site):
            stats = self.calibration.sites.get(site) if self.calibration else None
            seen_TD = None if replay else x_TD
            ctx = RouterContext(
                site, base, seen_TD, tokens, self._noise(site), stats, self.earlier, self.own
            )
            acting, p = condition, condition.perturbation
            if noisy := isinstance(p, ResidualNoise):  # what `of` would do; the decision stays
                acting = replace(condition, perturbation=p.of)
            apply = acting.apply_purely if self.check else acting.apply
            moved = apply(base, router, ctx)
            if not noisy:
                changed = moved
            elif moved is not base:
                self.intended[site] = moved
            self.touched[site] = condition.touched(ctx)
            self.observe(site, base, changed)
        self.earlier[site], self.own[site] = changed, base
        return changed

    def _noise(self, site: RouterSite) -> Noise:
        seed, tokens = self.condition.eval_seed, self.tokens
        return Noise(seed, site.place, tokens.sequence_T, tokens.position_T, self.draws)

    def _experts(self, x_TD: Tensor, routing: Routing, site: RouterSite, own: Experts) -> Tensor:
        table, intended = self.tables.get(site), self.intended.pop(site, None)

        def compute(decision: Routing) -> Tensor:
            return table(x_TD, decision, own) if table else own(x_TD, decision)

        if intended is not None:
            self.outputs[site] = self.model.combine(site, x_TD, compute(intended))
        return compute(routing)

    def _add_noise(self, output_TD: Tensor, site: RouterSite) -> Tensor | None:
        """For `ResidualNoise`: a random direction as long as the change that was intended."""
        if site not in self.outputs:
            return None
        change_TD = (self.outputs.pop(site) - output_TD).float()
        noise_TD = self._noise(site).normal(output_TD.shape[-1], "residual")
        length_T1 = change_TD.norm(dim=-1, keepdim=True) / noise_TD.norm(dim=-1, keepdim=True)
        return output_TD + (length_T1 * noise_TD).to(output_TD.dtype)


@restoring
def perturbed(
    model: Adapter,
    perturbation: Perturbation,
    where: str | Where | Callable[[RouterSite], bool] = "all",
    *,
    point: Literal["logits", "scores"] = "logits",
    effect: str = "full",
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    stats: Calibration | None = None,
) -> Iterator[dict[RouterSite, int]]:
    """Within the block, the model routes under the perturbation. Yields firings by site.

    model          a model under study, or a `cartmoe.LanguageModel`
    where          "all", "layer 2", "stage 0", ... (see `Where`), or a function of a RouterSite
    sequence_ids   (B,) int64, the ids that key the noise of the rows; by default a hash of each
                   row's tokens without padding, and, where a cache goes on with a forward, that
                   of the row that it began with; a text that grows without a cache needs them
    stats          from `calibrate`; some perturbations need them and say so

    On exit, also by an exception, no hook of ours is left and every other one is. Raises
    `ValueError` for wrong arguments and for a compiled model, `RuntimeError` if a site that should
    have fired did not.
    """
    model = as_adapter(model)
    selector = where if callable(where) and not isinstance(where, Where) else None
    place: Any = "all" if selector else where
    condition = Condition(perturbation, place, point=point, effect=effect, eval_seed=seed)
    selector = selector or condition.where
    chosen = sites_of(model, selector, tokens=True) if model.sites() else []
    fired = dict.fromkeys(chosen, 0)
    if isinstance(perturbation, Perturbation):
        perturbation.check(chosen)

    def count(site: RouterSite, base: Routing, changed: Routing) -> None:
        fired[site] += 1

    intervention = Intervention(condition, stats, where=selector, observe=count)
    kinds_V = token_kinds(model, [condition.where])

    rows = CachedRows()

    def begin(given: Given | None, left: Any) -> None:
        if given is None:  # what was announced for one forward is not for another one
            intervention.tokens = None
            rows.left(left)
            return
        ids = rows.of(given) if sequence_ids is None else torch.as_tensor(sequence_ids)
        if len(ids) != len(given.tokens_BL):
            has = "its cache, in this block," if sequence_ids is None else "sequence_ids"
            raise ValueError(
                f"{has} has {len(ids)} rows; the model was given {len(given.tokens_BL)}"
            )
        intervention.begin(Tokens.of(given, ids.to(given.tokens_BL.device), kinds_V), {})

    # All routers, also those that stay as they are: a perturbation may look back at them.
    with using(model), rows, model.hooked(forward=begin), intervention.attached(model):
        yield fired
