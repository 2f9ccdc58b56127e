"""Would other experts have been better? The router's own route against the best of n others.

Shapes: T tokens, D model, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from analysis.adapters import (
    Router,
    batches,
    check_documents,
    num_batches,
    owning,
    routed_adapter,
    run,
)
from analysis.measure.clean import CleanPass
from analysis.measure.intervene import Intervention
from analysis.measure.losses import token_nll
from analysis.measure.reuse import Table, fits
from analysis.measure.rows import SequenceRows, means
from analysis.perturb import (
    Condition,
    GumbelNoise,
    Perturbation,
    RouterContext,
    Where,
    hash_key,
    mix64,
    sites_of,
    where_tokens,
)
from analysis.stats import Bootstrap
from cartmoe.config import check_whole
from cartmoe.data import IGNORE, Sequences
from cartmoe.fields import Count, NonNegative, Positive, declared
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

SEEDS = 2**20  # alternatives of one seed are those of no other


@declared
class Alternative(Perturbation):
    """Another route of equal cost: as many experts as the token uses, drawn with `GumbelNoise`,
    that is, in proportion to exp(z / tau), and weighted as the router weighs them.

    every, offset   act on the tokens at positions offset, offset + every, ...
    """

    tau: NonNegative = 1.0
    every: Positive = 1
    offset: Count = 0

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """Only the draw is noisy, not the weights."""
        ids_TK = router.route(GumbelNoise(self.tau)(routing.logits_TE, ctx)).ids_TK
        count_T1 = (routing.weights_TK != 0).sum(-1, keepdim=True)
        used_TK = torch.arange(ids_TK.shape[-1], device=ids_TK.device) < count_T1
        weights_TK = router.weigh(routing.scores_TE, ids_TK, used_TK)
        changed = routing._replace(ids_TK=ids_TK, weights_TK=weights_TK)
        if self.every == 1:
            return changed
        inside_T = ctx.tokens.position_T % self.every == self.offset
        return where_tokens(inside_T, changed, routing)


@owning
@torch.no_grad()
def regret(
    model: object,
    docs: Sequences,
    site: RouterSite | str,
    *,
    n: int = 16,
    tau: float = 1.0,
    every: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    bootstrap: Bootstrap = Bootstrap(),
    progress: bool = True,
) -> pd.DataFrame:
    """Regret of the router's routes at one site, in nats per token.

    site    a `RouterSite`, or text such as "layer 2 stage 0" that selects one
    n, tau  alternatives of each token; see `Alternative`
    every   tokens of a sequence that take alternatives together in a forward are so many apart.
            With 1 all do, and then a token's loss also has in it what the alternatives of those
            before it did through attention; more takes as many times the forwards

    A row for the best of 1, 2, 4, ... n: where, n, tau, every, num_documents, num_tokens, and with
    BCa bounds over documents (NAME_low, NAME_high)
    regret   nll of the own route - the lowest nll among the first n alternatives; below 0 where all
             are worse
    null     the same with the targets of the batch's tokens shuffled among them: what it would be
             if targets had nothing to do with routes. The best of n on one realized target is
             better by chance alone; and the own route may be more sure of itself than others,
             right or wrong, so that this is not 0 for n = 1
    excess   regret - null: what better routes for these very targets there were to be found
    cost     mean nll of the n alternatives - nll of the own route: whether routes matter here

    The shuffle depends on what is in a batch, so all but the regret depend a little on
    batch_size. Raises `ValueError` for a dense model, a site that is not exactly one, numbers below
    1, and no documents.
    """
    model = routed_adapter(model)
    found = sites_of(model, site, "site")
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise ValueError(f"site is {site!r}, which is {listed}; give one of them")
    (site,) = found
    n, every = check_whole("n", n, 1), check_whole("every", every, 1)
    check_documents(docs, model)
    sizes = sorted({*(2**i for i in range(n.bit_length())), n})
    rows = SequenceRows()
    forwards = num_batches(docs, batch_size) * n * every
    with tqdm(total=forwards, unit="batch", disable=not progress) as bar:
        for batch in batches(model, docs, batch_size):
            clean = CleanPass.of(model, batch)
            targets_2T = torch.stack([clean.losses.targets_T, _shuffled(clean, seed)])
            own_2T = token_nll(model, clean.losses.hidden_TD, targets_2T)
            best_2T, total_T = torch.full_like(own_2T, torch.inf), torch.zeros_like(own_2T[0])
            others = _alternatives(model, clean, site, n, tau, every, seed, targets_2T, bar.update)
            for number, other_2T in enumerate(others, 1):
                best_2T = torch.minimum(best_2T, other_2T)
                total_T += other_2T[0] - own_2T[0]
                if number in sizes:
                    regret_T, null_T = own_2T - best_2T
                    columns = {"regret": regret_T, "null": null_T, "excess": regret_T - null_T}
                    rows.add(batch, columns | {"cost": total_T / number}, n=number)
    table = means(rows.frame(), ["n"], bootstrap)
    table.insert(0, "where", str(site))
    table.insert(2, "tau", float(tau))
    table.insert(3, "every", every)
    return table


def _shuffled(clean: CleanPass, seed: int) -> Tensor:
    """(T,) the targets, each at a random other place among those that have one."""
    targets_T, tokens = clean.losses.targets_T, clean.tokens
    used = (targets_T != IGNORE).nonzero()[:, 0]
    key = mix64(mix64(tokens.sequence_T + hash_key(seed, "targets")) + tokens.position_T)
    shuffled_T = targets_T.clone()
    shuffled_T[used] = targets_T[used[key[used].argsort()]]
    return shuffled_T


def _alternatives(
    model, clean: CleanPass, site: RouterSite, n, tau, every, seed, targets_2T: Tensor, advance
) -> Iterator[Tensor]:
    """(2, T) nll under each of n alternatives; from the clean stream that enters the site."""
    alone = clean.segments[clean.first_segment(site.__eq__)].sites == (site,)
    pays = alone and fits(model, site, len(targets_2T[0])) and n * every > site.num_experts
    tables = {site: Table(model, site, clean.routings[site])} if pays else None
    for number in range(n):
        clean.draws.clear()  # of the alternative before: kept, they would take n times the memory
        nll_2T = torch.zeros(targets_2T.shape, device=targets_2T.device)
        for offset in range(every):
            asked = Alternative(tau, every, offset)
            condition = Condition(asked, Where.parse(site), eval_seed=seed * SEEDS + number)
            intervention = Intervention(condition, recorded=clean.routings, tables=tables)
            with intervention.rerunning(model, clean) as (segments, state):
                state = run(segments, state)
            inside_T = clean.tokens.position_T % every == offset
            found_2T = token_nll(model, state.hidden_BLD.flatten(0, 1), targets_2T)
            nll_2T = torch.where(inside_T, found_2T, nll_2T)
            advance(1)
        yield nll_2T
