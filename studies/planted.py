"""Overlap metrics on experts of which the answer is known: python studies/planted.py

Prints a row a metric and case: what is expected, and what comes out.

Shapes: E experts, T tokens, D model, F hidden width, K slots.
"""

import math
import warnings

import pandas as pd
import torch

from analysis.overlap import ExpertWeights, outputs, usage, weights
from analysis.overlap.outputs import swiglu
from analysis.overlap.substitution import linear_substitution

T, D, F = 512, 64, 32
GENERATOR = torch.Generator().manual_seed(0)


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
    """What the metric says of the two."""
    return matrix_EE[0, 1].item()


def rows():
    """(metric, case, expected, got)."""
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
    expected = {
        "matched_cosine": ("1", "1", "1", "clearly below 1", "its null"),
        "flat_cosine": ("1", "low", "low", "about 3/4", "0"),
        "cka": ("1", "1", "1", "below 1", "0.01 to 0.12"),
        "output_cosine": ("1", "1", "1", "below 1", "0"),
    }
    x_TD = randn(T, D)
    functions = {
        "matched_cosine": weights.matched_cosine,
        "flat_cosine": weights.flat_cosine,
        "cka": lambda w: outputs.linear_cka(swiglu(w, x_TD)),
        "output_cosine": lambda w: outputs.cosine(swiglu(w, x_TD)),
    }
    for name, function in functions.items():
        for (case, changed), answer in zip(cases.items(), expected[name], strict=True):
            yield name, case, answer, pair_of(function(two(own, changed)))
    y_TD, (turn_DD, _) = randn(T, D), torch.linalg.qr(randn(D, D))
    yield (
        "cka",
        "outputs rotated",
        "1",
        pair_of(outputs.linear_cka(torch.stack([y_TD, y_TD @ turn_DD]))),
    )
    few = torch.stack([randn(48, D), randn(48, D)])
    yield "cka", "independent outputs, 48 tokens", "0", pair_of(outputs.linear_cka(few))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "biased CKA", "the same", "fails: far above 0", pair_of(outputs.biased_cka(few))
    ids_TK, weights_TK = (
        torch.tensor([[0, 1], [0, 2], [1, 0]]),
        torch.tensor([[1, 1], [1, 0], [1, 1]]),
    )
    both = usage.co_activation(ids_TK, 3, weights_TK)
    yield "co_activation", "0 and 1 in two of 0's three tokens", "0.667", both[0, 1].item()
    yield "co_activation", "a slot of weight 0", "0", both[0, 2].item()
    eight = usage.co_activation(torch.arange(8)[None], 8).triu(1)
    yield "co_activation", "K = 8: pairs counted", "28", float((eight > 0).sum())
    label_T = torch.arange(600) % 4
    joint = (
        torch.eye(4, dtype=torch.float64)[label_T].T @ torch.eye(4, dtype=torch.float64)[label_T]
    )
    yield (
        "mi",
        "an expert for each of 4 domains",
        f"{math.log(4):.3f}",
        usage.mutual_information(joint).item(),
    )
    slopes_TE = randn(T, 4)
    slopes_TE[:, 3] = slopes_TE[:, 0]
    even_TE = torch.full((T, 4), 0.25, dtype=torch.float64)
    yield (
        "substitution",
        "a duplicated expert",
        "0",
        linear_substitution(slopes_TE, even_TE)[0, 3].item(),
    )


if __name__ == "__main__":
    table = pd.DataFrame(rows(), columns=["metric", "case", "expected", "got"])
    print(table.round(4).to_string(index=False))
