"""Random numbers as a pure function of what they are for.

A draw is keyed by (seed, purpose, site, sequence id, position, expert): the same under any batch
size, order, parallelism and set of other conditions, and on any device. The bits are a splitmix64
hash (Steele, Lea, Flood 2014) in int64 arithmetic, which wraps alike everywhere; normals are fp64
Box-Muller, rounded to fp32 at the end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, 2**64 over the golden ratio, as int64


def hash_key(*parts: object) -> int:
    """A signed 64-bit number for any parts that have a repr; stable between runs."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def mix64(x: Tensor) -> Tensor:
    """The splitmix64 finalizer: int64 -> int64, a bijection in which every bit counts."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(-4658895280553007687)  # 0xBF58476D1CE4E5B9
    x = _shift(x, 27).bitwise_xor_(x).mul_(-7723592293110705685)  # 0x94D049BB133111EB
    return _shift(x, 31).bitwise_xor_(x)


def _open_interval(bits: Tensor) -> Tensor:
    """fp64 in (0, 1): with one bit more the largest would round to 1."""
    return (_shift(bits, 12).double() + 0.5).mul_(2.0**-52)


def sequence_hash(tokens_BL: Tensor, real_BL: Tensor | None = None) -> Tensor:
    """(B,) ids of rows of tokens by their content, for rows that come without an id; tokens that
    are not real (None: all are) are none of it."""
    if real_BL is None:
        real_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    each_BL = mix64(tokens_BL + real_BL.cumsum(1) * GOLDEN).masked_fill_(~real_BL, 0)
    return mix64(each_BL.sum(1)) & (2**63 - 1)


class Noise:
    """The draws of one site for T tokens; a draw of a kind and shape is made once and kept.

    cache   where draws are kept. Conditions that perturb the same tokens share one: neighboring
            strengths then see the same unit noise, and pay for it once.
    """

    def __init__(
        self, seed: int, site: object, sequence_T: Tensor, position_T: Tensor, cache: dict
    ):
        self.seed, self.site, self.cache = seed, site, cache
        self.sequence_T, self.position_T = sequence_T, position_T

    def bits(self, width: int, purpose: str = "") -> Tensor:
        """(T, width) int64, all 64 bits random; one column for each expert. They are what other
        draws are made of, and quickly made, so that they are not kept."""
        key = hash_key(self.seed, self.site, purpose)
        token_T = mix64(mix64(self.sequence_T + key) + self.position_T * GOLDEN)
        column = torch.arange(1, width + 1, device=token_T.device) * GOLDEN
        return mix64(token_T[:, None] + column)

    def uniform(self, width: int, purpose: str = "") -> Tensor:
        """(T, width) fp32 in the open interval (0, 1)."""

        def draw() -> Tensor:
            return (_shift(self.bits(width, purpose), 41) + 0.5).mul_(2.0**-23).float()

        return self._once("uniform", width, purpose, draw)

    def normal(self, width: int, purpose: str = "") -> Tensor:
        """(T, width) fp32 standard normal."""

        def draw() -> Tensor:
            bits = self.bits(width, purpose)
            radius = ((_shift(bits, 32).double() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
            angle = bits.bitwise_and(2**32 - 1).double() * (2 * math.pi * 2.0**-32)
            return radius.mul_(angle.cos_()).float()

        return self._once("normal", width, purpose, draw)

    def gumbel(self, width: int, purpose: str = "") -> Tensor:
        """(T, width) fp32 standard Gumbel."""

        def draw() -> Tensor:
            uniform = _open_interval(self.bits(width, purpose))
            return uniform.log_().neg_().log_().neg_().float()

        return self._once("gumbel", width, purpose, draw)

    def of_experts(self, width: int, purpose: str = "") -> Tensor:
        """(width,) fp64 in (0, 1), on the CPU: a draw for each expert that all tokens share."""
        key = torch.tensor(hash_key(self.seed, self.site, purpose))
        bits = mix64(mix64(key) + torch.arange(1, width + 1) * GOLDEN)
        return _open_interval(bits)

    def stream(self, name: object) -> Noise:
        """Draws that are independent of these, for a part of a compound perturbation."""
        site = (self.site, name)
        return Noise(self.seed, site, self.sequence_T, self.position_T, self.cache)

    def integers(self, high: int, width: int, purpose: str = "") -> Tensor:
        """(T, width) int64 in 0..high-1."""
        return _shift(self.bits(width, purpose), 1) % high

    def _once(self, kind: str, width: int, purpose: str, draw: Callable[[], Tensor]) -> Tensor:
        key = (kind, self.seed, self.site, width, purpose)
        if key not in self.cache:
            self.cache[key] = draw()
        return self.cache[key]
