"""A model that is none of ours, in sixty lines, and an adapter for it: neither knows cartmoe's."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from analysis.adapters import Segment, State
from cartmoe.hooks import RouterSite
from cartmoe.interrupt import restoring
from cartmoe.routing import Routing, stable_topk


class Expert(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseBlock(nn.Module):
    """Experts in two groups, of which the better one is taken; a bias that only chooses; weights
    times a scale, and not renormalized."""

    def __init__(self, width, hidden, experts, k, scale):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.bias = nn.Parameter(0.2 * torch.randn(experts))
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(experts))
        self.k, self.scale, self.groups = k, scale, 2

    def pick(self, scores, k=None):
        choosing = (scores + self.bias).masked_fill(scores == 0, -torch.inf)
        if k is None:
            groups = choosing.view(len(scores), self.groups, -1)
            best = groups.amax(-1).argmax(-1, keepdim=True)
            other = torch.arange(self.groups) != best
            choosing = groups.masked_fill(other[..., None], -torch.inf).flatten(1)
        ids = stable_topk(choosing, k or self.k)
        return ids, choosing.gather(-1, ids) != -torch.inf

    def decide(self, x):
        scores = self.gate(x).sigmoid()
        ids, valid = self.pick(scores)
        return scores, ids, self.scale * scores.gather(-1, ids) * valid

    def mix(self, x, ids, weights):
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return (
            weights[..., None] * every.gather(1, ids[..., None].expand(-1, -1, x.shape[1]))
        ).sum(1)

    def forward(self, x):
        _, ids, weights = self.decide(x)
        return self.mix(x, ids, weights)


class OtherMoE(nn.Module):
    def __init__(self, vocabulary=13, width=12, hidden=10, layers=2, experts=6, k=2, scale=1.5):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mixers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
        self.blocks = nn.ModuleList(
            SparseBlock(width, hidden, experts, k, scale) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for mixer, norm, block in zip(self.mixers, self.norms, self.blocks, strict=True):
            hidden = hidden + mixer(hidden)[0]
            hidden = hidden + block(norm(hidden).flatten(0, 1)).view_as(hidden)
        return self.head(hidden)


class OtherRouter:
    """Answers for a `SparseBlock`: groups, bias and scale stay its own matter."""

    by_logits = False

    def __init__(self, block):
        self.block, self.rows = block, block.gate.weight
        self.facts = dict(top_k=block.k, renormalize=0.0, num_experts=len(block.experts))

    def gate(self, x_TD, token_ids_T):
        return self.block.gate(x_TD)

    def score(self, logits_TE):
        return logits_TE.sigmoid()

    def route(self, logits_TE):
        return self.decide(logits_TE, self.score(logits_TE))

    def decide(self, logits_TE, scores_TE, k=None):
        ids_TK, valid_TK = self.block.pick(scores_TE, k)
        return Routing(logits_TE, scores_TE, ids_TK, self.weigh(scores_TE, ids_TK, valid_TK))

    def weigh(self, scores_TE, ids_TK, used_TK=None):
        weights_TK = self.block.scale * scores_TE.gather(-1, ids_TK)
        return weights_TK if used_TK is None else weights_TK * used_TK

    def margin(self, routing, count_T):
        choosing_TE = (routing.scores_TE + self.block.bias).sort(-1, descending=True).values
        return choosing_TE[:, self.block.k - 1] - choosing_TE[:, self.block.k]


class OtherAdapter:
    """See `analysis.adapters.Adapter`."""

    name = family = "other"
    train_seed, tokenizer, device = 0, None, torch.device("cpu")

    def __init__(self, model):
        self.model = self.module = model
        self.vocab_size, self.width = model.head.out_features, model.head.in_features
        self.identity = f"an OtherMoE of {sum(p.double().sum().item() for p in model.parameters())}"
        self._forward, self._router, self._experts, self._output = [], [], [], []

    def sites(self):
        return [
            RouterSite(f"blocks.{i}", i, 0, len(block.experts), block.k)
            for i, block in enumerate(self.model.blocks)
        ]

    def segments(self):
        def embed(state):
            return state._replace(hidden_BLD=self.model.embed(state.tokens_BL))

        def mixer(number):
            def run(state):
                hidden_BLD = state.hidden_BLD
                mixed_BLD = self.model.mixers[number](hidden_BLD)[0]
                return state._replace(hidden_BLD=hidden_BLD + mixed_BLD)

            return run

        def block(site):
            def run(state):
                stream_TD = state.hidden_BLD.flatten(0, 1)
                output_TD, routing = self._stage(site, self.stage_input(site, stream_TD))
                hidden_BLD = state.hidden_BLD + output_TD.view_as(state.hidden_BLD)
                return State(hidden_BLD, state.tokens_BL, (*state.decisions, routing))

            return run

        steps = [Segment("embed", embed)]
        for site in self.sites():
            steps.append(Segment(f"mixer_{site.layer}", mixer(site.layer)))
            steps.append(Segment(f"block_{site.layer}", block(site), (site,)))
        return steps

    def _stage(self, site, x_TD):
        router, block = self.router(site), self.model.blocks[site.layer]
        logits_TE = router.gate(x_TD, None)
        if not logits_TE.isfinite().all():
            raise FloatingPointError(f"router logits are not finite ({site})")
        routing = router.decide(logits_TE, router.score(logits_TE))
        for fn, where in self._router:
            if where(site):
                routing = fn(routing, router, site, x_TD) or routing

        def compute(x_TD, routing):
            return block.mix(x_TD, routing.ids_TK, routing.weights_TK)

        for fn, where in self._experts:
            if where(site):
                compute = _asked(fn, site, compute)
        output_TD = compute(x_TD, routing)
        for fn, where in self._output:
            changed_TD = fn(output_TD, site) if where(site) else None
            output_TD = output_TD if changed_TD is None else changed_TD
        return output_TD, routing

    @restoring
    def hooked(self, *, forward=None, router=None, experts=None, output=None, where=None):
        given = zip((forward, router, experts, output), self._hooks(), strict=True)
        entered = [(hooks, (fn, where or bool)) for fn, hooks in given if fn is not None]
        for hooks, one in entered:
            hooks.append(one)
        try:
            yield
        finally:
            for hooks, one in entered:
                hooks.remove(one)

    def _hooks(self):
        return self._forward, self._router, self._experts, self._output

    def logits(self, hidden_TD):
        return self.model.head(hidden_TD).float()

    def router(self, site):
        return OtherRouter(self.model.blocks[site.layer])

    def expert_weights(self, site):
        experts = self.model.blocks[site.layer].experts
        return tuple(
            torch.stack([getattr(e, w).weight for e in experts]) for w in ("w1", "w3", "w2")
        )

    def shared_weights(self, site):
        return None

    def expert_outputs(self, site, x_TD, ids=None):
        experts = self.model.blocks[site.layer].experts
        return torch.stack(
            [experts[e](x_TD) for e in (range(len(experts)) if ids is None else ids)]
        )

    def stage_input(self, site, stream_TD):
        return self.model.norms[site.layer](stream_TD)

    def combine(self, site, x_TD, routed_TD):
        return routed_TD


def _asked(fn, site, own):
    def compute(x_TD, routing):
        output_TD = fn(x_TD, routing, site, own)
        return own(x_TD, routing) if output_TD is None else output_TD

    return compute


def build(seed=0) -> OtherAdapter:
    torch.manual_seed(seed)
    model = OtherMoE()
    for block in model.blocks:
        block.gate.weight.data.mul_(4 / math.sqrt(3))
    return OtherAdapter(model.eval())
