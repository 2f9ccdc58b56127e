"""studies/sharing.py: its sums by hand, and as a whole with models of one step."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

PATH = Path(__file__).parents[1] / "studies" / "sharing.py"


@pytest.fixture(scope="module")
def sharing():
    spec = importlib.util.spec_from_file_location("sharing", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_levels_are_corpora_of_the_same_tables(sharing):
    for level in sharing.LEVELS:
        corpus = sharing.Run(level, "cartesian", 2).corpus
        assert (corpus.common, corpus.seed) == (level, 2)
        assert corpus.topic == corpus.style == corpus.pair
    assert len({sharing.Run(*key).folder for key in sharing._keys(3)}) == 3 * 3 * 3


def test_means_over_pairs_then_over_seeds(sharing):
    key = dict(level=0.3, model="m", family="cartesian")
    rows = [
        key | dict(train_seed=seed, quantity="cka", value=value)
        for seed, value in enumerate([1.0, 2.0, 6.0])
    ]
    (found,) = sharing.curves(pd.DataFrame(rows)).to_dict("records")
    assert found["mean"] == 3
    half = 4.302653 * np.sqrt(7 / 3)  # Student's t with two degrees of freedom
    assert (found["low"], found["high"]) == pytest.approx((3 - half, 3 + half))
    key |= dict(train_seed=0)
    tables = dict(
        damage=pd.DataFrame(
            [
                key | dict(label=label, delta_nats=nats, clean_nats=2.5)
                for label, nats in (("DropTop(1)", 0.5), ("RandomRouting(1)", 0.75))
            ]
        ),
        pairs=pd.DataFrame(
            [
                key | dict(metric="cka", value=value, expert_i=0, expert_j=j)
                for j, value in ((1, 0.1), (2, 0.3), (-1, 9.0))  # -1 is the shared expert
            ]
        ),
        truth=pd.DataFrame([key | dict(metric="cka", score=v) for v in (0.4, 0.8)]),
        factors=pd.DataFrame(
            [
                key
                | dict(mi_topic=0.1, mi_style=0.2, mi_pair=mi)
                | dict(mi_topic_null=0.1, mi_style_null=0.0, mi_pair_null=0.5)
                for mi in (1, 2)
            ]
        ),
    )
    found = sharing.summary(tables).set_index("quantity").value.to_dict()
    assert found == pytest.approx(
        {"clean loss": 2.5, "DropTop(1)": 0.5, "RandomRouting": 0.75, "cka": 0.2, "cka~truth": 0.6}
        | {"mi_topic": 0, "mi_style": 0.2, "mi_pair": 1.0}
    )


def test_figure_has_means_and_intervals(sharing):
    levels = sorted(sharing.LEVELS)
    rows = [
        dict(quantity=quantity, model=model, family=options["family"], level=level, mean=i + level)
        for i, quantity in enumerate(sharing.PANELS)
        for model, options in sharing.MODELS.items()
        for level in levels
    ]
    table = pd.DataFrame(rows)
    drawing = sharing.figure(table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.2))
    for i, (ax, title) in enumerate(zip(drawing.axes, sharing.PANELS.values(), strict=True)):
        assert ax.get_title() == title
        for line, bars in zip(ax.get_lines(), ax.collections, strict=True):
            np.testing.assert_allclose(line.get_ydata(), [i + level for level in levels])
            ends = [segment[:, 1] for segment in bars.get_segments()]
            expected = [[i + level - 0.1, i + level + 0.2] for level in levels]
            np.testing.assert_allclose(ends, expected)


def test_differences_are_seed_by_seed(sharing):
    """Seeds lie far apart; what the level changes does not."""
    rows = [
        dict(quantity="cka", model="m", family="cartesian", train_seed=seed, level=level)
        | dict(value=10.0 * seed + level * (1 + 0.1 * seed))
        for seed in range(3)
        for level in (0.8, 0.4, 0.0)
    ]
    (found,) = sharing.differences(pd.DataFrame(rows)).to_dict("records")
    assert found["mean"] == pytest.approx(0.8 * 1.1)
    half = 4.302653 * 0.08 / np.sqrt(3)
    assert (found["low"], found["high"]) == pytest.approx((0.88 - half, 0.88 + half))


@pytest.mark.slow
def test_as_a_whole_and_once_more(sharing, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CARTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sharing, "LEVELS", (0.9, 0.0))
    sharing.main(tmp_path / "out", steps=1, seeds=1)
    assert (tmp_path / "out" / "sharing.pdf").is_file()
    first = pd.read_csv(tmp_path / "out" / "curves.csv")
    assert set(sharing.PANELS) <= set(first.quantity)
    assert set(first.level) == {0.9, 0.0}
    monkeypatch.setattr(sharing, "measure", None)  # nothing is measured again
    sharing.main(tmp_path / "out", steps=1, seeds=1)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "curves.csv"), first)
    with pytest.raises(ValueError, match=r"steps is 1 there, 2 asked for"):
        sharing.main(tmp_path / "out", steps=2, seeds=1)
