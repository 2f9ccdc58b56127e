"""What a model is: families, sizes, and the checks that reject what cannot be built."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple, SupportsIndex

from pydantic import Field, WrapValidator

from cartmoe.fields import (
    FILLED,
    LARGEST,
    PLAIN,
    Count,
    Flag,
    NonNegative,
    OneOf,
    Positive,
    Whole,
    declared,
)


class Family(NamedTuple):
    """What sets one family of paper.md apart from the others; a `ModelConfig` may override most."""

    ffn: str = "moe"  # the class of its routed layers, a key of `ffn.FFNS`
    gate: str = "linear"  # "linear" learns its logits, "table" looks them up by token id (hash)
    grain: int = 1  # experts are narrower by this factor, and there are as many times more
    top_k: int = 2  # chosen experts per stage and grain
    top_p: float | None = None
    shared: bool = True
    stages: int = 1
    width_ratio: tuple[int, int] = (1, 1)  # FFN width against the other families'


FAMILIES: dict[str, Family] = {
    "dense": Family(ffn="dense", shared=False),
    # No shared expert, so every FFN is 17/16 wider: then its activated count is the printed one.
    "smoe": Family(top_k=3, shared=False, width_ratio=(17, 16)),
    "smoe_share": Family(),
    "hash": Family(gate="table"),
    "fine_grained": Family(grain=2),
    "top_p": Family(top_p=0.4),
    "cartesian": Family(stages=2),
}

PRESETS: dict[str, dict[str, int]] = {
    # Both layers are MoE layers. Chosen by loss at equal CPU time (benchmarks/LOG.md).
    "micro": dict(
        vocab_size=256, d_model=64, ffn_width=128, num_layers=2, num_heads=4, moe_interval=1
    ),
    "nano": dict(vocab_size=256, d_model=128, ffn_width=512, num_layers=4, num_heads=4),
    "small": dict(vocab_size=8192, d_model=384, ffn_width=1536, num_layers=8, num_heads=6),
    "base": dict(vocab_size=32000, d_model=768, ffn_width=3072, num_layers=12, num_heads=12),
    "large": dict(vocab_size=32000, d_model=1024, ffn_width=4096, num_layers=24, num_heads=16),
}


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise `ValueError` naming the parameter, the value and the choices unless value is one."""
    if value not in tuple(choices):  # which compares, so that a list is a wrong value too
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")


def check_least(name: str, value: float, least: float) -> None:
    """Raise `ValueError` naming parameter and value unless it is a finite number >= least."""
    if not isinstance(value, Real) or value == math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    if not value >= least:
        raise ValueError(f"{name} is {value!r}; it must be at least {least}")


def check_whole(name: str, value: SupportsIndex, least: int) -> int:
    """The value as an int. Raises `ValueError` naming it and the parameter unless it is a whole
    number, of whatever library, from `least` to `LARGEST`; True is none."""
    number = _index(value)
    if number is None:
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    check_least(name, number, least)
    if number > LARGEST:
        raise ValueError(f"{name} is {value!r}; it must be at most {LARGEST}")
    return number


def _index(value: Any) -> int | None:
    """The int that a whole number of any library is; None for all else, a truth value too."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


# A number stands for as many of them as there are stages.
TOP_K = WrapValidator(
    lambda k, check: k if k is None else check(k) if _index(k) is None else _index(k),
    json_schema_input_type=Positive | list[Positive],
)


@declared
class ModelConfig:
    """One model. What is not given is filled in from the family, so a built config has no None but
    in `top_p` and `renormalize`, where it says something.

    family         one of `FAMILIES`
    ffn_width      hidden width of a dense FFN; an expert has ffn_width / (grain * num_stages)
    num_experts    experts a router chooses from (default 16 * grain)
    top_k          experts a token uses, one number per stage (an int is repeated); with top_p
                   only the number that `num_parameters(active=True)` counts
    grain          how many times narrower (and, by default, more numerous) experts are
    shared_experts whether a shared expert stands beside the routed ones (paper.md, Table 3)
    num_stages     stages of a Cartesian layer
    composition    "sequential" (the Cartesian product) or "parallel" (all stages read the same
                   input, outputs added): the control that isolates the paper's claim
    moe_interval, first_moe_layer   layer l is MoE where l >= first and (l - first) % interval == 0
    top_p          probability mass a token's experts must exceed; None: top-k
    score          "softmax", or "sigmoid" with a selection bias (arXiv 2408.15664)
    renormalize    whether chosen weights are divided by their sum. Default: where a stage's top_k
                   is above 1, never with top_p; None stays where stages differ in that
    bias_rate      step of the selection bias, sigmoid only
    router_noise   std of Gaussian noise on the logits in training, in units of logits
    """

    family: Annotated[str, OneOf(FAMILIES)]
    vocab_size: Positive
    d_model: Positive
    ffn_width: Positive
    num_layers: Positive
    num_heads: Positive
    num_experts: Annotated[Positive, FILLED] = None  # type: ignore[assignment]
    top_k: Annotated[tuple[Whole, ...], TOP_K] = None  # type: ignore[assignment]
    grain: Annotated[Positive, FILLED] = None  # type: ignore[assignment]
    shared_experts: Annotated[Flag, FILLED] = None  # type: ignore[assignment]
    num_stages: Annotated[Positive, FILLED] = None  # type: ignore[assignment]
    composition: Literal["sequential", "parallel"] = "sequential"
    moe_interval: Positive = 2
    first_moe_layer: Count = 0
    top_p: Annotated[float, Field(strict=True, gt=0, lt=1), PLAIN] | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: Flag | None = None
    bias_rate: NonNegative = 0.001
    router_noise: NonNegative = 0.0
    rope_base: NonNegative = 10000.0
    norm_eps: NonNegative = 1e-6
    init_std: NonNegative = 0.01
    hash_seed: Whole = 0

    def __post_init__(self) -> None:
        family = FAMILIES[self.family]
        self._fill("grain", family.grain)
        self._fill("num_stages", family.stages)
        self._fill("num_experts", 16 * self.grain)
        self._fill("top_p", family.top_p)
        self._fill("shared_experts", family.shared)
        self._fill("top_k", family.top_k * self.grain)
        if isinstance(self.top_k, int):
            object.__setattr__(self, "top_k", (self.top_k,) * self.num_stages)
        several = {self.top_p is None and k > 1 for k in self.top_k}
        self._fill("renormalize", several.pop() if len(several) == 1 else None)
        self._check_routing(family)
        self._check_widths()

    def _fill(self, name: str, default: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    def _check_routing(self, family: Family) -> None:
        if len(self.top_k) != self.num_stages:
            raise ValueError(
                f"top_k is {self.top_k!r}; give one number, or one for each of the "
                f"{self.num_stages} stages"
            )
        for k in self.top_k:
            if not 1 <= k <= self.num_experts:
                raise ValueError(f"top_k is {k}; it must lie in 1..num_experts={self.num_experts}")
        if self.num_stages > 1 and family.stages == 1:
            raise ValueError(
                f"num_stages is {self.num_stages}; only family 'cartesian' has more than one stage"
            )
        if self.composition == "parallel" and family.stages == 1:
            raise ValueError("composition is 'parallel'; only family 'cartesian' composes stages")
        if self.score == "sigmoid" and self.top_p is not None:
            raise ValueError("top_p needs score='softmax': a sigmoid's scores do not sum to one")
        if self.score == "sigmoid" and family.gate == "table":
            raise ValueError("score is 'sigmoid'; family 'hash' has fixed logits, use 'softmax'")

    def _check_widths(self) -> None:
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model is {self.d_model}; it must be a multiple of 2 * num_heads = "
                f"{2 * self.num_heads}, since rotary embeddings turn pairs of a head's channels"
            )
        parts = self.grain * self.num_stages
        if self.ffn_width % parts:
            raise ValueError(
                f"ffn_width is {self.ffn_width}; it must be a multiple of grain * num_stages = "
                f"{parts}"
            )

    def renormalizes(self, stage: int) -> bool:
        """Whether this stage's chosen weights are divided by their sum."""
        return self.top_k[stage] > 1 if self.renormalize is None else self.renormalize

    @property
    def expert_width(self) -> int:
        """Hidden width of one routed expert."""
        return self.ffn_width // (self.grain * self.num_stages)

    @property
    def gate(self) -> str:
        """ "linear" (learnt) or "table" (looked up by token id, family hash)."""
        return FAMILIES[self.family].gate

    def is_moe(self, layer: int) -> bool:
        """Whether this decoder layer's FFN is routed."""
        first, interval = self.first_moe_layer, self.moe_interval
        routed = FAMILIES[self.family].ffn != "dense"
        return routed and layer >= first and (layer - first) % interval == 0

    @classmethod
    def preset(cls, name: str, family: str = "cartesian", **changes: Any) -> ModelConfig:
        """A size of paper.md ("base", "large") or of this project ("micro", "nano", "small").

        `changes` override fields; ffn_width is then taken as it is given. Raises `ValueError`
        listing the choices for an unknown preset, family or field.
        """
        check_choice("preset", name, PRESETS)
        check_choice("family", family, FAMILIES)
        shape = dict(PRESETS[name])
        up, down = FAMILIES[family].width_ratio
        shape["ffn_width"] = shape["ffn_width"] * up // down
        return cls(family=family, **(shape | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` takes it back."""
        return asdict(self) | {"top_k": list(self.top_k)}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ModelConfig:
        """Raises `ValueError` for fields that do not exist or are missing."""
        return cls(**d)
