"""Perturbations that move logits: noise, scale, order, resolution, another token's."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from analysis.perturb.base import Perturbation, chosen_mask, finite_std
from analysis.perturb.context import RouterContext
from cartmoe.fields import FINITE, PLAIN, NonNegative, Positive, Share, declared
from cartmoe.routing import stable_topk

FLOATS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
Bits = Annotated[int, Field(strict=True, ge=1, le=24), PLAIN]


@declared
class GaussianNoise(Perturbation):
    """The logits z become z + sigma * s * n, n standard normal and s by default the standard
    deviation of the token's own logits.

    scale    what s is: "token" the std of the token's finite logits, "site" the site's over the
             calibration slice, "absolute" 1
    within   "all" experts, or only those "chosen" by the clean decision
    """

    strength_field: ClassVar[str] = "sigma"
    sigma: NonNegative = 1.0
    scale: Literal["token", "site", "absolute"] = "token"
    within: Literal["all", "chosen"] = "all"

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A noisy copy; -inf stays -inf."""
        if self.sigma == 0:
            return logits_TE
        noise_TE = ctx.noise.normal(logits_TE.shape[-1]).to(logits_TE.dtype)
        if self.within == "chosen":
            noise_TE = noise_TE * chosen_mask(ctx.clean)
        return logits_TE + self.sigma * self.unit(logits_TE, ctx) * noise_TE

    def unit(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor | float:
        """s: what a sigma of 1 means in units of logits; (T, 1) or a number."""
        if self.scale == "token":
            return finite_std(logits_TE)
        return ctx.need_stats(self).std if self.scale == "site" else 1.0


@declared
class GumbelNoise(Perturbation):
    """z + tau * g, g standard Gumbel: the top K are then K draws without replacement in proportion
    to exp(z / tau), as RoE samples routes (arXiv 2509.17238); with a softmax, to p^(1/tau). (A bias
    in the selection, or top-p, then still does what it does.)"""

    strength_field: ClassVar[str] = "tau"
    tau: NonNegative = 1.0

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A noisy copy; -inf stays -inf."""
        if self.tau == 0:
            return logits_TE
        return logits_TE + self.tau * ctx.noise.gumbel(logits_TE.shape[-1]).to(logits_TE.dtype)


@declared
class Temperature(Perturbation):
    """z / 2^log2_t: flatter (log2_t > 0) or sharper weights. With top-k the set stays, as long as
    fp32 can tell the scores apart (up to a log2_t of about 10); with top-p, or a bias in the
    selection, it may not."""

    expects: ClassVar[str] = "weights"
    strength_field: ClassVar[str] = "log2_t"
    log2_t: Annotated[float, Field(strict=True, ge=-64, le=64, allow_inf_nan=False), FINITE] = 1.0

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A scaled copy."""
        return logits_TE if self.log2_t == 0 else logits_TE * 2.0**-self.log2_t


@declared
class SwapRanks(Perturbation):
    """The logits at ranks r and s (1 the highest) change places; changes something if the better
    of the two is in use. Needs no learned router, so hash layers have it too."""

    expects: ClassVar[str] = "weights"
    within_experts: ClassVar[tuple[str, ...]] = ("r", "s")
    r: Positive = 1
    s: Positive = 2

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A copy with two entries of each row exchanged."""
        if self.r == self.s:
            return logits_TE
        self.check([ctx.site])
        order_TK = stable_topk(logits_TE, max(self.r, self.s))
        pair_T2 = torch.stack([order_TK[:, self.r - 1], order_TK[:, self.s - 1]], -1)
        value_T2 = logits_TE.gather(-1, pair_T2)
        masked_T1 = (value_T2 == -torch.inf).any(-1, keepdim=True)  # who is out stays out
        return logits_TE.scatter(-1, pair_T2, torch.where(masked_T1, value_T2, value_T2.flip(-1)))


@declared
class RandomRouting(Perturbation):
    """A share of the tokens is routed as if it were another token: what routing is worth that knows
    nothing of its token. Experts that a mask has taken away before stay away.

    draw   "reservoir": its logits become a row of the calibration's reservoir, which keeps the
           marginal load; "permute": its own logits are permuted over the experts
    """

    strength_field: ClassVar[str] = "share"
    share: Share = 1.0
    draw: Literal["reservoir", "permute"] = "reservoir"

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A copy with other rows for that share of tokens."""
        if self.share == 0:
            return logits_TE
        E, masked_TE = logits_TE.shape[-1], logits_TE == -torch.inf
        if self.draw == "permute":
            key_TE = ctx.noise.uniform(E, "permute").masked_fill(masked_TE, 2.0)
            from_TE = key_TE.argsort(dim=-1, stable=True)
            to_TE = masked_TE.to(torch.int8).argsort(dim=-1, stable=True)  # masked ones last too
            other_TE = logits_TE.scatter(-1, to_TE, logits_TE.gather(-1, from_TE))
        else:
            reservoir_RE = ctx.need_stats(self).reservoir_RE
            row_T = ctx.noise.integers(len(reservoir_RE), 1, "row")[:, 0]
            other_TE = reservoir_RE.to(logits_TE)[row_T].masked_fill(masked_TE, -torch.inf)
        return torch.where(ctx.noise.uniform(1, "who") < self.share, other_TE, logits_TE)


@declared
class Quantize(Perturbation):
    """z rounded: the numeric floor of routing.

    to   "bf16", "fp8" (e4m3), or a number of bits: so many levels between the lowest and the
         highest finite logit of the token; None leaves z as it is
    """

    expects: ClassVar[str] = "weights"
    to: Literal["bf16", "fp8"] | Bits | None = "bf16"

    @property
    def strength(self) -> float:
        """The number of bits; NaN for a format of floats."""
        return float(self.to) if isinstance(self.to, int) else math.nan

    @property
    def label(self) -> str:
        """ "Quantize(bits)", "Quantize(fp8)", "Quantize" for bf16."""
        if isinstance(self.to, int):
            return "Quantize(bits)"
        return "Quantize" if self.to == "bf16" else f"Quantize({self.to})"

    def identity(self) -> Perturbation:
        """No rounding."""
        return Quantize(None)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A rounded copy; -inf stays -inf."""
        if self.to is None:
            return logits_TE
        if isinstance(self.to, str):
            # fp8 has no infinity: what is masked stays so, what is too large saturates.
            limit = torch.finfo(FLOATS[self.to]).max
            rounded_TE = logits_TE.clamp(-limit, limit).to(FLOATS[self.to]).to(logits_TE.dtype)
            return rounded_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)
        finite_TE = logits_TE.isfinite()
        low_T1 = logits_TE.masked_fill(~finite_TE, torch.inf).amin(-1, keepdim=True)
        high_T1 = logits_TE.masked_fill(~finite_TE, -torch.inf).amax(-1, keepdim=True)
        step_T1 = ((high_T1 - low_T1) / (2**self.to - 1)).clamp(min=torch.finfo().tiny)
        rounded_TE = low_T1 + ((logits_TE - low_T1) / step_T1).round() * step_T1
        return torch.where(finite_TE, rounded_TE, logits_TE)
