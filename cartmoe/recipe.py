"""How a model is trained: settings, their checks, and a recipe for each preset."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cartmoe.config import PRESETS, check_choice
from cartmoe.fields import FILLED, AboveZero, Count, Flag, NonNegative, Positive, declared

# Where a preset's recipe differs from the defaults. That of "base" and "large" is paper.md's.
RECIPES: dict[str, dict[str, Any]] = {
    "micro": dict(batch_size=16, learning_rate=4e-3),
    "nano": {},
    "small": dict(length=512, learning_rate=1e-3),
    "base": dict(length=1024, batch_size=1024, accumulate=64, learning_rate=3e-4),
    "large": dict(length=1024, batch_size=1024, accumulate=128, learning_rate=3e-4),
}
# What may differ when a run is resumed, since it changes no weight. Corpus and tokenizer may move:
# a run knows the SHA-256 of both.
MAY_CHANGE = ("checkpoint_every", "keep", "milestones", "corpus", "tokenizer")


@declared
class TrainConfig:
    """How to train. All but `MAY_CHANGE` decides the weights, and is fixed when a run is resumed.

    steps         optimizer steps
    batch_size    sequences of one optimizer step, over all processes
    length        tokens that a sequence predicts
    accumulate    micro-batches that a process takes one after the other in a step
    learning_rate its peak; falls by a cosine to min_lr_ratio of it
    warmup        steps to the peak (default: a tenth of all, at most 2000)
    weight_decay  of matrices
    clip          the gradient's norm is scaled down to this
    balance, z_loss   coefficients of the losses summed over all routers
    precision     "fp32", "bf16" (autocast; weights stay fp32), or "auto": the faster one here,
                  which makes another model of the same seed on another machine
    checkpoint_every, keep   steps from one checkpoint to the next, and how many to keep
    milestones    steps whose checkpoints are kept for good, whatever `keep` says
    compile       whether torch.compile is used
    """

    steps: Positive = 1000
    seed: Count = 0
    corpus: str = "stdlib"
    tokenizer: str = "bytes"
    batch_size: Positive = 32
    length: Positive = 256
    accumulate: Positive = 1
    learning_rate: AboveZero = 2e-3
    warmup: Annotated[Count, FILLED] = None  # type: ignore[assignment]
    min_lr_ratio: NonNegative = 0.1
    weight_decay: NonNegative = 0.1
    betas: tuple[NonNegative, NonNegative] = (0.9, 0.95)
    clip: AboveZero = 1.0
    balance: NonNegative = 0.01
    z_loss: NonNegative = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    checkpoint_every: Positive = 100
    keep: Positive = 2
    milestones: tuple[Positive, ...] = ()
    compile: Flag = False

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of accumulate = "
                f"{self.accumulate}"
            )
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(2000, self.steps // 10))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainConfig:
        """The recipe for a preset of `ModelConfig`; `changes` override fields."""
        check_choice("preset", name, RECIPES)
        vocab_size = PRESETS[name]["vocab_size"]
        tokenizer = "bytes" if vocab_size == 256 else f"bpe:{vocab_size}"
        return cls(**({"tokenizer": tokenizer} | RECIPES[name] | changes))
