"""Overlap metrics on experts of which the answer is known: python studies/planted.py

Prints a row a metric and case: the value expected, what came out, and whether it holds. Exits with
1 if one does not.

Shapes: E experts, T tokens, D model, F hidden width, K slots.
"""

import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch

from analysis.overlap.metrics import composite, outputs, usage, weights
from analysis.overlap.metrics.catalogue import METRICS
from analysis.overlap.metrics.first_order import linear_substitution
from analysis.overlap.metrics.outputs import swiglu
from analysis.overlap.metrics.weights import ExpertWeights

T, D, F = 512, 64, 32
GENERATOR = torch.Generator().manual_seed(0)


class Row(NamedTuple):
    """What one metric says of one case; it holds if `got` is between `low` and `high`."""

    metric: str
    case: str
    low: float
    high: float
    got: float

    @property
    def holds(self) -> bool:
        return self.low <= self.got <= self.high


def exactly(value: float) -> tuple[float, float]:
    """Up to rounding."""
    return value - 1e-6, value + 1e-6


def about(value: float, tolerance: float) -> tuple[float, float]:
    """Up to what a finite sample or width adds."""
    return value - tolerance, value + tolerance


def randn(*shape: int) -> torch.Tensor:
    """Standard normal fp64."""
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def expert() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate (F, D), up (F, D), down (D, F) at the scale of training's start."""
    return randn(F, D) / D**0.5, randn(F, D) / D**0.5, randn(D, F) / F**0.5


def two(first, second) -> ExpertWeights:
    """Two experts as a layer."""
    return ExpertWeights(*map(torch.stack, zip(first, second, strict=True)))


def pair_of(matrix_EE: torch.Tensor) -> float:
    """What the metric says of the first two."""
    return matrix_EE[0, 1].item()


def changed_experts() -> Iterator[Row]:
    """An expert and what was made of it, or another one."""
    gate, up, down = own = expert()
    order, scale = torch.randperm(F, generator=GENERATOR), randn(F)
    other = expert()
    cases = {
        "duplicate": own,
        "hidden neurons permuted": (gate[order], up[order], down[:, order]),
        "neurons scaled and sign-flipped": (gate, scale[:, None] * up, down / scale),
        "gate and up permuted differently": (gate[order], up, down),
        "independent": other,
    }
    one, apart, low = exactly(1), (-1, 0.9), about(0, 0.3)
    null: Any = METRICS["matched_cosine"].null
    chance = null(two(own, other)).item()
    expected = {
        "matched_cosine": (one, one, one, apart, about(chance, 0.02)),
        "flat_cosine": (one, low, low, about(0.75, 0.05), about(0, 0.05)),
        "cka": (one, one, one, apart, (0.01, 0.12)),  # shared inputs alone: catalogue.md
        "output_cosine": (one, one, one, apart, about(0, 0.05)),
    }
    x_TD = randn(T, D)
    functions = {
        "matched_cosine": weights.matched_cosine,
        "flat_cosine": weights.flat_cosine,
        "cka": lambda w: outputs.linear_cka(swiglu(w, x_TD)),
        "output_cosine": lambda w: outputs.cosine(swiglu(w, x_TD)),
    }
    for name, function in functions.items():
        for (case, changed), bounds in zip(cases.items(), expected[name], strict=True):
            yield Row(name, case, *bounds, pair_of(function(two(own, changed))))


def planted_outputs() -> Iterator[Row]:
    """Outputs without experts."""
    y_TD, (turn_DD, _) = randn(T, D), torch.linalg.qr(randn(D, D))
    turned = outputs.linear_cka(torch.stack([y_TD, y_TD @ turn_DD]))
    yield Row("cka", "outputs rotated", *exactly(1), pair_of(turned))
    few = torch.stack([randn(48, D), randn(48, D)])
    case = "independent outputs, 48 tokens"
    yield Row("cka", case, *about(0, 0.05), pair_of(outputs.linear_cka(few)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is biased is what this shows
        yield Row("biased CKA", f"{case}: fails", 0.3, 1, pair_of(outputs.biased_cka(few)))


def planted_routing() -> Iterator[Row]:
    """Decisions written by hand."""
    ids_TK = torch.tensor([[0, 1], [0, 2], [1, 0]])
    weights_TK = torch.tensor([[1, 1], [1, 0], [1, 1]])
    both_EE = usage.co_activation(ids_TK, 3, weights_TK)
    case = "0 and 1 in two of 0's three tokens"
    yield Row("co_activation", case, *exactly(2 / 3), pair_of(both_EE))
    yield Row("co_activation", "a slot of weight 0", *exactly(0), both_EE[0, 2].item())
    eight_EE = usage.co_activation(torch.arange(8)[None], 8).triu(1)
    yield Row("co_activation", "K = 8: pairs", *exactly(28), (eight_EE > 0).sum().item())
    each_EZ = 150 * torch.eye(4, dtype=torch.float64)
    information = usage.mutual_information(each_EZ).item()
    case = "an expert for each of 4 domains"
    yield Row("mutual information", case, *about(math.log(4), 0.01), information)


def planted_damage() -> Iterator[Row]:
    """What a duplicate of expert 0 costs in its place, also where both are chosen."""
    slopes_TE = randn(T, 4)
    slopes_TE[:, 3] = slopes_TE[:, 0]
    alone_TE, both_TE = torch.zeros(2, T, 4, dtype=torch.float64)
    alone_TE[:, 0], both_TE[:, [0, 3]] = 1, 0.5
    for case, weights_TE in ("alone", alone_TE), ("where both are chosen", both_TE):
        cost_EE = linear_substitution(slopes_TE, weights_TE)
        yield Row("substitution", f"by a duplicate, {case}", *exactly(0), cost_EE[0, 3].item())


def planted_composites() -> Iterator[Row]:
    """Composed outputs that are sums, and such that are products, of what A and B give."""
    a_ATD, b_BTD = randn(4, T, D), randn(4, T, D)
    for case, expected, outputs_ABTD in (
        ("A + B", exactly(0), a_ATD[:, None] + b_BTD),
        ("A * B", about(9 / 15, 0.05), a_ATD[:, None] * b_BTD),
    ):
        squares_3 = composite.two_way(outputs_ABTD)
        share = (squares_3[2] / squares_3.sum()).item()
        yield Row("composite interaction", case, *expected, share)


CASES = (changed_experts, planted_outputs, planted_routing, planted_damage, planted_composites)

if __name__ == "__main__":
    found = [row for cases in CASES for row in cases()]
    table = pd.DataFrame(found).assign(holds=[row.holds for row in found])
    print(table.round(4).to_string(index=False))
    sys.exit(not table.holds.all())
