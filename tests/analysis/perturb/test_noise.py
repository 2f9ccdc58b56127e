"""Noise: a pure function of seed, purpose, site, sequence, position and expert."""

import math

import pytest
import torch

from analysis.perturb.noise import Noise, _open_interval, hash_key, mix64, sequence_hash

KINDS = pytest.mark.parametrize("kind", ["bits", "uniform", "normal", "gumbel", "integers"])


def noise(seed=0, site=(0, 0), sequences=range(4), positions=range(8), cache=None):
    """Every position of every sequence."""
    sequences, positions = torch.tensor([*sequences]), torch.tensor([*positions])
    sequence_T = sequences.repeat_interleave(len(positions))
    position_T = positions.repeat(len(sequences))
    return Noise(seed, site, sequence_T, position_T, {} if cache is None else cache)


def draw(kind, width=6, purpose="", **options):
    """(sequences, positions, width)"""
    made = noise(**options)
    arguments = (1000, width, purpose) if kind == "integers" else (width, purpose)
    return getattr(made, kind)(*arguments).view(len(made.sequence_T.unique()), -1, width)


# ---- distributions


def test_uniform():
    u = noise(sequences=range(200), positions=range(100)).uniform(16)
    assert u.dtype == torch.float32
    assert ((u > 0) & (u < 1)).all()
    assert u.mean() == pytest.approx(0.5, abs=2e-3)
    assert u.double().var() == pytest.approx(1 / 12, abs=1e-3)
    counts = torch.histc(u, 32, 0, 1)
    assert ((counts / counts.mean() - 1).abs() < 0.05).all()


def test_normal():
    n = noise(sequences=range(200), positions=range(100)).normal(16).double()
    assert n.isfinite().all()
    assert n.mean() == pytest.approx(0, abs=5e-3)
    assert n.std() == pytest.approx(1, abs=5e-3)
    assert (n**3).mean() == pytest.approx(0, abs=0.02)
    assert (n**4).mean() == pytest.approx(3, abs=0.05)
    for limit in (-1.0, 0.0, 1.5):
        below = (1 + math.erf(limit / math.sqrt(2))) / 2
        assert (n < limit).double().mean() == pytest.approx(below, abs=3e-3)


def test_gumbel():
    """Mean is Euler's constant, variance pi^2 / 6, P(g < x) = exp(-exp(-x))."""
    g = noise(sequences=range(200), positions=range(100)).gumbel(16)
    assert g.dtype == torch.float32
    assert g.isfinite().all()
    assert g.double().mean() == pytest.approx(0.5772, abs=0.01)
    assert g.double().var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for limit in (-1.0, 0.0, 2.0):
        below = math.exp(-math.exp(-limit))
        assert (g < limit).double().mean() == pytest.approx(below, abs=3e-3)


def test_the_ends_of_the_interval_are_open():
    """The lowest and the highest bits: a logarithm of either must be finite."""
    ends = _open_interval(torch.tensor([0, -1]))
    assert (ends > 0).all()
    assert (ends < 1).all()
    assert (-(-ends.log()).log()).isfinite().all()


def test_a_draw_for_each_expert():
    """Of a router and a seed, whatever the tokens."""
    draws = torch.stack([noise(seed=seed).of_experts(40, "dead") for seed in range(500)])
    assert draws.dtype == torch.float64
    assert draws.device.type == "cpu"
    assert ((draws > 0) & (draws < 1)).all()
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert len(draws.unique()) == 500 * 40
    other_tokens = noise(sequences=[77], positions=[5, 6])
    assert noise().of_experts(40, "dead").equal(other_tokens.of_experts(40, "dead"))
    assert noise().of_experts(10, "dead").equal(noise().of_experts(40, "dead")[:10])
    for change in (dict(seed=1), dict(site=(0, 1))):
        assert not noise(**change).of_experts(40, "dead").equal(draws[0])
    assert not noise().of_experts(40, "x").equal(draws[0])


def test_integers():
    i = noise(sequences=range(100), positions=range(100)).integers(7, 10)
    shares = torch.bincount(i.flatten(), minlength=7) / i.numel()
    torch.testing.assert_close(shares, torch.full((7,), 1 / 7), atol=5e-3, rtol=0)


@pytest.mark.parametrize("axis", range(3))
def test_neighbors_are_independent(axis):
    """Sequences, positions and experts with consecutive numbers."""
    n = draw("normal", 20, sequences=range(60), positions=range(50)).double()
    a, b = n.narrow(axis, 0, n.shape[axis] - 1), n.narrow(axis, 1, n.shape[axis] - 1)
    assert abs((a * b).mean()) < 0.015


def test_bits_are_distinct():
    assert len(draw("bits", 20, sequences=range(60), positions=range(50)).unique()) == 60000


def test_every_bit_counts():
    x = torch.arange(4096)
    assert len(mix64(x).unique()) == 4096
    flipped = mix64(x[:, None] ^ (1 << torch.arange(63))) ^ mix64(x)[:, None]
    ones = sum((flipped >> i) & 1 for i in range(64)).double()
    assert ones.mean() == pytest.approx(32, abs=0.2)
    assert ones.mean(0).sub(32).abs().max() < 0.5


# ---- pure in its key


@KINDS
def test_same_for_any_batch_order_and_subset(kind):
    whole = draw(kind)
    assert draw(kind).equal(whole)
    order = [2, 0, 3, 1]
    assert draw(kind, sequences=order).equal(whole[order])
    assert draw(kind, sequences=[2]).equal(whole[[2]])
    assert draw(kind, positions=[5, 1]).equal(whole[:, [5, 1]])
    assert draw(kind, width=3).equal(whole[..., :3])


@KINDS
@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(site=(0, 1)),
        dict(site=(1, 0)),
        dict(purpose="drop"),
        dict(sequences=range(4, 8)),
        dict(positions=range(8, 16)),
    ],
    ids=str,
)
def test_another_key_is_another_draw(kind, change):
    a, b = draw(kind), draw(kind, **change)
    assert (a == b).double().mean() < 0.05
    assert abs(torch.corrcoef(torch.stack([a, b]).double().flatten(1))[0, 1]) < 0.2


def test_ids_of_full_width():
    """Sequence ids are hashes: the highest bits must count as the lowest do."""
    ids = [1, 2**62 + 1, 2**63 - 1, -(2**63)]
    assert len(draw("bits", sequences=ids).unique()) == 4 * 8 * 6


def test_the_algorithm_is_fixed():
    """Draws of another version of the program are the same; these are."""
    assert hash_key(0, (0, 1), "x") == hash_key(0, (0, 1), "x") != hash_key(0, (0, 1), "y")
    assert mix64(torch.tensor([0, 1, -1])).tolist() == [0, *map(splitmix64, (1, -1))]


def splitmix64(x: int) -> int:
    """The finalizer in Python's unbounded integers."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


# ---- shared draws


def test_draws_are_made_once():
    cache = {}
    first, second = noise(cache=cache), noise(cache=cache)
    assert second.normal(6) is first.normal(6)
    assert first.uniform(6) is first.uniform(6)
    assert first.uniform(6, "drop") is not first.uniform(6)
    assert noise(seed=1, cache=cache).normal(6) is not first.normal(6)
    assert noise(site=(0, 1), cache=cache).normal(6) is not first.normal(6)
    assert first.normal(6).equal(noise().normal(6))


def test_streams_are_other_draws_of_the_same_tokens():
    """Independent of each other and of what they come from, nested ones too; again the same."""
    cache = {}
    whole = noise(cache=cache, sequences=range(40), positions=range(20))
    made = [
        *(whole, whole.stream(0), whole.stream(1), whole.stream(0).stream(1)),
        *(whole.stream(1).stream(0), noise(site=(0, 1), sequences=range(40), positions=range(20))),
    ]
    drawn = torch.stack([n.normal(12).flatten() for n in made])
    correlation = drawn.corrcoef() - torch.eye(len(made))
    assert correlation.abs().max() < 0.05
    assert whole.stream(0).normal(12) is made[1].normal(12)
    assert whole.stream(0).of_experts(5).equal(noise().stream(0).of_experts(5))
    assert not whole.stream(0).of_experts(5).equal(whole.of_experts(5))


# ---- ids of rows without one


def test_sequence_hash():
    tokens_BL = torch.randint(0, 50, (64, 9), generator=torch.Generator().manual_seed(0))
    ids = sequence_hash(tokens_BL)
    assert ids.shape == (64,)
    assert (ids >= 0).all()
    assert len(ids.unique()) == 64
    assert sequence_hash(tokens_BL[[3]]).equal(ids[[3]])
    assert sequence_hash(tokens_BL.flip(1)).ne(ids).all()  # the order of tokens counts
    assert sequence_hash(tokens_BL[:, :-1]).ne(ids).all()
    assert sequence_hash(tokens_BL.to(torch.int32)).equal(ids)
