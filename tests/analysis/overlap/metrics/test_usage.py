"""Use of experts: hand-written decisions, planted experts, and every metric against loops."""

import functools
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from analysis.overlap.metrics.base import Probe, estimate, total, without_each
from analysis.overlap.metrics.usage import (
    class_jaccard,
    co_activation,
    committee,
    conditional_mutual_information,
    entropy,
    gini,
    jaccard,
    js_divergence,
    lift,
    load_entropy,
    max_vio,
    mutual_information,
    saturation,
    transition,
    used_mask,
    vocabulary_specialization,
)
from analysis.overlap.metrics.usage_metrics import METRICS
from analysis.overlap.metrics.usage_stream import UsageStream
from cartmoe.hooks import RouterSite
from cartmoe.routing import Router, Routing

E, F, V, Z, R, UNITS = 6, 5, 9, 3, 4, 3
NAN = math.nan


def close(got, expected, **options):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(got, expected, **dict(rtol=1e-6, atol=1e-9) | options)


# ---- decisions of every kind, and probes of them


def decision(kind: str, T: int, num_experts: int, generator: torch.Generator) -> Routing:
    """Of T tokens; "zeros" has slots of weight 0 anywhere, "repeated" has experts that stand twice,
    "top_p" as many slots as experts, and "rare" experts that nobody uses."""
    logits_TE = 2 * torch.randn(T, num_experts, generator=generator)
    if kind == "rare":
        logits_TE[:, 1:3] = -torch.inf
    top_p = 0.6 if kind == "top_p" else None
    router = Router(torch.nn.Identity(), num_experts, 3, top_p=top_p)
    routing = router.route(logits_TE)
    if kind == "zeros":
        lost_TK = torch.rand(T, 3, generator=generator) < 0.4
        return routing._replace(weights_TK=routing.weights_TK.masked_fill(lost_TK, 0))
    if kind == "repeated":
        ids_TK = torch.randint(num_experts, (T, 3), generator=generator)
        lost_TK = torch.rand(T, 3, generator=generator) < 0.2
        return routing._replace(
            ids_TK=ids_TK, weights_TK=routing.weights_TK.masked_fill(lost_TK, 0)
        )
    return routing


def probe_of(kind: str, T: int = 40, seed: int = 0, unit: int = 0, first: bool = False) -> Probe:
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=generator)

    routing = decision(kind, T, E, generator)
    before = None if first else decision(kind, T, F, generator)
    labels = (draw(V, T), draw(Z, T), draw(V, R, T), draw(Z, R, T))
    x_TD = torch.zeros(T, 1)
    return Probe(unit, x_TD, routing, *labels, before, x_TD)


KINDS = ("plain", "zeros", "repeated", "top_p", "rare")
every_kind = pytest.mark.parametrize("kind", KINDS)


def some(probe: Probe, rows: list[int] | slice) -> Probe:
    """Those of its tokens."""

    def of(routing: Routing) -> Routing:
        return Routing(*(t[rows] for t in routing))

    return probe._replace(
        x_TD=probe.x_TD[rows],
        routing=of(probe.routing),
        tokens_T=probe.tokens_T[rows],
        domain_T=probe.domain_T[rows],
        other_tokens_RT=probe.other_tokens_RT[:, rows],
        other_domain_RT=probe.other_domain_RT[:, rows],
        before=probe.before and of(probe.before),
    )


def stream_of(*probes: Probe, classes: bool = True) -> UsageStream:
    stream = UsageStream(RouterSite("router", 0, 0, E, 3), UNITS, V, Z, classes)
    for probe in probes:
        stream.add(probe)
    return stream


def probes_of(kind: str) -> list[Probe]:
    return [probe_of(kind, 40 + unit, seed=unit, unit=unit) for unit in range(UNITS)]


# ---- a slow reference: sets and counters, one token after the other


def uses(routing: Routing) -> list[dict[int, float]]:
    """By token, expert -> weight."""
    found = []
    for ids, weights in zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True):
        used: dict[int, float] = {}
        for e, weight in zip(ids, weights, strict=True):
            if weight > 0:
                used[e] = used.get(e, 0) + weight
        found.append(used)
    return found


def ratio(a: float, b: float) -> float:
    return a / b if b else NAN


def mm_entropy(events: list) -> float:
    counts, n = Counter(events), len(events)
    return -sum(c / n * math.log(c / n) for c in counts.values()) + (len(counts) - 1) / (2 * n)


def mm_information(events: list[tuple]) -> float:
    left, right = zip(*events, strict=True)
    return mm_entropy(list(left)) + mm_entropy(list(right)) - mm_entropy(events)


def mm_given(events: list[tuple]) -> float:
    """I(x; y | z) of triples."""
    xz, yz = [(x, z) for x, _, z in events], [(y, z) for _, y, z in events]
    return (
        mm_entropy(xz) + mm_entropy(yz) - mm_entropy(events) - mm_entropy([z for *_, z in events])
    )


class Slow:
    """Every metric and its null of all tokens of these probes."""

    def __init__(self, probes: list[Probe]):
        self.used = [used for p in probes for used in uses(p.routing)]
        self.before = [used for p in probes if p.before for used in uses(p.before)]
        self.scores = torch.cat([p.routing.scores_TE for p in probes]).double().tolist()
        self.token, self.domain = (
            torch.cat(labels).tolist()
            for labels in ([p.tokens_T for p in probes], [p.domain_T for p in probes])
        )
        self.others = [
            (
                torch.cat([p.other_tokens_RT[r] for p in probes]).tolist(),
                torch.cat([p.other_domain_RT[r] for p in probes]).tolist(),
            )
            for r in range(R)
        ]
        self.T = len(self.used)
        self.n = [sum(e in used for used in self.used) for e in range(E)]
        self.slots = sum(self.n)
        weight = [sum(used.get(e, 0) for used in self.used) for e in range(E)]
        self.weight = [w / sum(weight) for w in weight]

    def both(self, i: int, j: int) -> int:
        return sum(i in used and j in used for used in self.used)

    def pairs(self, function) -> list:
        return [[function(i, j) for j in range(E)] for i in range(E)]

    def mean(self, function, label: int) -> np.ndarray:
        return np.mean([function(other[label]) for other in self.others], axis=0)

    def labelled(self, labels: list) -> list[tuple]:
        return [(e, x) for used, x in zip(self.used, labels, strict=True) for e in used]

    @functools.cached_property
    def taste(self) -> list[float]:
        """a with a_i sum_{j != i} a_j = company of i, one expert after the other."""
        company = [sum(self.both(i, j) for j in range(E) if j != i) for i in range(E)]
        a = [math.sqrt(c) for c in company]
        for _ in range(2000):
            for i in range(E):
                a[i] = company[i] / (sum(a) - a[i]) if company[i] else 0.0
        return a

    def chance(self, i, j):
        """Uses of i and j at once if nobody had a taste in company."""
        return min(self.taste[i] * self.taste[j], self.n[i], self.n[j])

    def co_activation(self):
        null = self.pairs(lambda i, j: ratio(self.chance(i, j), self.n[i]))
        return self.pairs(lambda i, j: ratio(self.both(i, j), self.n[i])), null

    def lift(self):
        def one(i, j):
            return ratio(self.both(i, j) / self.T, self.n[i] / self.T * self.n[j] / self.T)

        return self.pairs(one), self.pairs(
            lambda i, j: ratio(self.chance(i, j) * self.T, self.n[i] * self.n[j])
        )

    def jaccard(self):
        def one(i, j):
            return ratio(self.both(i, j), sum(i in used or j in used for used in self.used))

        def by_chance(i, j):
            both = self.chance(i, j)
            return ratio(both, self.n[i] + self.n[j] - both)

        return self.pairs(one), self.pairs(by_chance)

    def transition(self):
        def one(i, j):
            goes = [j in used for b, used in zip(self.before, self.used, strict=True) if i in b]
            return ratio(sum(goes), len(goes))

        value = [[one(i, j) for j in range(E)] for i in range(F)]
        return value, [[n / self.T for n in self.n]] * F

    def token_jaccard(self):
        def of(labels):
            sets = [{x for e, x in self.labelled(labels) if e == i} for i in range(E)]
            return self.pairs(lambda i, j: ratio(len(sets[i] & sets[j]), len(sets[i] | sets[j])))

        return of(self.token), self.mean(of, 0)

    def token_js(self):
        def of(labels):
            p = [Counter(x for e, x in self.labelled(labels) if e == i) for i in range(E)]

            def one(i, j):
                if not self.n[i] or not self.n[j]:
                    return NAN
                divergence = 0.0
                for x in range(V):
                    a, b = p[i][x] / self.n[i], p[j][x] / self.n[j]
                    for own in (a, b):
                        divergence += own / 2 * math.log(own / ((a + b) / 2)) if own else 0
                return divergence

            return self.pairs(one)

        return of(self.token), self.mean(of, 0)

    def load(self):
        return [n / self.slots for n in self.n], [1 / E] * E

    def routed_weight(self):
        return self.weight, [1 / E] * E

    def domain_specialization(self):
        found = Counter(self.labelled(self.domain))
        tokens = Counter(self.domain)
        value = [[found[e, z] / tokens[z] for z in range(Z)] for e in range(E)]
        return value, [[n / self.T] * Z for n in self.n]

    def vocabulary_specialization(self):
        def of(labels):
            found, tokens = Counter(self.labelled(labels)), Counter(labels)
            shares = [[] for _ in range(E)]
            for e, x in self.labelled(labels):
                shares[e].append(found[e, x] / tokens[x])
            return [ratio(sum(s), len(s)) for s in shares]

        return of(self.token), self.mean(of, 0)

    def load_entropy(self):
        shares = [n / self.slots for n in self.n if n]
        return -sum(s * math.log(s) for s in shares) / math.log(E), 1

    def max_vio(self):
        return E * max(self.n) / self.slots - 1, 0

    def gini(self):
        return sum(abs(a - b) for a in self.n for b in self.n) / (2 * E * self.slots), 0

    def router_entropy(self):
        def one(scores):
            return -sum(s / sum(scores) * math.log(s / sum(scores)) for s in scores if s)

        return np.mean([one(scores) for scores in self.scores]) / math.log(E), NAN

    def committee(self):
        size = self.slots / self.T
        whole = int(size)
        ordered = sorted(self.weight, reverse=True)
        return sum(ordered[:whole]) + (size - whole) * ordered[whole], size / E

    def mi_domain(self):
        def of(labels):
            return mm_information(self.labelled(labels))

        return of(self.domain), self.mean(of, 1)

    def mi_token(self):
        def of(labels):
            return mm_information(self.labelled(labels))

        return of(self.token), self.mean(of, 0)

    def mi_domain_given_token(self):
        def of(labels):
            events = self.labelled(list(zip(labels, self.token, strict=True)))
            return mm_given([(e, z, x) for e, (z, x) in events])

        return of(self.domain), self.mean(of, 1)


@pytest.fixture(scope="module")
def slow_of():
    return {kind: Slow(probes_of(kind)) for kind in KINDS}


@pytest.mark.parametrize("name", METRICS)
@every_kind
def test_every_metric_is_what_loops_give(kind, name, slow_of):
    metric = METRICS[name]
    assert metric.kind == "usage"
    value, null = getattr(slow_of[kind], name)()
    found = estimate(metric, stream_of(*probes_of(kind)).sums())
    close(found.value, value, atol=1e-7)
    close(found.null, null, atol=1e-7)
    shapes = {"pairs": (E, E), "experts": (E,), "sites": ()}
    shapes |= {"transition": (F, E), "domain_specialization": (E, Z)}
    assert found.value.shape == shapes.get(name, shapes[metric.table])


@pytest.mark.parametrize("name", METRICS)
@every_kind
def test_the_jackknife_leaves_out_units(kind, name):
    """As if their tokens had not been there."""
    metric, probes = METRICS[name], probes_of(kind)
    sums = stream_of(*probes).sums()
    found = estimate(metric, sums)
    by_class = ("token_jaccard", "token_js", "vocabulary_specialization")
    if name in (*by_class, "mi_token", "mi_domain_given_token"):
        assert not metric.units
        assert "no interval" in metric.about
        assert np.isnan(found.low).all()
        assert np.isnan(found.high).all()
        return
    assert metric.units
    less = [metric.of(total(stream_of(*(p for p in probes if p is not q)).sums())) for q in probes]
    close(metric.of(without_each(sums)), torch.cat(less))
    defined = np.isfinite(found.value) & (found.low != found.value)
    assert defined.any()
    assert (found.low[defined] < found.high[defined]).all()


@every_kind
def test_batches_do_not_matter(kind):
    probe = probe_of(kind)
    whole = stream_of(probe).sums()
    for size in (1, 7, 39):
        parts = [some(probe, slice(at, at + size)) for at in range(0, 40, size)]
        sums = stream_of(*parts).sums()
        assert sums.keys() == whole.keys()
        for name, value in sums.items():
            close(value, whole[name], err_msg=name)


@every_kind
def test_relabelling_experts_relabels_the_result(kind):
    probe, new = probe_of(kind), torch.tensor([3, 5, 0, 4, 1, 2])  # of expert e
    routing = probe.routing
    logits_TE, scores_TE = (torch.empty_like(t) for t in routing[:2])
    logits_TE[:, new], scores_TE[:, new] = routing.logits_TE, routing.scores_TE
    relabelled = Routing(logits_TE, scores_TE, new[routing.ids_TK], routing.weights_TK)
    before, after = stream_of(probe).sums(), stream_of(probe._replace(routing=relabelled)).sums()
    for name, metric in METRICS.items():
        for what in ("value", "null"):
            old, got = (getattr(estimate(metric, sums), what) for sums in (before, after))
            if name == "transition":
                got = got[:, new]
            elif metric.table != "sites":
                got = got[np.ix_(new, new)] if metric.table == "pairs" else got[new]
            close(got, old, err_msg=name)


def test_sums_do_not_grow():
    def size(tokens: int) -> int:
        stream = stream_of(*(probe_of("top_p", tokens, unit=u) for u in range(UNITS)))
        assert sum(t.numel() for t in stream.sums().values()) < 3000
        return sum(t.numel() for t in [*stream._sums.values(), *stream._counts.values()])

    assert size(10) == size(1000)


def test_classes_are_not_counted_for_what_has_units():
    probes = probes_of("zeros")
    whole, without = stream_of(*probes), stream_of(*probes, classes=False)
    assert max(t.numel() for t in without._counts.values()) == (1 + R) * (E + 1) * Z
    for name, metric in METRICS.items():
        if metric.units:
            own, same = (estimate(metric, stream.sums()) for stream in (without, whole))
            for got, expected in zip(own, same, strict=True):
                close(got, expected, err_msg=name)
        else:
            with pytest.raises(KeyError):
                estimate(metric, without.sums())


def test_the_first_site_has_none_before_it():
    sums = stream_of(probe_of("plain", first=True)).sums()
    assert "transition" not in sums
    for name, metric in METRICS.items():
        if name != "transition":
            assert np.isfinite(estimate(metric, sums).value).any()


# ---- hand-written decisions

# Three tokens; in the second a slot of weight 0, in the third an expert that stands twice.
IDS_TK = torch.tensor([[0, 1, 2], [1, 3, 0], [2, 2, 1]])
WEIGHTS_TK = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.3, 0.3, 0.4]])
USED_TE = [[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 1, 0, 0]]


def test_used_slots():
    assert used_mask(IDS_TK, 5, WEIGHTS_TK).int().tolist() == USED_TE
    assert used_mask(IDS_TK, 5).sum(-1).tolist() == [3, 3, 2]
    # The expert that has a slot of weight 0 and another one is used.
    assert used_mask([[1, 1]], 2, [[0.0, 1.0]]).tolist() == [[False, True]]
    assert used_mask([[1, 1]], 2, [[1.0, 0.0]]).tolist() == [[False, True]]
    assert used_mask(IDS_TK[:0], 5).shape == (0, 5)


def test_pairs_by_hand():
    args = (IDS_TK, 5, WEIGHTS_TK)
    n = [1, 3, 2, 1, 0]
    pairs = torch.tensor(USED_TE, dtype=torch.float64)
    pairs = pairs.T @ pairs
    assert pairs.diagonal().tolist() == n
    close(co_activation(*args)[1], [1 / 3, 1, 2 / 3, 1 / 3, 0])
    close(co_activation(*args)[2], [1 / 2, 1, 1, 0, 0])
    close(co_activation(*args)[4], [NAN] * 5)
    close(lift(*args)[0], [3, 1, 3 / 2, 0, NAN])
    close(jaccard(*args)[0], [1, 1 / 3, 1 / 2, 0, 0])
    assert math.isnan(jaccard(*args)[4, 4])
    # Without weights, the slot of weight 0 counts.
    close(co_activation(IDS_TK, 5)[0], [1, 1, 1 / 2, 1 / 2, 0])


def test_eight_experts_are_28_pairs():
    """However they are ordered; neighbors in rank would be 7."""
    ids_TK = torch.tensor([[9, 4, 2, 7, 0, 5, 11, 3]])
    together_EE = co_activation(ids_TK, 12).nan_to_num()
    assert together_EE.triu(1).sum() == 28
    assert len(list(pairwise(ids_TK[0]))) == 7
    assert jaccard(ids_TK, 12).nan_to_num().triu(1).sum() == 28


def test_transitions_by_hand():
    before_TJ = torch.tensor([[0, 1], [1, 0], [1, 0]])
    weights_TJ = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    got_FE = transition(before_TJ, IDS_TK, 3, 5, weights_TJ, WEIGHTS_TK)
    close(got_FE, [[1 / 2, 1, 1 / 2, 1 / 2, 0], [0, 1, 1 / 2, 1 / 2, 0], [NAN] * 5])


def test_saturation_by_hand():
    """2 of 3, 1 of 2, 0 of 1, and nothing finally; of experts, however many slots they have."""
    ids_TK = [[0, 1, 4], [1, 1, 0], [0, 1, 2], [0, 1, 2]]
    final_TK = [[0, 1, 2], [1, 3, 0], [3, 3, 0], [0, 1, 2]]
    weights_TK = [[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    close(saturation(ids_TK, final_TK, 5, None, weights_TK), [2 / 3, 1 / 2, 0, NAN])
    close(saturation(IDS_TK, IDS_TK, 5, WEIGHTS_TK, WEIGHTS_TK), [1, 1, 1])
    close(saturation(IDS_TK, IDS_TK.flip(-1), 5), [1, 1, 1])


def test_arrays_of_serving_engines():
    """Read-only ones of small integers among them."""
    for dtype in (np.uint8, np.int16, np.uint16, np.int32):
        array = IDS_TK.numpy().astype(dtype)
        array.setflags(write=False)
        assert used_mask(array, 5, WEIGHTS_TK.numpy()).int().tolist() == USED_TE
        close(lift(array, 5), lift(IDS_TK, 5))
    assert saturation(array, IDS_TK, array.max() + 1).tolist() == [1, 1, 1]


def test_counts_as_arrays():
    counts = np.array([[3, 1, 0], [0, 2, 2]])
    tensor = torch.tensor(counts)
    for function in (gini, max_vio, load_entropy, entropy, mutual_information, js_divergence):
        close(function(counts), function(tensor))
    close(class_jaccard(counts), class_jaccard(tensor))
    with pytest.raises(ValueError, match=r"counts_EV has shape \(3,\); it must be \(experts, cla"):
        js_divergence(counts[0])


def test_tokens_of_two_sites_or_checkpoints_are_the_same():
    with pytest.raises(ValueError, match="ids_before_TJ has 2 tokens, ids_TK 3"):
        transition(IDS_TK[:2], IDS_TK, 5, 5)
    with pytest.raises(ValueError, match="ids_TK has 2 tokens, final_ids_TK 3"):
        saturation(IDS_TK[:2], IDS_TK, 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([0, 1], 5), r"ids_TK has shape \(2,\); it must be \(tokens, slots\)"),
        (([[0.0, 1.0]], 5), r"ids_TK is of torch.float64; give whole numbers"),
        (([[True, False]], 5), r"ids_TK is of torch.bool; give whole numbers"),
        ((None, 5), r"ids_TK is a NoneType; give numbers \(tokens, slots\)"),
        (([[0, 1]], 5.0), r"num_experts is 5.0"),
        (([[0, 1]], 5, [[1.0, NAN]]), "weights_TK has 1 that are NaN"),
        (([[0, 5]], 5), "ids_TK has 0 to 5; with 5 experts, 0 to 4"),
        (([[-1, 2]], 5), "ids_TK has -1 to 2"),
        (([[0, 1]], 5, [[1.0]]), r"weights_TK has shape \(1, 1\); ids_TK has \(1, 2\)"),
    ],
)
@pytest.mark.parametrize("function", [used_mask, co_activation, lift, jaccard])
def test_errors_teach(function, args, message):
    with pytest.raises(ValueError, match=message):
        function(*args)


# ---- planted loads, labels and experts


def test_loads_in_closed_form():
    even, one, two = torch.tensor([[3.0, 3, 3, 3], [0, 0, 7, 0], [1, 0, 1, 0]]).double()
    for load_E, *expected in (
        (even, 0, 0, 1),
        (one, 3 / 4, 3, 0),
        (two, 1 / 2, 1, 1 / 2),
        (torch.arange(1.0, 5).double(), 1 / 4, 0.6, None),
    ):
        functions = (gini, max_vio, load_entropy)
        for function, value in zip(functions, expected, strict=True):
            if value is not None:
                close(function(load_E), value, err_msg=function.__name__)
                close(function(load_E.long()), value)  # counts are whole numbers
            close(function(torch.stack([load_E, even])), [function(load_E), function(even)])
    assert load_entropy(torch.ones(1)).isnan()


def test_committees():
    weight_E = torch.tensor([1.0, 5, 0, 2, 2]).double()
    for size, share in ((1, 0.5), (2, 0.7), (2.5, 0.8), (5, 1)):
        close(committee(weight_E, torch.tensor(size)), share)
    close(committee(torch.ones(8).double(), torch.tensor(3)), 3 / 8)


def test_deterministic_labels():
    """X fixes Y: I = H(Y), as estimated; given either, the other says nothing more."""
    counts_X = torch.tensor([40.0, 20, 30, 10]).double()
    joint_XY = torch.diag(counts_X)
    plain = -sum(p * math.log(p) for p in (0.4, 0.2, 0.3, 0.1))
    close(entropy(counts_X), plain + 3 / 200)
    close(mutual_information(joint_XY), entropy(counts_X))
    close(mutual_information(joint_XY.sum(0)[None]), 0)
    copies_XYZ = torch.diag_embed(joint_XY)
    close(conditional_mutual_information(copies_XYZ), 0)
    close(conditional_mutual_information(joint_XY[..., None]), entropy(counts_X))
    both = torch.stack([joint_XY, torch.ones(4, 4).double()])
    close(mutual_information(both)[0], entropy(counts_X))


def test_the_correction_takes_the_bias_away():
    """Of independent labels the plain estimate is (X - 1)(Y - 1) / 2N too high on average."""
    X, Y, N, draws = 8, 4, 600, 200
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(X * Y, (draws, N), generator=generator)
    joint_XY = torch.nn.functional.one_hot(cells, X * Y).sum(1).view(draws, X, Y).double()
    got = mutual_information(joint_XY)
    bias = (X - 1) * (Y - 1) / (2 * N)
    assert abs(got.mean()) < 0.05 * bias
    close(got.std(), bias * (2 / ((X - 1) * (Y - 1))) ** 0.5, rtol=0.2)  # chi-squared / 2N


def planted_stream(expert_T, domain_T, tokens_T=None) -> UsageStream:
    """One expert a token; shuffles draw labels anew."""
    T, generator = len(expert_T), torch.Generator().manual_seed(3)
    tokens_T = torch.randint(V, (T,), generator=generator) if tokens_T is None else tokens_T
    scores_TE = torch.nn.functional.one_hot(expert_T, E).float()
    routing = Routing(scores_TE.log(), scores_TE, expert_T[:, None], torch.ones(T, 1))
    order_RT = torch.stack([torch.randperm(T, generator=generator) for _ in range(R)])
    labels = (tokens_T, domain_T, tokens_T[order_RT], domain_T[order_RT])
    x_TD = torch.zeros(T, 1)
    return stream_of(Probe(0, x_TD, routing, *labels, None, x_TD))


def found(stream: UsageStream, name: str):
    return estimate(METRICS[name], stream.sums())


def test_company_at_random_is_at_its_null():
    """Two of sixteen evenly loaded experts: 1 / 15, which independence, 2 / 16, does not reach."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(20_000, 16, generator=generator).argsort(-1)[:, :2]
    sums = company_of(ids_TK, 16)
    off = ~np.eye(16, dtype=bool)
    for name, chance in (("co_activation", 1 / 15), ("lift", 16 / 30), ("jaccard", 1 / 29)):
        value, _, _, null = (v[off] if v.ndim == 2 else v for v in estimate(METRICS[name], sums))
        close(null, chance, rtol=0.08)
        close(value.mean(), null.mean(), rtol=0.01)


def test_company_without_a_taste_is_at_its_null_under_uneven_loads():
    generator = torch.Generator().manual_seed(0)
    bias_E = torch.randn(16, generator=generator)
    gumbel_TE = -torch.empty(100_000, 16).exponential_(generator=generator).log()
    ids_TK = (bias_E + gumbel_TE).topk(2).indices
    assert torch.bincount(ids_TK.flatten()).max() > 5 * torch.bincount(ids_TK.flatten()).min()
    sums = company_of(ids_TK, 16)
    for name in ("co_activation", "lift", "jaccard"):
        value, _, _, null = estimate(METRICS[name], sums)
        seen = (sums["both"][0].numpy() > 300) & ~np.eye(16, dtype=bool)
        close(np.median(value[seen] / null[seen]), 1, rtol=0.01)
        close(value[seen], null[seen], rtol=0.25)


def test_company_that_is_forced_is_its_own_null():
    """One expert is in every pair: all that chance could do."""
    generator = torch.Generator().manual_seed(0)
    other_T = torch.randint(1, 16, (20_000,), generator=generator)
    ids_TK = torch.stack([torch.zeros_like(other_T), other_T], 1)
    value, _, _, null = estimate(METRICS["co_activation"], company_of(ids_TK, 16))
    close(null[0, 1:], value[0, 1:], rtol=0.01)
    close(null[1:, 0], 1, rtol=0.01)
    others = null[1:, 1:][~np.eye(15, dtype=bool)]
    assert (others < 0.001).all()
    assert (null <= 1).all()


def company_of(ids_TK: torch.Tensor, num_experts: int) -> dict[str, torch.Tensor]:
    """What the stream would have summed up of these decisions."""
    used_TE = torch.eye(num_experts, dtype=torch.float64)[ids_TK].sum(1)
    tokens = torch.tensor([len(ids_TK)], dtype=torch.float64)
    return {"both": (used_TE.T @ used_TE)[None], "tokens": tokens}


def test_an_expert_for_each_domain():
    domain_T = torch.arange(600) % Z
    stream = planted_stream(domain_T, domain_T)
    domain_entropy = math.log(Z) + (Z - 1) / 1200
    for name in ("mi_domain", "mi_domain_given_token"):
        close(found(stream, name).value, domain_entropy, rtol=0.02)
        assert abs(found(stream, name).null) < 0.01
    close(found(stream, "mi_domain").value, domain_entropy)
    assert abs(found(stream, "mi_token").value) < 0.02
    close(found(stream, "domain_specialization").value[:Z], np.eye(Z))
    close(found(stream, "router_entropy").value, 0)


def test_a_domain_that_tokens_give_away():
    """Experts go by token and tokens by domain: given the token, the domain says no more."""
    tokens_T = torch.arange(900) % V
    stream = planted_stream(tokens_T % E, tokens_T % Z, tokens_T)
    assert found(stream, "mi_domain").value > 1
    assert abs(found(stream, "mi_domain_given_token").value) < 1e-9
    assert found(stream, "mi_token").value > 1.5
    # Each token has one expert.
    close(found(stream, "vocabulary_specialization").value, np.ones(E))
    close(found(stream, "vocabulary_specialization").null, found(stream, "load").value, atol=0.05)
    js_EE, same_EE = (found(stream, name).value for name in ("token_js", "token_jaccard"))
    close(js_EE, math.log(2) * (1 - np.eye(E)), atol=1e-12)
    close(same_EE, np.eye(E))
    assert (found(stream, "token_js").null < 0.1).all()
    assert (found(stream, "token_jaccard").null > 0.9).all()


def test_independent_labels_are_within_their_nulls():
    generator = torch.Generator().manual_seed(7)
    expert_T, domain_T = (torch.randint(n, (4000,), generator=generator) for n in (E, Z))
    stream = planted_stream(expert_T, domain_T)
    for name, noise in (("mi_domain", 0.003), ("mi_token", 0.005), ("mi_domain_given_token", 0.01)):
        assert abs(found(stream, name).value) < noise
        assert abs(found(stream, name).value - found(stream, name).null) < noise
    js = found(stream, "token_js")
    off = ~np.eye(E, dtype=bool)
    close(js.value[off].mean(), js.null[off].mean(), rtol=0.3)


def test_duplicates_have_everything_in_common():
    """Expert 4 stands beside expert 1 wherever that is used, and nowhere else."""
    probe = probe_of("plain", 200)
    ids_TK, weights_TK = probe.routing.ids_TK, probe.routing.weights_TK
    twin_TK = torch.full_like(ids_TK[:, :1], 4)
    weights_TK = torch.cat(
        [weights_TK.masked_fill(ids_TK == 4, 0), (ids_TK == 1).any(-1, keepdim=True).float()], 1
    )
    routing = probe.routing._replace(ids_TK=torch.cat([ids_TK, twin_TK], 1), weights_TK=weights_TK)
    stream = stream_of(probe._replace(routing=routing))
    for name, value in (("co_activation", 1), ("jaccard", 1), ("token_jaccard", 1)):
        close(found(stream, name).value[[1, 4], [4, 1]], [value] * 2, err_msg=name)
    assert found(stream, "token_js").value[1, 4] == 0
    share = (ids_TK == 1).any(-1).double().mean()
    close(found(stream, "lift").value[1, 4], 1 / share)


def test_distances_of_class_counts():
    counts_EV = torch.tensor([[4, 0, 0], [0, 1, 1], [2, 1, 1], [0, 0, 0]])
    p, q = (0.5, 0.25, 0.25), (0, 0.5, 0.5)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = sum(
        x / 2 * math.log(x / m) for r in (p, q) for x, m in zip(r, middle, strict=True) if x
    )
    js_EE = js_divergence(counts_EV)
    close(js_EE[0], [0, math.log(2), js_EE[2, 0], NAN])
    close(js_EE[1, 2], expected)
    assert torch.equal(js_EE.nan_to_num(), js_EE.mT.nan_to_num())
    close(class_jaccard(counts_EV)[0], [1, 0, 1 / 3, 0])
    assert class_jaccard(counts_EV)[3, 3].isnan()
    tokens_V = torch.tensor([8, 2, 1])
    close(vocabulary_specialization(counts_EV, tokens_V), [1 / 2, 3 / 4, 1 / 2, NAN])


def test_router_entropy_is_of_scores_as_a_distribution():
    """Those of sigmoid routers have any sum."""
    probe = probe_of("plain")
    scaled = probe.routing._replace(scores_TE=3 * probe.routing.scores_TE)
    once, thrice = (
        estimate(METRICS["router_entropy"], stream_of(p).sums()).value
        for p in (probe, probe._replace(routing=scaled))
    )
    assert once == pytest.approx(thrice)


def test_divergence_of_nearly_the_same_is_not_negative():
    counts_EV = torch.randint(1, 50, (20, 40))
    near_EV = counts_EV * 10**9
    near_EV[:, 0] += 1  # what lies between them is less than rounding
    assert (js_divergence(torch.cat([counts_EV, near_EV])) >= 0).all()
