"""How often intervals hold the truth: simulated documents whose lengths and damages have heavy
tails. Prints the coverage of each; `pytest -m slow -s tests/analysis/stats/test_coverage.py`.

A document's damage per token has a log-normal part that every condition and run of training
shares, so that comparisons are paired, and a part of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.seeds import two_level

TRIALS, RESAMPLES = 1000, 999
NOMINAL = 0.95


class Tails(NamedTuple):
    """Standard deviations of the logarithms of length and damage, and their correlation."""

    length: float
    damage: float
    correlation: float

    @property
    def tilt(self) -> float:
        """sum(tokens * damage) / sum(tokens) over the mean damage, which is 1."""
        return np.exp(self.correlation * self.length * self.damage)

    def draw(self, rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of documents, and their damage per token."""
        size, other = rng.standard_normal((2, number))
        fragile = self.correlation * size + np.sqrt(1 - self.correlation**2) * other
        shared = np.exp(self.damage * fragile - self.damage**2 / 2)
        return 200 * np.exp(self.length * size), shared


# Packages of the standard library have 0.8 and, by model and condition, 0.1 to 0.8 (DropTop 0.2 to
# 0.3) without correlation. With the other tails 5 of 100 documents carry half of the damage: no
# resampling of documents can know what was not drawn, and intervals are too short.
TAILS = {"measured": Tails(0.8, 0.5, 0.0), "extreme": Tails(1.0, 1.0, 0.3)}


def own(rng: np.random.Generator, number: int) -> np.ndarray:
    """A condition's own factor of each document's damage, of mean 1."""
    return np.exp(0.3 * rng.standard_normal(number) - 0.3**2 / 2)


def covered(trials) -> float:
    return float(np.mean([low <= truth <= high for truth, low, high in trials]))


def report(name: str, coverage: float) -> None:
    error = np.sqrt(coverage * (1 - coverage) / TRIALS)
    print(f"\n{name}: {coverage:.3f} +- {error:.3f} (nominal {NOMINAL})", end="")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tails", "number", "least"),
    [
        ("measured", 30, 0.86), ("measured", 100, 0.90), ("measured", 300, 0.90),
        ("extreme", 30, 0.70), ("extreme", 100, 0.78), ("extreme", 300, 0.82),
    ],
)  # fmt: skip
def test_ratio_over_documents(tails, number, least):
    rng, kind = np.random.default_rng(number), TAILS[tails]

    def trial(seed):
        tokens, shared = kind.draw(rng, number)
        delta = 0.5 * tokens * shared * own(rng, number)
        found = Bootstrap(resamples=RESAMPLES, seed=seed).intervals(delta[None], tokens[None])
        return 0.5 * kind.tilt, found.low_M[0], found.high_M[0]

    coverage = covered(map(trial, range(TRIALS)))
    report(f"BCa, ratio, {tails} tails, {number} documents", coverage)
    assert least <= coverage <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tails", "number", "least"),
    [
        ("measured", 30, 0.86), ("measured", 100, 0.90), ("measured", 300, 0.90),
        ("extreme", 30, 0.70), ("extreme", 100, 0.78), ("extreme", 300, 0.82),
    ],
)  # fmt: skip
def test_contrast_over_documents(tails, number, least):
    rng, kind = np.random.default_rng(number + 1), TAILS[tails]

    def trial(seed):
        tokens, shared = kind.draw(rng, number)
        deltas = [cost * tokens * shared * own(rng, number) for cost in (0.5, 0.4)]
        found = Bootstrap(resamples=RESAMPLES, seed=seed).intervals(
            np.array(deltas), np.array([tokens] * 2), np.array([[1.0], [-1.0]])
        )
        return 0.1 * kind.tilt, found.low_M[0], found.high_M[0]

    coverage = covered(map(trial, range(TRIALS)))
    report(f"BCa, contrast, {tails} tails, {number} documents", coverage)
    assert least <= coverage <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "least"), [((21, 6, 3), 0.84), ((14, 10, 6), 0.85)])
def test_ratio_within_domains(sizes, least):
    """Domains that differ in damage, each with as many documents in every sample."""
    domain_D = np.repeat(np.arange(3), sizes)
    cost_S, number, kind = np.array([0.5, 0.75, 0.3]), sum(sizes), TAILS["measured"]
    truth = cost_S @ sizes / number
    rng = np.random.default_rng(number)

    def trial(seed):
        tokens, shared = kind.draw(rng, number)
        delta = cost_S[domain_D] * tokens * shared * own(rng, number)
        bootstrap = Bootstrap(resamples=RESAMPLES, seed=seed).within(domain_D)
        found = bootstrap.intervals(delta[None], tokens[None])
        return truth, found.low_M[0], found.high_M[0]

    coverage = covered(map(trial, range(TRIALS)))
    report(f"BCa, ratio, measured tails, domains of {sizes}", coverage)
    assert least <= coverage <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("number", [30, 100, 300])
@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_two_levels_over_runs_and_documents(runs, number, spread):
    """Runs of one model differ by `spread` of their damage."""
    rng, kind = np.random.default_rng([runs, number, int(1000 * spread)]), TAILS["measured"]

    def trial(seed):
        tokens, shared = kind.draw(rng, number)
        sides = []
        for cost in (0.5, 0.4):
            levels = cost * (1 + spread * rng.standard_normal(runs))
            delta = np.array([level * tokens * shared * own(rng, number) for level in levels])
            sides.append((delta, np.tile(tokens, (runs, 1))))
        _, low, high = two_level(*sides, Bootstrap(NOMINAL, RESAMPLES, seed))
        return 0.1 * kind.tilt, low, high

    coverage = covered(map(trial, range(TRIALS)))
    report(f"two levels, {runs} runs that differ by {spread:g}, {number} documents", coverage)
    assert 0.90 <= coverage <= 1.0
