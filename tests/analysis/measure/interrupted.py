"""A process to be interrupted: python interrupted.py KEEP

It perturbs and measures without end. On a KeyboardInterrupt it writes how many hooks are left and
whether the model's output has changed in a bit, as JSON, and goes on. KEEP 1: the exception is
still held then, as a notebook does.
"""

import json
import sys
from typing import Any

import torch

import analysis as an
from analysis.adapters.base import as_adapter
from analysis.measure.shard import measure
from analysis.perturb.compound import ResidualNoise
from analysis.perturb.condition import Condition
from analysis.perturb.flips import Worst
from analysis.perturb.logits import GaussianNoise
from cartmoe import LanguageModel, ModelConfig
from cartmoe.data import Sequences
from cartmoe.hooks import capture_routing, hook_routers

torch.set_num_threads(1)
TOKENS_SL = torch.randint(1, 13, (4, 8), generator=torch.Generator().manual_seed(3))
SHARD = Sequences(
    TOKENS_SL, TOKENS_SL.roll(-1, 1), torch.arange(4), list("abcd"), ["x"] * 4, torch.full((4,), 8)
)
CONDITIONS = [
    Condition(p, "layer 0 stage 0")
    for p in (an.DropTop(1), GaussianNoise(1.0), ResidualNoise(), Worst(1))
]


def hooks_left(model) -> int:
    return sum(
        len(value) if kind.endswith("_hooks") else 1
        for module in model.modules()
        for kind, value in vars(module).items()
        if (kind.endswith("_hooks") and value) or kind == "forward"
    )


def work(model) -> None:
    with torch.no_grad():
        with an.perturbed(model, an.DropTop(1)), an.perturbed(model, ResidualNoise(), "layer 2"):
            model.model(TOKENS_SL)
        for _ in range(20):  # little time in forwards, much in opening and closing
            with hook_routers(model.model, lambda *args: None), capture_routing(model.model):
                model.model(TOKENS_SL[:1, :1])
        measure(model, CONDITIONS, SHARD, reuse=CONDITIONS[:2])


def main(keep: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        family="cartesian", vocab_size=13, d_model=16, ffn_width=32, num_layers=3, num_heads=2,
        num_experts=6, init_std=0.3,
    )  # fmt: skip
    model: Any = as_adapter(LanguageModel(config).eval())
    clean = model.model(TOKENS_SL)
    work(model)
    held = None
    while True:
        try:
            print("ready", flush=True)
            while True:
                work(model)
        except KeyboardInterrupt as error:
            held = error if keep else None
        hooks = hooks_left(model.model)
        changed = not model.model(TOKENS_SL).equal(clean)
        print(json.dumps({"hooks": hooks, "changed": changed}), flush=True)
        del held


main(sys.argv[1] == "1")
