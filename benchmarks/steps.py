"""Whole training steps and forwards at nano and small size."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.timing import Row, has_bf16, interleaved, milliseconds, precisions
from cartmoe.config import ModelConfig
from cartmoe.ffn import DenseFFN
from cartmoe.hooks import hook_routers
from cartmoe.model import LanguageModel
from cartmoe.optim import clip_gradients, gradient_norm, make_optimizer
from cartmoe.routing import balance_loss, expert_counts

BATCH, LENGTH = 32, 256


def dense_twin(config: ModelConfig) -> LanguageModel:
    """The same model with every MoE layer replaced by one SwiGLU of its activated width."""
    dense = ModelConfig.preset("nano", "dense")
    model = LanguageModel(dense)
    shared = config.grain if config.shared_experts else 0
    width = config.expert_width * sum(k + shared for k in config.top_k)
    for layer, block in enumerate(model.trunk.blocks):
        if config.is_moe(layer):
            block.ffn.ffn = DenseFFN(config.d_model, width)
    model.reset_parameters()
    return model


def training_step(model: LanguageModel, bf16: bool, batch: int = BATCH):
    """A function that does one step of training as `cartmoe.train` does."""
    torch.manual_seed(0)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    tokens = torch.randint(256, (batch, LENGTH + 1))
    parameters = list(model.parameters())

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            x, routings = model.trunk(tokens[:, :-1])
            loss = model.mean_loss(x, tokens[:, 1:])
            for routing in routings:
                loss = loss + 0.01 * balance_loss(routing.scores_TE, expert_counts(routing))
        loss.backward()
        clip_gradients(parameters, gradient_norm(parameters), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def rows():
    """Rows of the bench table."""
    for name in precisions():
        bf16 = name == "bf16"
        models = {
            f: LanguageModel(ModelConfig.preset("nano", f)) for f in ("cartesian", "fine_grained")
        }
        models["twin"] = dense_twin(models["cartesian"].config)
        runs = {name: training_step(model, bf16) for name, model in models.items()}
        times = interleaved(runs, repeats=9, warm_up=2)
        detail = milliseconds(times)
        ratio = times["cartesian"] / times["twin"]
        yield Row(f"training step, nano cartesian / dense twin, {name}", ratio, "<= 1.25", detail)
        ratio = times["cartesian"] / times["fine_grained"]
        yield Row(f"training step, cartesian / fine_grained, {name}", ratio, "<= 1.20")
    yield _floor()
    yield from _losses()
    yield from _null_hook()


def _floor() -> Row:
    """What a step of preset micro takes beside its matrix products alone, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = ModelConfig.preset("micro")
        products = matmuls(config, batch=16)
        runs = {
            "step": training_step(LanguageModel(config), bf16=False, batch=16),
            "matmuls": lambda: [a @ b for a, b in products],
        }
        times = interleaved(runs, repeats=9, warm_up=2)
    finally:
        torch.set_num_threads(threads)
    goal = "<= 2.50" if has_bf16() else "<= 1.80"
    what = "training step of micro / its matrix products, one thread, fp32"
    return Row(what, times["step"] / times["matmuls"], goal, milliseconds(times))


def matmuls(config: ModelConfig, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of every matrix product of a training step with balanced routers: each forward one,
    and the two of its gradients."""
    T, D, F = batch * LENGTH, config.d_model, config.expert_width
    E, head = config.num_experts, D // config.num_heads
    shapes = [(1, T, D, config.vocab_size)]
    for _ in range(config.num_layers):
        heads = batch * config.num_heads
        shapes += [(1, T, D, 3 * D), (1, T, D, D)]
        shapes += [(heads, LENGTH, head, LENGTH), (heads, LENGTH, LENGTH, head)]
        for k in config.top_k:
            rows = T * k // E
            shapes += [(1, T, D, E), (1, T, D, 2 * F), (1, T, F, D)]  # gate, shared expert
            shapes += [(1, rows, D, 2 * F), (1, rows, F, D)] * E
    each = [s for n, a, b, c in shapes for s in ((n, a, b, c), (n, a, c, b), (n, b, a, c))]
    return [
        (torch.randn(n, a, b).squeeze(0), torch.randn(n, b, c).squeeze(0)) for n, a, b, c in each
    ]


@torch.no_grad()
def _losses():
    for preset, batch, length in (("nano", 32, 256), ("small", 8, 512)):
        model = LanguageModel(ModelConfig.preset(preset)).eval()
        tokens = torch.randint(model.config.vocab_size, (batch, length + 1))
        runs = {
            "losses": lambda m=model, t=tokens: m.losses(t[:, :-1], t[:, 1:]),
            "bare": lambda m=model, t=tokens: F.linear(m.trunk(t[:, :-1])[0], m.head.weight),
        }
        times = interleaved(runs, repeats=9, warm_up=2)
        ratio, detail = times["losses"] / times["bare"], milliseconds(times)
        name = f"forward with losses / trunk + logits GEMM, {preset}"
        yield Row(name, ratio, "<= 1.10", detail)


@torch.no_grad()
def _null_hook():
    model = LanguageModel(ModelConfig.preset("nano")).eval()
    tokens = torch.randint(256, (BATCH, LENGTH))

    def hooked():
        with hook_routers(model, lambda routing, router, site: None):
            return model(tokens)

    same = torch.equal(hooked(), model(tokens))
    times = interleaved({"hooked": hooked, "plain": lambda: model(tokens)}, repeats=15)
    detail = f"{milliseconds(times)}; bit-identical: {'yes' if same else 'NO'}"
    yield Row(
        "null hook / no hook, nano forward", times["hooked"] / times["plain"], "<= 1.02", detail
    )
