"""Whole training steps and forwards at nano and small size."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.timing import Row, interleaved, milliseconds
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
    for bf16 in (False, True):
        models = {
            f: LanguageModel(ModelConfig.preset("nano", f)) for f in ("cartesian", "fine_grained")
        }
        models["twin"] = dense_twin(models["cartesian"].config)
        runs = {name: training_step(model, bf16) for name, model in models.items()}
        times = interleaved(runs, repeats=9, warm_up=2)
        name = "bf16" if bf16 else "fp32"
        detail = milliseconds(times)
        ratio = times["cartesian"] / times["twin"]
        yield Row(f"training step, nano cartesian / dense twin, {name}", ratio, "<= 1.25", detail)
        ratio = times["cartesian"] / times["fine_grained"]
        yield Row(f"training step, cartesian / fine_grained, {name}", ratio, "<= 1.20")
    yield from _losses()
    yield from _null_hook()


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
