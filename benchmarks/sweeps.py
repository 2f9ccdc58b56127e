"""The engine of perturbation: what a sweep costs against plain forwards.

The layer-wise sweep perturbs one layer after the other (DropTop(1)); its baseline is one forward of
the whole model, with the head and the losses, for each condition. "Of the saving" is what reuse of
the clean stream saved, as a share of what facts about the segments allow: 1 - mean over conditions
of (time of the remaining segments + h) / (time of all + h), h the head and the losses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from analysis.adapters import State, Watch, as_adapter, run
from analysis.measure.clean import CleanPass
from analysis.measure.intervene import Intervention
from analysis.measure.reuse import Table
from analysis.measure.shard import measure
from analysis.perturb.base import Perturbation
from analysis.perturb.condition import Condition
from analysis.perturb.context import RouterContext
from analysis.perturb.logits import GaussianNoise
from analysis.perturb.masks import DropTop
from analysis.perturb.noise import Noise
from analysis.perturb.where import Where
from analysis.study.store import Store
from benchmarks.timing import Row, interleaved, milliseconds
from cartmoe.config import ModelConfig
from cartmoe.data import Sequences
from cartmoe.model import LanguageModel

SHAPES = {  # preset, changes, sequences, length
    "nano": ("nano", {}, 24, 256),
    "small": ("small", {}, 8, 512),
    "12 layers, all MoE": ("nano", dict(num_layers=12, moe_interval=1), 8, 256),
}


def rows():
    """Rows of the bench table."""
    with torch.no_grad():
        for name in SHAPES:
            yield _layerwise(name)
        yield from _reused()
        for perturbation in (DropTop(1), GaussianNoise(1.0)):
            yield _overhead(perturbation)
    yield _variance()


def build(name: str, family: str = "cartesian"):
    """(a model under study with random weights, a shard of random tokens)."""
    preset, changes, sequences, length = SHAPES[name]
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.preset(preset, family, init_std=0.05, **changes)).eval()
    tokens = torch.randint(1, model.config.vocab_size, (sequences, length + 1))
    number = torch.arange(sequences)
    ids = [f"document {i}" for i in range(sequences)]
    domains, bytes_S = ["random"] * sequences, torch.full((sequences,), length)
    shard = Sequences(tokens[:, :-1], tokens[:, 1:], number, ids, domains, bytes_S)
    return as_adapter(model), shard


def _layerwise(name: str) -> Row:
    model, shard = build(name)
    clean = CleanPass.of(model, shard)
    layers = sorted({site.layer for site in model.sites()})
    conditions = [Condition(DropTop(1), Where(layer)) for layer in layers]

    def nll(state: State) -> torch.Tensor:
        return clean.losses.compare(model, state.hidden_BLD.flatten(0, 1))["nll"]

    def from_the_start(condition: Condition) -> torch.Tensor:
        intervention = Intervention(condition)
        intervention.begin(clean.tokens, clean.draws)
        with intervention.attached(model):
            return nll(run(clean.segments, clean.states[0]))

    def from_the_first(condition: Condition) -> torch.Tensor:
        with Intervention(condition).rerunning(model, clean) as (segments, state):
            return nll(run(segments, state))

    firsts = [clean.first_segment(c.where) for c in conditions]
    whole = [partial(from_the_start, c) for c in conditions]
    reused = [partial(from_the_first, c) for c in conditions]
    apart = max((a() - b()).abs().max().item() for a, b in zip(whole, reused, strict=True))
    runs: dict[str, Callable[[], object]] = {f"whole {i}": fn for i, fn in enumerate(whole)}
    runs |= {f"reused {i}": fn for i, fn in enumerate(reused)}
    pairs = zip(clean.segments, clean.states, strict=False)
    runs |= {f"segment {i}": partial(g.run, s) for i, (g, s) in enumerate(pairs)}
    hidden_TD = clean.states[-1].hidden_BLD.flatten(0, 1)
    runs["head"] = lambda: clean.losses.compare(model, hidden_TD)
    times = interleaved(runs, repeats=9, warm_up=2)
    segments = np.array([times[f"segment {i}"] for i in range(len(clean.segments))])
    rest = np.mean([segments[first:].sum() + times["head"] for first in firsts])
    formula = 1 - rest / (segments.sum() + times["head"])
    sums = {kind: sum(times[f"{kind} {i}"] for i in range(len(conditions))) for kind in
            ("whole", "reused")}  # fmt: skip
    saved = 1 - sums["reused"] / sums["whole"]
    detail = f"saved {saved:.3f}, formula {formula:.3f}; nll apart {apart:.1e}"
    return Row(f"layer-wise sweep, {name}: of the saving", saved / formula, ">= 0.90", detail)


def _reused():
    """C = 4 E / K conditions at one site: routed experts' time, directly and from a table."""
    for name, family in (("nano", "smoe_share"), ("nano", "cartesian"), ("small", "smoe_share")):
        model, shard = build(name, family)
        clean = CleanPass.of(model, shard)
        site = model.sites()[0]
        number = 4 * site.num_experts // site.top_k
        flows = Watch()
        with model.hooked(experts=flows):
            model.model(shard.tokens_SL)
        x_TD, router = flows[site].x_TD, model.router(site)
        tokens = clean.tokens
        decisions = []
        for seed in range(number):
            noise = Noise(seed, (0, 0), tokens.sequence_T, tokens.position_T, {})
            ctx = RouterContext(site, clean.routings[site], x_TD, tokens, noise)
            decisions.append(Condition(GaussianNoise(1.0)).apply(ctx.clean, router, ctx))
        experts = model.model.trunk.blocks[0].ffn.stages[0].experts

        def direct(experts=experts, x_TD=x_TD, decisions=decisions):
            return [experts(x_TD, routing) for routing in decisions]

        def table(
            model=model, site=site, clean=clean, x_TD=x_TD, decisions=decisions, experts=experts
        ):
            made = Table(model, site, clean.routings[site])
            return [made(x_TD, routing, experts) for routing in decisions]

        apart = max((a - b).abs().max().item() for a, b in zip(direct(), table(), strict=True))
        times = interleaved({"direct": direct, "table": table}, repeats=5, warm_up=1)
        detail = f"{milliseconds(times)}; outputs apart {apart:.1e}"
        what = f"routed experts directly / from a table, {number} conditions, {name} {family}"
        yield Row(what, times["direct"] / times["table"], ">= 2", detail)


def _overhead(perturbation: Perturbation) -> Row:
    """A cell on one batch, all routers perturbed, against a bare forward with losses. The segments
    before the first router, which a cell does not run, are added to its time."""
    model, shard = build("nano")
    clean = CleanPass.of(model, shard)
    before = clean.segments[: clean.first_segment(lambda site: True)]
    conditions = [Condition(perturbation, eval_seed=seed) for seed in range(4)]
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "s.sqlite") as store:
        number = count()

        def cells() -> None:
            for cell in measure(model, conditions, shard, batch_size=len(shard), reuse=())[1:]:
                store.add({"number": next(number)}, cell)

        runs = {
            "cells": cells,
            "clean": lambda: measure(model, [], shard, batch_size=len(shard)),
            "skipped": lambda: run(before, clean.states[0]),
            "bare": lambda: model.model.losses(shard.tokens_SL, shard.targets_SL),
        }
        times = interleaved(runs, repeats=9, warm_up=2)
    cell = (times["cells"] - times["clean"]) / len(conditions) + times["skipped"]
    what = f"a cell / bare forward with losses, nano, {perturbation.label}"
    detail = f"cell {1e3 * cell:.1f} ms, {milliseconds(times)}"
    return Row(what, cell / times["bare"], "<= 1.10", detail)


def _variance() -> Row:
    """The variance over 16 seeds of damage(0.5) - damage(0.4), the same seed for both strengths,
    against two different ones. Sequences have noise of their own, so that their variances add."""
    model, shard = build("nano")
    seeds = range(16)
    conditions = [Condition(GaussianNoise(s), eval_seed=seed) for s in (0.4, 0.5) for seed in seeds]
    cells = measure(model, conditions, shard[:8], batch_size=8)[1:]
    nll_CS = np.stack([cell.losses.nll_sum for cell in cells])
    weak, strong = nll_CS[: len(seeds)], nll_CS[len(seeds) :]
    common = np.var(strong - weak, axis=0, ddof=1).sum()
    independent = (np.var(strong, axis=0, ddof=1) + np.var(weak, axis=0, ddof=1)).sum()
    what = "GaussianNoise 0.5 - 0.4: variance with common seeds / with independent ones"
    return Row(what, common / independent, "<= 0.10")
