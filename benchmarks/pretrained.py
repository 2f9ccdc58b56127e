"""Pretrained models: what the adapter costs, and what others take for the same.

The model is an OLMoE of the transformers library with random weights. `python -m
benchmarks.pretrained study|loop` prints the peak memory of one way of doing the layer-wise study.

Rows of nnsight and TransformerLens are there where these are installed (no part of the project
needs them: `pip install -c constraints.txt nnsight transformer-lens`).
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

import analysis as an
from analysis.adapters import adapt
from analysis.measure import measure
from analysis.perturb import Condition, Where
from benchmarks.memory import resident
from benchmarks.timing import Row, interleaved, milliseconds
from cartmoe.config import ModelConfig
from cartmoe.data import Sequences
from cartmoe.model import LanguageModel
from cartmoe.optim import clip_gradients, gradient_norm, make_optimizer
from cartmoe.recipe import TrainConfig
from cartmoe.shipped import PRETRAINED

SHAPE: dict[str, Any] = dict(
    vocab_size=2048, hidden_size=512, intermediate_size=256, num_hidden_layers=16,
    num_attention_heads=8, num_key_value_heads=8, num_experts=16, num_experts_per_tok=4,
    max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, pad_token_id=None,
)  # fmt: skip
SEQUENCES, LENGTH = 2, 512
IMPLEMENTATIONS = ("eager", "grouped_mm")  # on a CPU batched_mm takes eighty times as long


def olmoe(experts: str | None = None, **changes: Any) -> Any:
    """The model, its experts computed by this implementation of the library."""
    torch.manual_seed(0)
    config = OlmoeConfig(**SHAPE | changes)
    return OlmoeForCausalLM._from_config(config, experts_implementation=experts).eval()


def shard() -> Sequences:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = SEQUENCES, LENGTH + 1
    tokens = torch.randint(1, SHAPE["vocab_size"], size, generator=generator)
    ids, lengths = [f"document {i}" for i in range(SEQUENCES)], torch.full((SEQUENCES,), LENGTH)
    numbers, domains = torch.arange(SEQUENCES), ["random"] * SEQUENCES
    return Sequences(tokens[:, :-1], tokens[:, 1:], numbers, ids, domains, lengths)


def dropped(logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What OLMoE's router gives without its first choice, as one writes it in a hook."""
    top_T1 = logits_TE.argmax(-1, keepdim=True)
    masked_TE = logits_TE.scatter(-1, top_T1, -torch.inf)
    weights_TK, ids_TK = masked_TE.softmax(-1).topk(SHAPE["num_experts_per_tok"])
    return masked_TE, weights_TK, ids_TK


def loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Of every token."""
    logits_TV, targets_T = logits_BLV.flatten(0, 1).float(), targets_BL.flatten()
    return F.cross_entropy(logits_TV, targets_T, reduction="none")


def by_hand(model: Any, docs: Sequences, layer: int | None) -> Tensor:
    """A hook on the router of that layer (None: none), a forward of all, the loss of all logits."""
    hooks = []
    if layer is not None:
        gate = model.model.layers[layer].mlp.gate
        hooks.append(gate.register_forward_hook(lambda module, args, out: dropped(out[0])))
    try:
        return loss(model(docs.tokens_SL, use_cache=False).logits, docs.targets_SL)
    finally:
        for hook in hooks:
            hook.remove()


def layerwise(model: Any, docs: Sequences) -> Callable[[], Any]:
    """The study: the clean run, and DropTop(1) in one layer after the other."""
    adapted = adapt(model)
    layers = range(len(adapted.sites()))
    conditions = [Condition(an.DropTop(1), Where(layer)) for layer in layers]
    return lambda: measure(adapted, conditions, docs, batch_size=SEQUENCES)


def loop(model: Any, docs: Sequences) -> Callable[[], Any]:
    """The same by hand."""
    layers = [None, *range(model.config.num_hidden_layers)]
    return lambda: [by_hand(model, docs, layer) for layer in layers]


def rows() -> Iterator[Row]:
    """Rows of the bench table."""
    with torch.no_grad():
        yield _study()
        yield _edit()
        yield from _others()
        yield from map(_forward, ("micro", "nano"))
    yield from map(_training, ("micro", "nano"))


def _study() -> Row:
    model, docs = olmoe(), shard()
    ours, theirs = layerwise(model, docs)()[1:], loop(model, docs)()[1:]
    apart = max(
        abs(float(cell.losses.nll_sum.sum()) - float(nll_T.sum())) / nll_T.numel()
        for cell, nll_T in zip(ours, theirs, strict=True)
    )
    times = interleaved({"study": layerwise(model, docs), "loop": loop(model, docs)}, 3, 1)
    peaks = {name: _peak(name) / 2**20 for name in ("study", "loop")}
    memory = ", ".join(f"{name} {peak:.0f} MiB" for name, peak in peaks.items())
    detail = f"{milliseconds(times)}; {memory}; nats apart {apart:.0e}"
    what = "layer-wise study of olmoe: a loop by hand / the adapter"
    return Row(what, times["loop"] / times["study"], ">= 1.6", detail)


def _peak(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.pretrained", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _edit() -> Row:
    model, docs = olmoe(), shard()
    adapted = adapt(model)

    def edited() -> Any:
        with an.perturbed(adapted, an.DropTop(1)):
            return model(docs.tokens_SL, use_cache=False)

    plain = partial(model, docs.tokens_SL, use_cache=False)
    times = interleaved({"edited": edited, "plain": plain}, 15, 3)
    what = "all routers of olmoe edited / plain forward, hidden 512"
    return Row(what, times["edited"] / times["plain"], "<= 1.03", milliseconds(times))


def _others() -> Iterator[Row]:
    """DropTop(1) in one layer, seconds a condition over all layers."""
    model, docs = olmoe(), shard()
    layers = range(SHAPE["num_hidden_layers"])
    found = {"nnsight": _nnsight, "transformer_lens": _transformer_lens}
    there = {name: make for name, make in found.items() if find_spec(name)}
    ways: dict[str, Callable[[], Any]] = {"ours": layerwise(model, docs)}
    for name, make in there.items():
        one = make(docs)
        apart = (one(3) - by_hand(model, docs, 3)).abs().max().item()
        assert apart < 1e-2, f"{name} does another edit: {apart}"
        ways[name] = partial(_each, one, layers)
    if there:
        times = interleaved(ways, 3, 1)
        each = {name: time / len(layers) for name, time in times.items()}
        best = min(there, key=lambda name: each[name])
        what = f"a condition in one layer of olmoe: {best} / ours"
        yield Row(what, each[best] / each["ours"], ">= 1.3", milliseconds(each))


def _each(one: Callable[[int], Tensor], layers: range) -> list[Tensor]:
    return [one(layer) for layer in layers]


def _nnsight(docs: Sequences) -> Callable[[int], Tensor]:
    traced = importlib.import_module("nnsight").NNsight(olmoe())

    def one(layer: int) -> Tensor:
        with traced.trace(docs.tokens_SL, use_cache=False):
            logits_TE = traced.model.layers[layer].mlp.gate.output[0]
            traced.model.layers[layer].mlp.gate.output = dropped(logits_TE)
            logits_BLV = traced.output.logits.save()
        return loss(logits_BLV, docs.targets_SL)

    return one


def _transformer_lens(docs: Sequences) -> Callable[[int], Tensor]:
    bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    model = olmoe()
    model.config.architectures = [type(model).__name__]
    words = PreTrainedTokenizerFast(tokenizer_file=str(PRETRAINED / "olmoe" / "tokenizer.json"))
    lens = bridge.boot_transformers("olmoe", hf_model=model, device="cpu", tokenizer=words)
    seen: dict[str, Tensor] = {}

    def note(logits_TE: Tensor, hook: Any) -> None:
        seen["logits"] = logits_TE

    def weigh(weights_TE: Tensor, hook: Any) -> Tensor:
        _, weights_TK, ids_TK = dropped(seen["logits"])
        return torch.zeros_like(weights_TE).scatter(-1, ids_TK, weights_TK)

    def one(layer: int) -> Tensor:
        gate = f"blocks.{layer}.mlp.gate"
        hooks = [(f"{gate}.hook_out", note), (f"{gate}.hook_expert_weights", weigh)]
        return loss(lens.run_with_hooks(docs.tokens_SL, fwd_hooks=hooks), docs.targets_SL)

    return one


def _twins(preset: str) -> dict[str, Any]:
    """smoe of that preset, every layer a MoE layer, and OLMoE of its shape."""
    config = ModelConfig.preset(preset, "smoe", moe_interval=1)
    torch.manual_seed(0)
    shape = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.expert_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k[0],
    )
    theirs = {name: olmoe(name, **shape) for name in IMPLEMENTATIONS}
    return {"smoe": LanguageModel(config).eval(), **theirs}


def _forward(preset: str) -> Row:
    tokens_BL = _bytes(preset)[0]
    ways: dict[str, Callable[[], Any]] = {}
    for name, model in _twins(preset).items():
        if name == "smoe":
            ways[name] = partial(_logits, model, tokens_BL)
        else:
            ways[name] = partial(model, tokens_BL, use_cache=False)
    return _against(f"forward, {preset}", interleaved(ways, 7, 2))


def _logits(model: LanguageModel, tokens_BL: Tensor) -> Tensor:
    return model.head(model.trunk(tokens_BL)[0])


def _training(preset: str) -> Row:
    tokens_BL, targets_BL = _bytes(preset)

    def of_compact(model: LanguageModel) -> Tensor:
        return model.mean_loss(model.trunk(tokens_BL)[0], targets_BL)

    def of_olmoe(model: Any) -> Tensor:
        return loss(model(tokens_BL, use_cache=False).logits, targets_BL).mean()

    ways = {
        name: _step(model.train(), of_compact if name == "smoe" else of_olmoe)
        for name, model in _twins(preset).items()
    }
    return _against(f"training step, {preset}", interleaved(ways, 7, 2))


def _bytes(preset: str) -> tuple[Tensor, Tensor]:
    rows = TrainConfig.preset(preset).batch_size
    tokens = torch.randint(256, (rows, 257), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def _step(model: Any, loss_of: Callable[[Any], Tensor]) -> Callable[[], None]:
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    parameters = list(model.parameters())

    def run() -> None:
        loss_of(model).backward()
        clip_gradients(parameters, gradient_norm(parameters), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _against(what: str, times: dict[str, float]) -> Row:
    best = min(IMPLEMENTATIONS, key=lambda name: times[name])
    what = f"{what}, all MoE: transformers' olmoe ({best}) / smoe"
    return Row(what, times[best] / times["smoe"], ">= 1.3", milliseconds(times))


if __name__ == "__main__":
    before = resident("VmRSS")
    with torch.no_grad():
        {"study": layerwise, "loop": loop}[sys.argv[1]](olmoe(), shard())()
    print(resident("VmHWM") - before)
