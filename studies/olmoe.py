"""A small OLMoE of the transformers library, trained as studies/models.toml trains compact models.

    python -m studies.olmoe --out runs/olmoe

trains it, and then that model a little further, on the standard library; 15 min of one fast core.
The same command goes on where it was, and at the end puts both into cartmoe/models/hf, where
`analysis.load("olmoe")` and `analysis.load("olmoe_tuned")` find them.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import OlmoeConfig, OlmoeForCausalLM

from cartmoe import run
from cartmoe.checkpoint import step_folder, step_of
from cartmoe.data import Corpus, TrainBatches, prepare
from cartmoe.folders import write_folder
from cartmoe.interrupt import Interrupt
from cartmoe.metrics import Metrics, violations
from cartmoe.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate_factor,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from cartmoe.shipped import PRETRAINED
from cartmoe.tokenizers import JsonTokenizer

# Every byte is a token, as for the compact models; one more starts a document.
TOKENIZER = "bpe:257"
# The preset "micro" of the family smoe, to a few parameters.
SHAPE: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=136,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=16,
    num_experts_per_tok=3,
    max_position_embeddings=512,
    norm_topk_prob=True,
    router_aux_loss_coef=0.01,
    tie_word_embeddings=False,
    initializer_range=0.02,
)
EVERY = 200  # steps from one checkpoint to the next
BIN = 50  # steps that a row of a learning curve is the mean of


@dataclass(frozen=True)
class Recipe:
    """How one of the two is trained; start: the one that it begins with, None: from nothing."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    start: str | None = None
    batch_size: int = 16
    length: int = 256

    @property
    def warmup(self) -> int:
        return self.steps // 10


BASE = Recipe("olmoe", steps=6000, learning_rate=4e-3, seed=0)
TUNED = Recipe("olmoe_tuned", steps=600, learning_rate=1e-3, seed=1, start="olmoe")


class _Trainer:
    """The model on its way, one step after the other."""

    def __init__(self, recipe: Recipe, corpus: Corpus, start: Path | None, there: Path | None):
        self.recipe = recipe
        self.batches = TrainBatches(corpus, recipe.batch_size, recipe.length, recipe.seed)
        torch.manual_seed(recipe.seed)
        if folder := there or start:
            self.model: Any = OlmoeForCausalLM.from_pretrained(folder)
        else:
            bos = corpus.tokenizer.bos_id
            special: dict[str, Any] = dict(bos_token_id=bos, eos_token_id=bos, pad_token_id=None)
            self.model = OlmoeForCausalLM(
                OlmoeConfig(vocab_size=corpus.vocab_size, **SHAPE, **special)
            )
        self.model.train()
        self.step = step_of(there) if there else 0
        self.parameters: list[nn.Parameter] = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model, recipe.learning_rate, (0.9, 0.95), 0.1)
        if there:
            state = load_file(there / "optimizer.safetensors")
            restore_optimizer(self.optimizer, self.model, {k: t.clone() for k, t in state.items()})

    def take_step(self) -> dict[str, Any]:
        """One step of the optimizer, by the library's own loss; its row of metrics."""
        recipe, start = self.recipe, time.perf_counter()
        factor = learning_rate_factor(self.step + 1, recipe.steps, recipe.warmup, 0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        self.optimizer.zero_grad()
        tokens_BL = self.batches.batch(self.step)
        out = self.model(input_ids=tokens_BL, labels=tokens_BL, output_router_logits=True)
        out.loss.backward()
        norm = gradient_norm(self.parameters).item()
        clip_gradients(self.parameters, norm, 1.0)
        self.optimizer.step()
        self.step += 1
        balance = out.aux_loss.item()
        return {
            "step": self.step,
            "loss": out.loss.item() - self.model.config.router_aux_loss_coef * balance,
            "balance": balance,
            "z": 0.0,
            "learning_rate": recipe.learning_rate * factor,
            "gradient_norm": norm,
            "max_violation": self._violation(out.router_logits),
            "worst_site": None,
            "tokens_per_second": round(tokens_BL.numel() / (time.perf_counter() - start), 1),
        }

    @torch.no_grad()
    def _violation(self, logits: tuple[Tensor, ...]) -> float:
        top_k, num_experts = SHAPE["num_experts_per_tok"], SHAPE["num_experts"]
        chosen = [logits_TE.topk(top_k).indices.flatten() for logits_TE in logits]
        counts_SE = torch.stack([ids.bincount(minlength=num_experts) for ids in chosen])
        return violations(counts_SE).max().item()

    def save(self, out: Path) -> None:
        """A checkpoint of this step."""

        def fill(folder: Path) -> None:
            self.model.save_pretrained(folder)
            save_file(
                optimizer_tensors(self.optimizer, self.model), folder / "optimizer.safetensors"
            )

        write_folder(step_folder(out, self.step), fill)
        run.keep_newest(out, 2)


def train(recipe: Recipe, out: Path, start: Path | None) -> Path:
    """The last checkpoint of the model, trained in the directory `out` or further there."""
    corpus = prepare("stdlib", TOKENIZER)
    with run.training_in(out), Interrupt() as interrupt:
        there = run.resume_point(out)
        trainer = _Trainer(recipe, corpus, start, there)
        metrics = Metrics(out / "metrics.csv", trainer.step)
        with closing(metrics):
            for _ in trange(trainer.step, recipe.steps, desc=recipe.name):
                metrics.add(trainer.take_step())
                stopped = interrupt.signal is not None
                if stopped or trainer.step in (recipe.steps, *range(0, recipe.steps, EVERY)):
                    metrics.sync()
                    trainer.save(out)
                if stopped:
                    raise KeyboardInterrupt(f"step {trainer.step} is saved in {out}")
    return step_folder(out, recipe.steps)


def ship(recipe: Recipe, checkpoint: Path) -> None:
    """The model as the project keeps it, with its tokenizer, curve and origin."""
    corpus = prepare("stdlib", TOKENIZER)
    assert isinstance(corpus.tokenizer, JsonTokenizer)
    definition = corpus.tokenizer.json
    metrics = pd.read_csv(checkpoint.parents[1] / "metrics.csv")
    columns = ["step", "loss", "balance", "learning_rate", "gradient_norm", "max_violation"]
    curve = metrics[columns].groupby((metrics.step - 1) // BIN).mean()
    meta = {
        "command": "python -m studies.olmoe",
        "recipe": vars(recipe),
        "tokens": recipe.steps * recipe.batch_size * recipe.length,
        "corpus": "stdlib",
        "groups": sorted(corpus.split("train").group.unique()),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }

    def fill(folder: Path) -> None:
        OlmoeForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        curve.to_csv(folder / "curve.csv", index=False, float_format="%.5g")

    write_folder(PRETRAINED / recipe.name, fill)


def main(out: Annotated[Path, typer.Option(help="Directory of the two runs.")]) -> None:
    """Train both, and keep those that the project does not have yet."""
    torch.set_num_threads(1)
    for recipe in (BASE, TUNED):
        start = PRETRAINED / recipe.start if recipe.start else None
        if not (PRETRAINED / recipe.name).exists():
            ship(recipe, train(recipe, out / recipe.name, start))


if __name__ == "__main__":
    typer.run(main)
