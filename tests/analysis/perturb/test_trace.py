"""Recorded routing: what was decided comes back bit by bit, and nothing else is taken for it."""

import pickle
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.adapters import DenseRouting, as_adapter, clean_routing
from analysis.measure.doses import flip_share
from analysis.measure.intervene import perturbed
from analysis.measure.shard import measure
from analysis.measure.sweep import sweep
from analysis.overlap import measure_overlap
from analysis.perturb.base import Identity
from analysis.perturb.catalogue import perturbation_from_dict
from analysis.perturb.compound import Compose
from analysis.perturb.condition import Condition
from analysis.perturb.gates import GateSwap
from analysis.perturb.masks import DropTop
from analysis.perturb.recorded import Replay
from analysis.perturb.trace import Trace
from analysis.study.study import Study
from cartmoe.checkpoint import save
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import capture_routing

from ..conftest import KINDS as KIND_OPTIONS
from ..routers import IDS_B, TOKENS_BL, routings

KINDS = ["smoe_share", "hash", "top_p", "cartesian", "parallel", "sigmoid", "top1"]


@pytest.fixture
def recorded(model_of, shard, tmp_path):
    """recorded(kind, **options) -> a trace of that model on the shard."""
    return lambda kind="cartesian", name="trace", **options: Trace.record(
        model_of(kind), shard, tmp_path / name, batch_size=3, progress=False, **options
    )


@pytest.fixture
def arrays(shard):
    """For each sequence of the shard an array (tokens, layers, K) of a model like "smoe_share"."""
    rng = np.random.default_rng(0)
    lengths = (shard.targets_SL != IGNORE).sum(1).tolist()
    return [
        np.stack([rng.permutation(6)[:2] for _ in range(n * 2)]).reshape(n, 2, 2) for n in lengths
    ]


def nll(cell):
    return torch.tensor(cell.losses.nll_sum.to_numpy())


# ---- what is recorded


@pytest.mark.parametrize("kind", KINDS)
def test_every_decision_comes_back(model_of, shard, recorded, kind):
    model, trace = model_of(kind), recorded(kind, logits=True)
    assert len(trace) == shard.num_tokens
    assert trace.sites == [(s.layer, s.stage) for s in model.sites()]
    used_SL = shard.targets_SL != IGNORE
    position_SL = torch.arange(used_SL.shape[1]).expand_as(used_SL)
    sequence_SL = shard.sequence_id_S[:, None].expand_as(used_SL)
    # The same batches, so that the last bits are the same.
    parts = [list(clean_routing(model, shard.tokens_SL[i : i + 3]).values()) for i in (0, 3, 6)]
    for n, site in enumerate(model.sites()):
        logits, _, ids, weights = (torch.cat(t)[used_SL.flatten()] for t in
                                   zip(*(part[n] for part in parts), strict=True))  # fmt: skip
        got_ids, got_weights = trace.lookup(site, sequence_SL[used_SL], position_SL[used_SL])
        assert (got_ids.dtype, got_weights.dtype) == (torch.int64, torch.float32)
        assert got_ids.equal(ids)
        assert got_weights.equal(weights)
        record = trace.routing((site.layer, site.stage))
        assert torch.from_numpy(np.array(record.logits_NE)).equal(logits)
        assert record.ids_NK.shape == (len(trace), site.top_k)


def test_any_order_is_looked_up(model_of, shard, recorded):
    trace, site = recorded(), model_of("cartesian").sites()[1]
    sequence_T, position_T = torch.tensor([99, 5, 99, 11]), torch.tensor([7, 0, 2, 3])
    ids_TK, weights_TK = trace.lookup(site, sequence_T, position_T)
    for i in range(4):
        one = trace.lookup(site, sequence_T[i : i + 1], position_T[i : i + 1])
        assert ids_TK[i : i + 1].equal(one[0])
        assert weights_TK[i : i + 1].equal(one[1])


def test_padding_has_no_decision(model_of, recorded):
    """Sequence 7 has 8 tokens, 1 has 3: the rest of it is padding."""
    trace, site = recorded(), model_of("cartesian").sites()[0]
    ids_TK, weights_TK = trace.lookup(site, torch.tensor([7, 1, 1]), torch.tensor([7, 2, 3]))
    assert (ids_TK >= 0).all(-1).tolist() == [True, True, False]
    assert (ids_TK[2] == -1).all()
    assert (weights_TK[2] == 0).all()


def test_what_was_not_recorded(model_of, shard, recorded):
    trace, site = recorded(), model_of("cartesian").sites()[0]
    with pytest.raises(ValueError, match=r"not recorded 2 of these 3 sequences \(3 positions\)"):
        trace.lookup(site, torch.tensor([4, 7, 4, 3]), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no router at layer 1 stage 0; it has layer 0 stage 0, "):
        trace.lookup((1, 0), shard.sequence_id_S, torch.zeros(7, dtype=torch.int64))


def test_identity_and_pickle(model_of, shard, recorded, tmp_path):
    a, b, other = recorded(), recorded(name="again"), recorded("parallel", name="other")
    assert a.sha256 == b.sha256
    assert a == b
    assert a != other
    data = pickle.dumps(a)
    assert len(data) < 500
    back = pickle.loads(data)
    assert (back.sha256, back.path, back.name, len(back)) == (a.sha256, a.path, "trace", len(a))
    assert Trace.load(str(a.path)) == a
    assert "trace: 41 tokens of 7 sequences, 4 sites" in repr(a)


def test_nothing_is_overwritten(model_of, shard, recorded, arrays):
    trace = recorded()
    with pytest.raises(FileExistsError, match="trace exists already"):
        recorded()
    with pytest.raises(FileExistsError, match="trace exists already"):
        Trace.from_arrays(arrays, shard.sequence_id_S, trace.path)
    assert Trace.load(trace.path) == trace


def test_wrong_documents_and_models(model_of, shard, rows_of, tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="dense has no router"):
        Trace.record(model_of("dense"), shard, path, progress=False)
    with pytest.raises(ValueError, match="no token to record"):
        Trace.record(model_of("cartesian"), shard[:0], path, progress=False)
    with pytest.raises(ValueError, match=r"sequence ids must differ; \[11\]"):
        Trace.record(model_of("cartesian"), rows_of(shard, [0, 1, 0]), path, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["sequences.i8", "layer0-stage1.ids.i2", "trace.json"])
def test_damage_names_the_file(recorded, file):
    path = recorded().path
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (path / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"not a whole trace: the SHA-256 of {file}"):
        Trace.load(path)
    (path / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        Trace.load(path)


def test_no_trace_there(tmp_path, model_of):
    with pytest.raises(FileNotFoundError, match="there is no trace at"):
        Trace.load(tmp_path / "none")
    save(model_of("cartesian").model, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"manifest\.json is of something else"):
        Trace.load(tmp_path / "checkpoint")


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from cartmoe import LanguageModel, ModelConfig
from cartmoe.data import Sequences
from analysis import Trace
size = dict(vocab_size=13, d_model=8, ffn_width=16, num_layers=4, num_heads=2, num_experts=96)
model = LanguageModel(ModelConfig(family="cartesian", **size)).eval()
S, L = 20, 64
def docs(S):
    tokens = torch.randint(13, (S, L))
    names = ["d"] * S
    return Sequences(tokens, tokens, torch.arange(S), names, names, torch.full((S,), L))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few, many = docs(S), docs(10 * S)
options = dict(logits=True, batch_size=16, progress=False)
Trace.record(model, few, sys.argv[1] + "/few", **options)
before = peak()
trace = Trace.record(model, many, sys.argv[1] + "/many", **options)
size = sum(path.stat().st_size for path in trace.path.iterdir())
print((peak() - before) * 1024, size)
"""


def test_memory_does_not_grow_with_the_tokens(tmp_path):
    """Ten times the tokens: the peak grows by far less than what is recorded of them."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, size = map(int, done.stdout.split())
    assert size > 18 * 2**20
    assert growth < size / 3


# ---- arrays of serving engines


RIGHT = np.tile([0, 1], (2, 3, 1))  # (tokens, layers, slots)


def test_from_arrays(shard, arrays, tmp_path):
    weights = [np.full(a.shape, 0.5, np.float32) for a in arrays]
    trace = Trace.from_arrays(
        iter(arrays), shard.sequence_id_S, tmp_path / "a", num_experts=6, weights=iter(weights)
    )
    assert trace.sites == [(0, 0), (1, 0)]
    ids_TK, weights_TK = trace.lookup((1, 0), torch.tensor([5, 1]), torch.tensor([6, 2]))
    assert ids_TK.tolist() == [arrays[1][6, 1].tolist(), arrays[4][2, 1].tolist()]
    assert weights_TK.tolist() == [[0.5, 0.5]] * 2
    bare = Trace.from_arrays(arrays, shard.sequence_id_S, tmp_path / "b", places=[(0, 0), (2, 1)])
    assert bare.sites == [(0, 0), (2, 1)]
    assert bare.lookup((2, 1), torch.tensor([5]), torch.tensor([6]))[1] is None
    assert bare.routing((2, 1)).weights_NK is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(routed_experts=[]), "routed_experts has NoneType of shape () first"),
        (dict(routed_experts=[np.zeros((2, 3))]), "of shape (2, 3) first; give an array"),
        (dict(routed_experts=[RIGHT + 0.5]), "sequence 0 ids that are not whole numbers"),
        (
            dict(routed_experts=[(RIGHT, np.full(RIGHT.shape, 0.5))], uncaptured="leave out"),
            "not whole numbers, 0.5 first; weights stand in an array of their own",
        ),
        (dict(routed_experts=[RIGHT == 1]), "sequence 0 bool; give an array"),
        (dict(routed_experts=[[[[0, 1]], [[1]]]]), "has for sequence 0 no array"),
        (
            dict(routed_experts=[RIGHT, RIGHT[..., :1]]),
            "sequence 1 int64 of shape (2, 3, 1); it must be whole numbers of shape (tokens, 3, 2)",
        ),
        (dict(num_experts=2), "experts 0 to 5; they must be 0 to 1"),
        (dict(routed_experts=[np.full((1, 1, 1), -2)]), "experts -2 to -2"),
        (dict(routed_experts=[np.full((1, 1, 1), -1)]), "no decision for 1 of 1 tokens at layer 0"),
        (dict(routed_experts=[np.full((1, 1, 1), 40000)]), "they must be 0 to 32767"),
        (dict(places=[(0, 0)]), "places is [(0, 0)]; give a different (layer, stage) for each of"),
        (dict(places=[(0, 0), (0, 0)]), "give a different (layer, stage)"),
        (dict(places=[None, None]), "give a different (layer, stage)"),
        (dict(uncaptured="drop"), "uncaptured is 'drop'; choose one of 'refuse', 'leave out'"),
        (dict(sequence_ids=range(3)), "sequence_ids has only 3"),
        (dict(sequence_ids=range(30)), "sequence_ids has more than the 7 of routed_experts"),
        (dict(sequence_ids=[1] * 7), "sequence ids must differ; [1]"),
        (dict(weights=[np.zeros((1, 1, 1))]), "weights has shape (1, 1, 1) for sequence 0"),
        (dict(weights=[]), "weights has shape () for sequence 0"),
        (
            dict(routed_experts=[np.ma.masked_equal(RIGHT, 1)]),
            "no array: it is masked: fill what was not captured with -1",
        ),
        (
            dict(routed_experts=[(RIGHT + 3000).astype(np.float16)]),
            "its type holds whole numbers up to 2048, and there are larger ones",
        ),
        (dict(routed_experts=[torch.full((1, 1, 1), 300).bfloat16()]), "numbers up to 256"),
        (dict(sequence_ids=[0.9] * 7), "sequence_ids has 0.9 for sequence 0; give whole numbers"),
        (dict(sequence_ids=[2**70] * 7), "for sequence 0; give whole numbers"),
        (dict(sequence_ids="abcdefg"), "sequence_ids has 'a' for sequence 0"),
        (dict(num_experts="8"), "num_experts is '8'; it must be a whole number"),
        (dict(num_experts=0), "num_experts is 0; it must be at least 1"),
        (dict(num_experts=True), "num_experts is True"),
        (dict(places=[(0, 0), (1.5, 0), (2, 0)]), "layer of places is 1.5"),
        (dict(places=[(0, 0), (-1, 0), (2, 0)]), "layer of places is -1"),
        (dict(places=[(0, 0, 0)]), "places has (0, 0, 0); give (layer, stage), or None"),
    ],
)  # fmt: skip
def test_wrong_arrays(shard, arrays, tmp_path, change, message):
    given = dict(routed_experts=arrays, sequence_ids=range(7)) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        Trace.from_arrays(path=tmp_path / "t", **given)
    assert not (tmp_path / "t").exists()


def test_more_weights_than_sequences(shard, arrays, tmp_path):
    weights = [np.ones(array.shape) for array in arrays]
    with pytest.raises(ValueError, match="weights has more than the 7 of routed_experts"):
        Trace.from_arrays(arrays, range(7), tmp_path / "t", weights=[*weights, weights[0]])


def test_numbers_of_any_library(shard, arrays, tmp_path):
    options = dict(num_experts=np.int64(6), places=[(np.int64(0), torch.tensor(0)), (2, 0)])
    arrays = [array[:, :2] for array in arrays]
    trace = Trace.from_arrays(arrays, torch.arange(7), tmp_path / "t", **options)
    assert trace.sites == [(0, 0), (2, 0)]
    assert trace.place((2, 0)).num_experts == 6


def test_rows_that_are_shifted(model_of, shard, tmp_path):
    """A token more at the beginning, as engines put one: everything would be another token's."""
    model = as_adapter(model_of("smoe_share"))
    lengths = (shard.targets_SL != IGNORE).sum(-1).tolist()
    sites, rng = model.sites(), np.random.default_rng(0)

    def trace(name, more):
        arrays = [rng.random((n + more, len(sites), 6)).argsort(-1)[..., :2] for n in lengths]
        options = dict(places=[site.place for site in sites], num_experts=6)
        return Trace.from_arrays(arrays, shard.sequence_id_S, tmp_path / name, **options)

    sweep(model, shard, Replay(trace("right", 0)), controls=False, progress=False)
    shifted = trace("shifted", 1)
    for uncaptured in ("refuse", "own"):
        with pytest.raises(ValueError, match=r"has \d+ rows for a sequence of \d+ tokens"):
            sweep(model, shard, Replay(shifted, uncaptured=uncaptured), progress=False)
    with pytest.raises(ValueError, match="cut the arrays to the tokens of the documents"):
        measure_overlap(shifted, shard, "load", progress=False)


def test_rows_of_the_padding_do_no_harm(model_of, shard, tmp_path):
    model = as_adapter(model_of("smoe_share"))
    sites, rng = model.sites(), np.random.default_rng(0)
    size = shard.tokens_SL.shape[1], len(sites), 6
    arrays = [rng.random(size).argsort(-1)[..., :2] for _ in range(len(shard))]
    options = dict(places=[site.place for site in sites], num_experts=6)
    trace = Trace.from_arrays(arrays, shard.sequence_id_S, tmp_path / "t", **options)
    sweep(model, shard, Replay(trace), controls=False, progress=False)


def test_memory_of_arrays_is_that_of_one(tmp_path):
    def arrays(number):
        return (np.tile(np.arange(4), (100, 8, 1)) for _ in range(number))

    peaks = []
    for number in (20, 400):
        tracemalloc.start()
        Trace.from_arrays(arrays(number), range(number), tmp_path / str(number))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**17  # of 400 arrays of 25 KiB


@pytest.mark.parametrize(
    "change",
    [
        *(np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64, np.float32),
        *(torch.from_numpy, lambda a: torch.from_numpy(a).to(torch.bfloat16), np.ndarray.tolist),
        lambda a: (a[:3], a[3:]),  # prompt and decoding apart
        lambda a: (torch.from_numpy(a[:3]), a[3:].astype(np.uint8)),
    ],
)
def test_numbers_of_any_type(shard, arrays, tmp_path, change):
    plain = Trace.from_arrays(arrays, range(7), tmp_path / "a")
    given = [change(a) for a in arrays]
    assert Trace.from_arrays(given, range(7), tmp_path / "b") == plain


LOST = {
    "zeros": np.int64(0),
    "-1": np.int64(-1),
    "-1 of an unsigned type": np.uint8(255),
    "NaN": np.float32("nan"),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("num_experts", [None, 6])
def test_tokens_that_were_not_captured(model_of, shard, arrays, tmp_path, lost, num_experts):
    """A prefix from a cache, say: refused, or kept as tokens without a decision."""
    places = [(0, 0), (2, 0)]
    arrays = [a.astype(LOST[lost].dtype) for a in arrays]
    for a in arrays[:2]:
        a[:3] = LOST[lost]
    arrays[2][1, 1] = LOST[lost]
    options = dict(places=places, num_experts=num_experts)
    with pytest.raises(ValueError, match=r"sequence 0 no decision for 3 of 8 tokens at layer 0"):
        Trace.from_arrays(arrays, shard.sequence_id_S, tmp_path / "t", **options)
    options["uncaptured"] = "leave out"
    trace = Trace.from_arrays(arrays, shard.sequence_id_S, tmp_path / "t", **options)
    assert trace.uncaptured == {(0, 0): 6, (2, 0): 7}
    assert Trace.load(trace.path).uncaptured == trace.uncaptured
    assert "up to 7 tokens of a site not captured" in repr(trace)
    ids_TK, _ = trace.lookup((2, 0), shard.sequence_id_S[2].repeat(3), torch.arange(3))
    assert (ids_TK[:, 0] == -1).tolist() == [False, True, False]


def test_weights_that_were_not_captured(arrays, tmp_path):
    weights = [np.full(a.shape, 0.5, np.float32) for a in arrays]
    weights[0][0, 0] = np.nan
    weights[1][2, 1] = 0
    options = dict(weights=weights)
    with pytest.raises(ValueError, match="no decision for 1 of 8 tokens"):
        Trace.from_arrays(arrays, range(7), tmp_path / "t", **options)
    trace = Trace.from_arrays(arrays, range(7), tmp_path / "t", uncaptured="leave out", **options)
    assert trace.uncaptured == {(0, 0): 1, (1, 0): 1}
    assert (trace.routing((0, 0)).ids_NK[0] == -1).all()
    assert (trace.routing((0, 0)).weights_NK[0] == 0).all()
    for wrong in (-0.5, np.inf, -np.inf):
        weights[3][0, 0, 0] = wrong
        with pytest.raises(ValueError, match=f"sequence 3 1 that are negative or inf.* {wrong} f"):
            Trace.from_arrays(arrays, range(7), tmp_path / "u", uncaptured="leave out", **options)


def test_zeros_for_dense_layers(arrays, tmp_path):
    """They are no decisions, and are left out with a word, or by name."""
    wide = [np.stack([0 * a[:, 0], a[:, 0], a[:, 1]], 1) for a in arrays]
    with pytest.warns(UserWarning, match=r"layers 0 have no decision in the first .* left out"):
        trace = Trace.from_arrays(wide, range(7), tmp_path / "t")
    named = Trace.from_arrays(wide, range(7), tmp_path / "u", places=[None, (1, 0), (2, 0)])
    assert trace == named
    assert trace.sites == [(1, 0), (2, 0)]
    places = [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(ValueError, match="no decision for 8 of 8 tokens at layer 0"):
        Trace.from_arrays(wide, range(7), tmp_path / "v", places=places)


def test_replay_of_what_was_captured(model_of, shard, arrays, tmp_path):
    """Other tokens keep their own decision where that is asked for, and are refused else."""
    model = model_of("smoe_share")
    arrays[0][:3] = 0
    trace = Trace.from_arrays(
        arrays, shard.sequence_id_S, tmp_path / "t", places=[s.place for s in model.sites()],
        num_experts=6, uncaptured="leave out",
    )  # fmt: skip
    with pytest.raises(ValueError, match="no decision for 3 of 41 tokens"):
        measure(model, [Condition(Replay(trace))], shard)
    p = Replay(trace, uncaptured="own")
    assert p.label == "Replay(t, uncaptured=own)"
    assert perturbation_from_dict(p.to_dict()) == p != Replay(trace)
    measure(model, [Condition(p), Condition(Compose((DropTop(1), p)))], shard)
    with (
        perturbed(model, p, sequence_ids=shard.sequence_id_S[:1]),
        capture_routing(model.model) as captured,
        torch.no_grad(),
    ):
        model.model(shard.tokens_SL[:1])
    own = clean_routing(model, shard.tokens_SL[:1])[model.sites()[0]]
    ((got,), *_) = captured.values()
    assert got.ids_TK[:3].equal(own.ids_TK[:3])
    assert got.ids_TK[3:].equal(torch.from_numpy(arrays[0][3:, 0]))


# ---- Replay


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("downstream", ["reroute", "replay"])
def test_replaying_ones_own_trace_changes_nothing(model_of, shard, recorded, kind, downstream):
    condition = Condition(Replay(recorded(kind)), downstream=downstream)
    clean, cell = measure(model_of(kind), [condition], shard, batch_size=3)
    assert nll(clean).equal(nll(cell))
    doses = ["flips", "flips_total", "changed", "mass_moved", "mass_lost", "output_change"]
    assert (cell.routing[doses] == 0).all(axis=None)
    assert (cell.losses.kl_sum == 0).all()


def test_own_decisions_bit_for_bit(model_of, shard, recorded):
    model = model_of("cartesian")
    p = Replay(recorded().path)
    with (
        perturbed(model, p, sequence_ids=shard.sequence_id_S[:3]),
        capture_routing(model.model) as captured,
        torch.no_grad(),
    ):
        out = model.model(shard.tokens_SL[:3])
    decisions = clean_routing(model, shard.tokens_SL[:3]).values()
    for got, own in zip(captured.values(), decisions, strict=True):
        assert all(map(torch.equal, got[0], own))
    with torch.no_grad():
        assert out.equal(model.model(shard.tokens_SL[:3]))


def test_replay_of_another_checkpoint(model_of, tiny_model, shard, tmp_path):
    """Its experts and weights, whatever the model itself would choose."""
    other, model = as_adapter(tiny_model("cartesian", seed=7)), model_of("cartesian")
    trace = Trace.record(other, shard, tmp_path / "t", progress=False)
    rows = slice(1, 2)
    with (
        perturbed(model, Replay(trace), sequence_ids=shard.sequence_id_S[rows]),
        capture_routing(model.model) as captured,
        torch.no_grad(),
    ):
        model.model(shard.tokens_SL[rows])
    for got, site in zip(captured.values(), model.sites(), strict=True):
        ids_TK, weights_TK = trace.lookup(site, torch.full((8,), 5), torch.arange(8))
        assert got[0].ids_TK.equal(ids_TK)
        assert got[0].weights_TK.equal(weights_TK)
    clean, cell = measure(model, [Condition(Replay(trace))], shard)
    assert (cell.routing.flips > 0).mean() > 0.9
    assert not nll(clean).equal(nll(cell))


@pytest.mark.parametrize("kind", ["smoe_share", "raw"])
def test_without_weights_they_are_the_routers_own(model_of, shard, arrays, tmp_path, kind):
    model, slots = model_of(kind), model_of(kind).sites()[0].top_k
    arrays = [np.stack([a[..., 0], (a[..., 0] + 1) % 6], -1)[..., :slots] for a in arrays]
    trace = Trace.from_arrays(
        arrays, shard.sequence_id_S, tmp_path / "t", places=[(0, 0), (2, 0)], num_experts=6
    )
    with (
        perturbed(model, Replay(trace), sequence_ids=shard.sequence_id_S[:2]),
        capture_routing(model.model) as captured,
        torch.no_grad(),
    ):
        model.model(shard.tokens_SL[:2])
    for got, n in zip(captured.values(), (0, 1), strict=True):
        (got,) = got
        ids_TK = torch.from_numpy(np.concatenate([a[:, n] for a in arrays[:2]]))
        assert got.ids_TK.equal(ids_TK)
        scores_TK = got.scores_TE.gather(-1, ids_TK)
        expected = scores_TK / scores_TK.sum(-1, keepdim=True) if kind != "raw" else scores_TK
        torch.testing.assert_close(got.weights_TK, expected)


def test_other_tokens_keep_the_routers_own(model_of, tiny_model, recorded, shard, tmp_path):
    """Outside of a sweep, where nobody knows which of them have a target."""
    model, other = model_of("cartesian"), as_adapter(tiny_model("cartesian", seed=7))
    trace = Trace.record(other, shard, tmp_path / "t", progress=False)
    row, ids = shard.tokens_SL[3:4].clone(), shard.sequence_id_S[3:4]
    row[0, 1:3] = row[0, 1:3] % 12 + 1
    with (
        perturbed(model, Replay(trace), sequence_ids=ids),
        capture_routing(model.model) as captured,
        torch.no_grad(),
    ):
        model.model(row)
    ((got,), *_), own = captured.values(), next(iter(clean_routing(model, row).values()))
    recorded_TK, _ = trace.lookup(model.sites()[0], ids.repeat(8), torch.arange(8))
    other_T = torch.tensor([False, True, True] + 5 * [False])
    assert got.ids_TK[other_T].equal(own.ids_TK[other_T])
    assert got.ids_TK[~other_T].equal(recorded_TK[~other_T])
    assert not own.ids_TK.equal(recorded_TK)


def test_texts_that_were_not_recorded_whole(model_of, shard, tmp_path):
    model = model_of("cartesian")
    short = replace(shard, targets_SL=shard.targets_SL.index_fill(1, torch.tensor([6, 7]), IGNORE))
    trace = Trace.record(model, short, tmp_path / "t", progress=False)
    with pytest.raises(ValueError, match="no decision for 8 of 41 tokens"):
        measure(model, [Condition(Replay(trace))], shard)
    other = replace(shard, tokens_SL=shard.tokens_SL % 12 + 1)
    with pytest.raises(ValueError, match="no decision for 41 of 41 tokens"):
        measure(model, [Condition(Compose((DropTop(1), Replay(trace))))], other)
    with pytest.raises(ValueError, match="not recorded 7 of these 7 sequences"):
        measure(
            model, [Condition(Replay(trace))], replace(shard, sequence_id_S=torch.arange(100, 107))
        )


def test_other_models_sites_and_experts(model_of, recorded, shard):
    with pytest.raises(ValueError, match=r"trace has 6 experts at .*; this model has 8"):
        measure(model_of("fine_grained"), [Condition(Replay(recorded("smoe_share")))], shard)
    with pytest.raises(ValueError, match="no router at layer 0 stage 1"):
        measure(model_of("cartesian"), [Condition(Replay(recorded("smoe_share", "b")))], shard)


# ---- the contract of perturbations, of which test_perturb has the rest


@pytest.fixture(params=["Replay", "GateSwap"])
def foreign(request, tiny_model, shard, tmp_path):
    """foreign(kind) -> another model's decisions, or gates."""

    def build(kind):
        options = dict(KIND_OPTIONS[kind])
        other = as_adapter(tiny_model(options.pop("family"), seed=7, **options))
        if request.param == "GateSwap":
            return GateSwap(other)
        return Replay(Trace.record(other, texts_of(TOKENS_BL, IDS_B), tmp_path / kind,
                                   progress=False))  # fmt: skip

    return build


def texts_of(tokens_BL, ids_B):
    names = [str(i) for i in ids_B.tolist()]
    size = torch.full_like(ids_B, tokens_BL.shape[1])
    return Sequences(tokens_BL, tokens_BL, ids_B, names, names, size)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(model_of, foreign, kind):
    """Shapes and dtypes stay, inputs stay as they are, nothing becomes NaN, decisions change."""
    model, p, seen = model_of(kind), foreign(kind), []
    for point in p.points:
        seen.clear()

        def spy(routing, router, site, x_TD):
            seen.append((routing, [t.clone() for t in routing]))

        with model.hooked(router=spy):
            out, decisions = routings(model, p, point=point)
        assert out.isfinite().all()
        for (given, before), changed in zip(seen, decisions.values(), strict=True):
            assert all(map(torch.equal, given, before))
            for a, b in zip(given, changed, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert not any(t.isnan().any() for t in changed)
            assert (changed.weights_TK >= 0).all()
            flips_T = flip_share(DenseRouting(given), DenseRouting(changed))
            # A table of token ids is drawn from a seed of its own, which both models have.
            assert (flips_T.mean() > 0.05) == (kind != "hash")


@pytest.mark.parametrize("kind", ["cartesian", "top_p"])
def test_draws_do_not_depend_on_the_batch(model_of, foreign, kind):
    model, p = model_of(kind), foreign(kind)
    _, whole = routings(model, p)
    site = next(iter(whole))
    for order in ([3, 0, 5], [2]):
        _, some = routings(model, p, TOKENS_BL[order], IDS_B[order])
        for a, b in zip(whole[site], some[site], strict=True):
            a = a.view(6, 8, -1)[order].flatten(0, 1)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- what Replay and GateSwap are known by


def test_replay_by_dict(recorded, tmp_path):
    trace = recorded()
    p, by_path = Replay(trace), Replay(trace.path)
    assert p == by_path == perturbation_from_dict(p.to_dict()) == pickle.loads(pickle.dumps(p))
    assert p.to_dict() == {"name": "Replay", "trace": str(trace.path), "sha256": trace.sha256}
    assert p.label == "Replay(trace)"
    assert isinstance(p.identity(), Identity)
    d = p.to_dict()
    trace.path.rename(tmp_path / "away")
    Replay(str(trace.path))  # in analysis.compare it may be a model's name
    with pytest.raises(ValueError, match="there is no trace"):
        Replay(str(trace.path)).to_dict()
    other = recorded("parallel")
    assert Condition(Replay(other)).id != Condition(p).id
    with pytest.raises(ValueError, match=f"is {other.sha256}, and {trace.sha256} was asked for"):
        perturbation_from_dict(d)


@pytest.mark.parametrize("given", [None, "", 3])
def test_nothing_to_replay(given):
    with pytest.raises(ValueError, match=f"trace is {given!r}; give an analysis.Trace"):
        Replay(given)
    with pytest.raises(ValueError, match=f"checkpoint is {given!r}; give the path of one"):
        GateSwap(given)


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """checkpoint(name, family="cartesian", seed=0) -> the path of one."""

    def build(name, family="cartesian", seed=0, **changes):
        save(tiny_model(family, seed=seed, **changes), tmp_path / name)
        return tmp_path / name

    return build


def test_swapping_in_ones_own_gates_changes_nothing(model_of, shard, checkpoint):
    for kind in ("smoe_share", "hash", "top_p", "cartesian", "sigmoid"):
        model = model_of(kind)
        swaps = [GateSwap(model), GateSwap(model.model)]
        if kind == "cartesian":
            swaps.append(GateSwap(checkpoint("own")))
        clean, *cells = measure(model, [Condition(p) for p in swaps], shard)
        for cell in cells:
            assert nll(cell).equal(nll(clean))
            assert (cell.routing[["flips", "mass_moved", "output_change"]] == 0).all(axis=None)


def test_swapping_gates_is_a_model_with_those_gates(tiny_model, shard, checkpoint):
    model, path = as_adapter(tiny_model("cartesian")), checkpoint("tuned", seed=5)
    _, cell = measure(model, [Condition(GateSwap(path))], shard)
    tuned, swapped = tiny_model("cartesian", seed=5), tiny_model("cartesian")
    gates = {k: v for k, v in tuned.state_dict().items() if "router.gate" in k}
    assert len(gates) == 4
    swapped.load_state_dict(gates, strict=False)
    (expected,) = measure(as_adapter(swapped), [], shard)
    assert nll(cell).equal(nll(expected))


def test_gates_by_dict(checkpoint, model_of, tmp_path):
    path = checkpoint("tuned")
    p = GateSwap(path)
    assert p == perturbation_from_dict(p.to_dict()) == pickle.loads(pickle.dumps(p))
    assert (p.label, p.to_dict()["checkpoint"]) == ("GateSwap(tuned)", str(path))
    d = p.to_dict()
    path.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="there is no whole one"):
        GateSwap(path).to_dict()
    checkpoint("tuned", seed=3)
    with pytest.raises(ValueError, match=f"and {d['sha256']} was asked for"):
        perturbation_from_dict(d)
    in_memory = GateSwap(model_of("cartesian"))
    assert in_memory.to_dict()["sha256"] == model_of("cartesian").identity
    with pytest.raises(ValueError, match="does not go to other processes; give the path"):
        pickle.dumps(in_memory)


def test_gates_of_other_models(model_of, shard, checkpoint):
    model = model_of("cartesian")
    with pytest.raises(ValueError, match=r"GateSwap\(one\) has no router at .*stages\.1"):
        measure(model, [Condition(GateSwap(checkpoint("one", "smoe_share")))], shard)
    few = GateSwap(checkpoint("few", num_experts=4))
    with pytest.raises(ValueError, match=r"GateSwap\(few\) has 4 experts at .*; this one has 6"):
        measure(model, [Condition(few)], shard)
    with pytest.raises(ValueError, match="downstream is 'replay'; GateSwap"):
        Condition(GateSwap(model), downstream="replay")
    with pytest.raises(ValueError, match="point is 'scores'; GateSwap works at logits"):
        Condition(GateSwap(model), point="scores")


def test_in_a_study(write_study, recorded, checkpoint, tmp_path):
    trace, path = recorded(), checkpoint("tuned")
    conditions = [
        {"perturbation": "Replay", "trace": str(trace.path)},
        {"perturbation": "GateSwap", "checkpoint": str(path)},
    ]
    study = Study.read(write_study(tmp_path / "s.toml", conditions=conditions))
    assert [c.perturbation for c in study.conditions] == [Replay(trace), GateSwap(path)]


def test_in_a_sweep(model_of, shard, recorded, checkpoint):
    results = sweep(
        model_of("cartesian"),
        shard,
        [Replay(recorded()), GateSwap(checkpoint("tuned", seed=5))],
        controls=False,
        batch_size=3,
        progress=False,
    )
    damage = results.damage(full=True).set_index("label")
    assert damage.delta_nats["Replay(trace)"] == 0
    assert damage.flips["GateSwap(tuned)"] > 0.1
