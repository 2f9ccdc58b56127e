"""The search for the worst flips within a budget: an upper bound on what wrong routing can do.

A flip i -> j at token t changes the routed output by w_i (f_j(h_t) - f_i(h_t)), and the loss, to
first order, by its product with dloss/dy_t (an adversarial attack on a discrete choice, as HotFlip,
arXiv 1712.06751). Shapes: B sequences, L tokens, T = B * L, D model, S sites, K slots, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from analysis.adapters import Adapter, RoutedFlow, Watch, needs_gradients, run
from analysis.measure.clean import CleanPass
from analysis.measure.intervene import Intervention
from analysis.measure.losses import loss_gradient, output_slopes, token_nll
from analysis.perturb import Condition, Flips, Identity, Noise, Worst, chosen_mask
from cartmoe.hooks import RouterSite
from cartmoe.losses import IGNORE
from cartmoe.routing import Routing

Places = dict[tuple[int, int], Tensor]  # by (layer, stage): see `Flips`
# By site: what flipping slot k to expert j gains (T, K, E), -inf where that is no flip; the ids
# that the slots have (T, K).
Gains = dict[RouterSite, tuple[Tensor, Tensor]]


@torch.no_grad()
def search(worst: Worst, model: Adapter, clean: CleanPass, condition: Condition) -> Flips:
    """The flips of one batch. "random" ones cost no forward; the worst `rounds` forwards with
    gradients, the outputs of all experts at each site, and `rounds` forwards to verify."""
    task = _Task(worst, model, clean, replace(condition, perturbation=Identity()))
    T, device = len(clean.losses.targets_T), clean.losses.targets_T.device
    found = {
        site.place: torch.arange(site.num_experts, device=device).repeat(T, 1)
        for site in task.sites
    }
    if worst.choose == "random":
        return Flips(task.flip(found, task.random_gains(), worst.flips))
    needs_gradients(worst.label, model)
    best_B, left = task.per_sequence(clean.losses.nll_T), worst.flips
    for turn in range(min(worst.rounds, worst.flips)):
        budget = -(-left // (worst.rounds - turn))
        tried = task.flip(found, task.gains(Flips(found)), budget)
        nll_B = task.per_sequence(task.nll(Flips(tried)))
        better_T1 = (nll_B > best_B).repeat_interleave(task.length)[:, None]
        found = {place: torch.where(better_T1, tried[place], found[place]) for place in found}
        best_B, left = torch.maximum(nll_B, best_B), left - budget
    return Flips(found)


@dataclass
class _Task:
    worst: Worst
    model: Adapter
    clean: CleanPass
    condition: Condition

    def __post_init__(self) -> None:
        self.sites = [site for site in self.model.sites() if self.condition.where(site)]
        self.length = self.clean.length

    def per_sequence(self, values_T: Tensor) -> Tensor:
        return values_T.view(-1, self.length).double().sum(-1)

    def _run(self, flips: Flips) -> Tensor:
        """(T, D) hidden states at the end, under these flips."""
        condition = replace(self.condition, perturbation=flips)
        intervention = Intervention(condition, None, self.clean.routings)
        with intervention.rerunning(self.model, self.clean) as (segments, state):
            hidden_BLD = state.hidden_BLD.detach().requires_grad_(torch.is_grad_enabled())
            state = run(segments, state._replace(hidden_BLD=hidden_BLD))
        return state.hidden_BLD.flatten(0, 1)

    def nll(self, flips: Flips) -> Tensor:
        return token_nll(self.model, self._run(flips), self.clean.losses.targets_T)

    def gains(self, flips: Flips) -> Gains:
        """What each flip adds to the loss, to first order."""
        flows = Watch()
        with torch.enable_grad(), self.model.hooked(experts=flows):
            hidden_TD = self._run(flips)
        gradient_TD = loss_gradient(self.model, hidden_TD.detach(), self.clean.losses.targets_T)
        outputs = [flows[site].output_TD for site in self.sites]
        gradients = torch.autograd.grad(hidden_TD, outputs, gradient_TD)
        return {
            site: self._gain(site, flows[site], gradient_TD, flips)
            for site, gradient_TD in zip(self.sites, gradients, strict=True)
        }

    def _gain(
        self, site: RouterSite, flow: RoutedFlow, gradient_TD: Tensor, flips: Flips
    ) -> tuple[Tensor, Tensor]:
        x_TD, routing = flow.x_TD.detach(), Routing(*(t.detach() for t in flow.routing))
        slope_TE = output_slopes(self.model, site, x_TD, gradient_TD)
        gain_TKE = slope_TE[:, None] - slope_TE.gather(-1, routing.ids_TK)[..., None]
        gain_TKE = gain_TKE * routing.weights_TK[..., None]
        return self._only_flips(site, gain_TKE, routing, flips), routing.ids_TK

    def random_gains(self) -> Gains:
        """Random numbers in their place."""
        gains = {}
        for site in self.sites:
            tokens, routing = self.clean.tokens, self.clean.routings[site]
            place, (T, K) = site.place, routing.ids_TK.shape
            seed = self.condition.eval_seed
            noise = Noise(seed, place, tokens.sequence_T, tokens.position_T, {})
            gain_TKE = noise.uniform(K * site.num_experts, "flips").view(T, K, -1)
            gains[site] = self._only_flips(site, gain_TKE, routing, Flips()), routing.ids_TK
        return gains

    def _only_flips(
        self, site: RouterSite, gain_TKE: Tensor, routing: Routing, flips: Flips
    ) -> Tensor:
        """-inf but for slots that are in use and not flipped yet, to experts that are not used;
        padding has none, so that random flips are not lost on it."""
        is_text_T = self.clean.losses.targets_T != IGNORE
        free_TK = (routing.weights_TK != 0) & is_text_T[:, None]
        expert_TE = flips.expert_TE.get(site.place)
        if expert_TE is not None:
            moved_TE = expert_TE != torch.arange(site.num_experts, device=expert_TE.device)
            targets_TE = torch.zeros_like(moved_TE, dtype=torch.int8)
            targets_TE = targets_TE.scatter_add_(-1, expert_TE, moved_TE.to(torch.int8)) > 0
            free_TK = free_TK & ~targets_TE.gather(-1, routing.ids_TK)
        inside_T = self.condition.where.inside(self.clean.tokens)
        if inside_T is not None:
            free_TK = free_TK & inside_T[:, None]
        no_flip_TKE = chosen_mask(routing)[:, None] | ~free_TK[..., None]
        return gain_TKE.masked_fill(no_flip_TKE, -torch.inf)

    def flip(self, found: Places, gains: Gains, budget: int) -> Places:
        """`found` with the best flips of positive gain within the budget."""
        gain_TN = torch.cat([gain.flatten(1) for gain, _ in gains.values()], -1)
        # Views by site: what a pick rules out is struck out in the whole at once.
        parts = gain_TN.split([gain[0].numel() for gain, _ in gains.values()], -1)
        parts = [p.view_as(g) for p, (g, _) in zip(parts, gains.values(), strict=True)]
        starts = torch.tensor([0] + [p[0].numel() for p in parts]).cumsum(0)
        starts = starts.to(gain_TN.device)
        row_T = torch.arange(len(gain_TN), device=gain_TN.device)
        picked = []
        for _ in range(min(budget, sum(p.shape[1] for p in parts))):
            best_T, index_T = gain_TN.max(-1)
            number_T = torch.bucketize(index_T, starts, right=True) - 1
            inner_T = index_T - starts[number_T]
            for number, part in enumerate(parts):
                rows = row_T[number_T == number]
                slot, expert = inner_T[rows] // part.shape[-1], inner_T[rows] % part.shape[-1]
                part[rows, slot] = -torch.inf
                part[rows, :, expert] = -torch.inf
            picked.append((best_T, number_T, inner_T))
        taken_RT = torch.stack([best_T for best_T, _, _ in picked]) > 0
        if self.worst.per == "sequence":
            best_RBL = torch.stack([best_T.view(-1, self.length) for best_T, _, _ in picked])
            best_BN = best_RBL.transpose(0, 1).flatten(1)
            top_BN = best_BN.topk(min(budget, best_BN.shape[-1])).indices
            within_BN = torch.zeros_like(best_BN, dtype=torch.bool).scatter(-1, top_BN, True)
            taken_RT &= within_BN.view(-1, len(picked), self.length).transpose(0, 1).flatten(1)
        tried = {place: expert_TE.clone() for place, expert_TE in found.items()}
        for taken_T, (_, number_T, inner_T) in zip(taken_RT, picked, strict=True):
            for number, (site, (_, ids_TK)) in enumerate(gains.items()):
                rows = row_T[taken_T & (number_T == number)]
                slot, expert = inner_T[rows] // site.num_experts, inner_T[rows] % site.num_experts
                tried[site.place][rows, ids_TK[rows, slot]] = expert
        return tried
