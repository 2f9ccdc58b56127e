"""Tables of single tokens against plain loops over all of them."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import stats
from analysis.stats.bootstrap import Bootstrap

from ..synthetic import arm, losses, tokens

TOP = arm("DropTop", 1, 0.5)
NOISE = arm("GaussianNoise", 1.0, 0.3)


@pytest.fixture(scope="module")
def table():
    table = losses([TOP, NOISE], eval_seeds=2, documents=12)
    # A document may have sequences of both.
    first = (table.document_id < "doc005") & table.sequence_id.str.contains("[02468]$")
    return table.assign(domain=np.where(first, "a", "b"))


@pytest.fixture(scope="module")
def kept(table):
    return tokens(table)


def by_hand(table, kept, perturbation: str) -> list[dict]:
    """Every token as a dict; rises of several seeds in a list."""
    clean = kept("cartesian", 0, "clean")
    arms = [
        kept("cartesian", 0, c)
        for c in table.condition[table.perturbation == perturbation].unique()
    ]
    domain = table.drop_duplicates("sequence_id").set_index("sequence_id").domain
    out = []
    for i, row in enumerate(clean.itertuples()):
        base = np.frombuffer(row.nll, np.float32).astype(float)
        others = [np.frombuffer(a.nll.iloc[i], np.float32).astype(float) for a in arms]
        for position, target in enumerate(np.frombuffer(row.targets, np.int32)):
            out.append(
                dict(document=row.document_id, domain=domain[row.sequence_id], position=position,
                     target=target, rises=[o[position] - base[position] for o in others])
            )  # fmt: skip
    return out


def test_tails_are_those_of_all_tokens_of_all_seeds(table, kept):
    found = stats.tails(table, kept).set_index("condition")
    for name, perturbation in (("DropTop(1)", "DropTop"), ("GaussianNoise(1)", "GaussianNoise")):
        rise = np.array([r for t in by_hand(table, kept, perturbation) for r in t["rises"]])
        row = found.loc[name]
        assert row.num_tokens == len(rise)
        assert row["mean"] == pytest.approx(rise.mean())
        assert row["q0.99"] == pytest.approx(np.quantile(rise, 0.99))
        assert row["max"] == pytest.approx(rise.max())
        assert row.rising == pytest.approx((rise > 0).mean())
        worst = sorted(rise, reverse=True)[: round(0.01 * len(rise))]
        assert row["worst_0.01"] == pytest.approx(sum(worst) / rise.sum())
    damage = stats.damage(table, bootstrap=Bootstrap(resamples=9)).set_index("label").delta_nats
    assert found["mean"].to_dict() == pytest.approx(damage.to_dict(), rel=1e-5)


def test_an_even_spread_and_one_token_that_carries_all():
    table = losses([TOP], documents=3)
    frames = {}
    for key in ("clean", table.condition[table.perturbation == "DropTop"].iloc[0]):
        rows = table[table.perturbation == ("clean" if key == "clean" else "DropTop")]
        nll = [np.full(n, 1.0 if key == "clean" else 1.5, np.float32) for n in rows.num_tokens]
        frames[key] = rows[["document_id", "sequence_id"]].assign(nll=nll)
    even = {key: f.assign(nll=[n.tobytes() for n in f.nll]) for key, f in frames.items()}
    targets = [np.zeros(n, np.int32).tobytes() for n in rows.num_tokens]
    even["clean"] = even["clean"].assign(targets=targets)
    row = stats.tails(table, lambda m, s, c: even[c]).iloc[0]
    assert row["worst_0.1"] == pytest.approx(0.1, rel=0.01)
    curve = stats.tail_curve(table, lambda m, s, c: even[c])
    np.testing.assert_allclose(curve.carried, curve.share, rtol=1e-6)
    one = dict(even)
    spike = np.ones(rows.num_tokens.iloc[0], np.float32)
    spike[3] = 8.0
    rest = [np.ones(n, np.float32).tobytes() for n in rows.num_tokens[1:]]
    key = next(k for k in even if k != "clean")
    one[key] = even[key].assign(nll=[spike.tobytes(), *rest])
    row = stats.tails(table, lambda m, s, c: one[c]).iloc[0]
    assert (row["max"], row["worst_0.01"], row["q0.5"]) == (7, 1, 0)
    curve = stats.tail_curve(table, lambda m, s, c: one[c])
    assert (curve.carried == 1).all()
    assert curve.rise.tolist()[:2] == [7, 0]


def test_no_damage_is_carried_by_nobody():
    nothing = losses([arm("Identity")], documents=3)
    store = tokens(nothing)
    row = stats.tails(nothing, lambda m, s, c: store(m, s, "clean")).iloc[0]
    assert (row["mean"], row["max"], row.rising) == (0, 0, 0)
    assert np.isnan([row["worst_0.01"], row["worst_0.1"]]).all()


def group_of(token: dict, by: str, counts: dict) -> str:
    if by == "domain":
        return token["domain"]
    if by == "frequency":
        digits = len(str(counts[token["target"]]))
        return f"{10 ** (digits - 1)}-{10**digits - 1}"
    position = token["position"]
    if position < 2:
        return str(position)
    low = 2 ** (position.bit_length() - 1)
    return f"{low}-{2 * low - 1}"


@pytest.mark.parametrize("by", ["position", "frequency", "domain"])
def test_groups_against_plain_loops(table, kept, by):
    found = stats.damage_by(table, by, kept, bootstrap=Bootstrap(resamples=99))
    for name, perturbation in (("DropTop(1)", "DropTop"), ("GaussianNoise(1)", "GaussianNoise")):
        every = by_hand(table, kept, perturbation)
        counts = {}
        for token in every:
            counts[token["target"]] = counts.get(token["target"], 0) + 1
        groups: dict[str, list] = {}
        for token in every:
            groups.setdefault(group_of(token, by, counts), []).append(token)
        rows = found[found.condition == name].set_index("group")
        assert set(rows.index) == set(groups)
        assert rows.order.is_monotonic_increasing
        total = sum(np.mean(t["rises"]) for t in every)
        for group, members in groups.items():
            rise = sum(np.mean(t["rises"]) for t in members)
            row = rows.loc[group]
            assert row.num_tokens == len(members)
            assert row.num_documents == len({t["document"] for t in members})
            assert row.delta_nats == pytest.approx(rise / len(members), rel=1e-4)
            assert row.share == pytest.approx(rise / total, rel=1e-4)
        assert rows.share.sum() == pytest.approx(1)
        assert (rows.low < rows.high).all()


def test_a_group_that_is_everything_has_the_damage_and_its_interval(table):
    table, bootstrap = table.assign(domain="x"), Bootstrap(resamples=499)
    whole = stats.damage(table, bootstrap=bootstrap).set_index("label")
    found = stats.damage_by(table, "domain", bootstrap=bootstrap)
    for row in found.itertuples():
        expected = whole.loc[row.condition, ["delta_nats", "low", "high"]].tolist()
        assert [row.delta_nats, row.low, row.high] == pytest.approx(expected, rel=1e-12)


def test_a_group_within_one_document_has_no_interval(table):
    alone = table.assign(domain=np.where(table.document_id == "doc003", "rare", "b"))
    row = stats.damage_by(
        alone, "domain", conditions=["DropTop(1)"], bootstrap=Bootstrap(resamples=99)
    )
    rare = row.set_index("group").loc["rare"]
    assert rare.num_documents == 1
    assert np.isnan([rare.low, rare.high]).all()


def test_only_the_asked_conditions_are_read(table, kept):
    read = []

    def watched(*key):
        read.append(key[2])
        return kept(*key)

    found = stats.tails(table, watched, ["DropTop(1)"])
    assert found.condition.tolist() == ["DropTop(1)"]
    assert len(read) == 2


def test_tokens_errors_teach(table, kept):
    for call in (stats.tails, stats.tail_curve, lambda t, k: stats.damage_by(t, "position", k)):
        with pytest.raises(ValueError, match="was not kept: give tokens=True to sweep, or write"):
            call(table, None)
    for call in (
        lambda: stats.tails(table, kept, ["Drop"]),
        lambda: stats.damage_by(table, "domain", conditions=["Drop"]),
    ):
        with pytest.raises(ValueError, match=r"condition is 'Drop'; choose one of 'DropTop\(1\)'"):
            call()
    with pytest.raises(ValueError, match="by is 'length'; choose one of 'position', 'frequency'"):
        stats.damage_by(table, "length", kept)
    with pytest.raises(ValueError, match=r"under DropTop\(1\) lack sequences that losses have"):
        stats.tails(table, lambda m, s, c: kept(m, s, c).iloc[int(c != "clean") :])
    short = kept("cartesian", 0, "clean")
    short = short.assign(nll=[n[4:] for n in short.nll])
    with pytest.raises(ValueError, match=r"under DropTop\(1\) are not those of its clean run"):
        stats.tails(table, lambda m, s, c: short if c != "clean" else kept(m, s, c))
