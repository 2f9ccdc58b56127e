"""Greedy text under perturbations, against a loop that knows nothing of guesses."""

import numpy as np
import pytest
import torch

from analysis.adapters.base import as_adapter
from analysis.measure.calibrate import calibrate
from analysis.measure.generate import Decoder, generation_agreement
from analysis.measure.intervene import perturbed
from analysis.perturb.base import Identity
from analysis.perturb.compound import Custom, ResidualNoise
from analysis.perturb.condition import CLEAN, Condition
from analysis.perturb.decisions import Lag
from analysis.perturb.flips import Worst
from analysis.perturb.logits import GaussianNoise, RandomRouting
from analysis.perturb.masks import DropExperts, DropTop

PROMPT, NEW = 4, 6
OPTIONS = dict(prompt=PROMPT, new=NEW, progress=False)
WHERE = {"prompt": f"positions 0:{PROMPT}", "decoding": f"positions {PROMPT}:", "both": "all"}


def by_hand(model, tokens_L, id, p=None, where="all"):
    """One token after the other, each from all before it."""
    text = tokens_L[:PROMPT].tolist()
    for _ in range(NEW):
        row = torch.tensor([text])
        with torch.no_grad():
            if p is None:
                logits_V = model.model(row)[0, -1]
            else:
                with perturbed(model, p, where, sequence_ids=torch.tensor([id]), seed=2):
                    logits_V = model.model(row)[0, -1]
        text.append(int(logits_V.argmax()))
    return text[PROMPT:]


def expected(model, shard, p, phase):
    """(share of equal tokens, length of the common prefix), means over documents a, b, c."""
    equal, prefix = [], []
    for row in (0, 3, 5):  # the first of each with enough tokens; d has one token
        tokens_L, id = shard.tokens_SL[row], int(shard.sequence_id_S[row])
        clean = by_hand(model, tokens_L, id)
        got = by_hand(model, tokens_L, id, p, WHERE[phase])
        same = [a == b for a, b in zip(clean, got, strict=True)]
        equal.append(np.mean(same))
        prefix.append(same.index(False) if False in same else NEW)
    return np.mean(equal), np.mean(prefix)


@pytest.mark.parametrize("kind", ["cartesian", "top_p", "sigmoid"])
def test_against_the_plain_loop(model_of, shard, kind):
    model = model_of(kind)
    asked = [DropTop(1), GaussianNoise(2.0), Lag(1), ResidualNoise(DropTop(2))]
    table = generation_agreement(model, shard, asked, seed=2, **OPTIONS)
    got = table.set_index(["perturbation", "phase"])
    differ = 0
    for p in asked:
        for phase in WHERE:
            row = got.loc[p.label, phase]
            assert (row.equal, row.prefix) == pytest.approx(expected(model, shard, p, phase))
            differ += row.prefix < NEW
    assert differ >= 4  # the perturbations do something
    assert (table.num_documents == 3).all()


def test_nothing_changed_is_full_agreement(model_of, shard):
    table = generation_agreement(model_of("cartesian"), shard, Identity(), **OPTIONS)
    assert table.phase.tolist() == ["prompt", "decoding", "both"]
    assert (table[["equal", "equal_low", "equal_high"]] == 1).all(axis=None)
    assert (table[["prefix", "prefix_low", "prefix_high"]] == NEW).all(axis=None)


def test_the_prompt_alone_moves_later_positions(model_of, shard):
    """Through attention; where it is only the new positions, the first new token is the clean one:
    it was decided at the end of the prompt."""
    table = generation_agreement(model_of("smoe_share"), shard, DropTop(4), **OPTIONS)
    prefix = table.set_index("phase").prefix
    assert prefix["decoding"] >= 1
    assert prefix["prompt"] < NEW


def test_batches_do_not_matter(model_of, shard):
    model, asked = model_of("cartesian"), [GaussianNoise(1.0), RandomRouting()]
    a, b = (
        generation_agreement(model, shard, asked, batch_size=size, phases=("both",), **OPTIONS)
        for size in (1, 16)
    )
    assert a.equals(b)
    assert a.label.tolist() == ["GaussianNoise(1)", "RandomRouting(1)"]


@pytest.fixture
def decoder_of(shard):
    return lambda model: Decoder(model, shard[:4], 3, 7, calibrate(model, shard))


def test_the_guess_does_not_matter(model_of, decoder_of):
    decoder = decoder_of(model_of("cartesian"))
    for condition in (CLEAN, Condition(GaussianNoise(1.5))):
        first = decoder.text(condition, torch.zeros(4, 0, dtype=torch.int64))
        for guess in (torch.full((4, 30), -100), torch.randint(0, 13, (4, 5)), first):
            assert decoder.text(condition, guess).equal(first)


def test_ties_go_to_the_lower_id(tiny_model, decoder_of):
    model = tiny_model("cartesian")
    with torch.no_grad():
        model.head.weight[:3] = 0
        model.head.weight[3:] = model.head.weight[3]
    text = decoder_of(as_adapter(model)).text(CLEAN, torch.full((4, 7), 12))
    assert set(text.flatten().tolist()) <= {0, 3}
    model.head.weight.data.zero_()
    assert (decoder_of(as_adapter(model)).text(CLEAN, torch.full((4, 7), 12)) == 0).all()


def test_a_right_guess_needs_one_forward(model_of, shard):
    """Counted by the calls of a perturbation that changes nothing."""
    calls = []

    def watch(logits_TE, ctx):
        calls.append(ctx.site)
        return logits_TE

    model = model_of("cartesian")
    watching = Custom(watch, title="Watch")
    table = generation_agreement(model, shard, watching, phases="both", **OPTIONS)
    assert calls == [site for site in model.sites() for _ in range(2)]  # asked twice: is it pure?
    assert table.prefix[0] == NEW


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        (DropTop(1), dict(prompt=9), "prompt is 9; no sequence has so many tokens .* has 8"),
        (DropTop(1), dict(prompt=0), "prompt is 0; it must be at least 1"),
        (DropTop(1), dict(new=0), "new is 0; it must be at least 1"),
        ([], {}, "nothing is asked for: 0 conditions"),
        (DropTop(1), dict(phases=()), "nothing is asked for: 1 conditions"),
        (DropTop(1), dict(phases=("begin",)), "phases is 'begin'; choose one of 'prompt'"),
        (Condition(DropTop(1), "positions 0:2"), {}, "here the phases say at which positions"),
        (Condition(DropTop(1), downstream="replay"), {}, "can only 'reroute'"),
        (DropTop(9), {}, "m is 9; .* has only 6 experts"),
        (Worst(1), {}, "is searched for with the targets of documents"),
    ],
)
def test_wrong_arguments(model_of, shard, asked, options, message):
    with pytest.raises(ValueError, match=message):
        generation_agreement(model_of("cartesian"), shard, asked, **(OPTIONS | options))


def test_what_does_not_fit_is_refused_at_once(model_of, shard):
    model = model_of("cartesian")
    with pytest.raises(ValueError, match=r"ids has 99; .* has only"):
        generation_agreement(model, shard, DropExperts(ids=[99]), **OPTIONS | dict(prompt=99))


def test_dense_and_empty(model_of, shard):
    with pytest.raises(ValueError, match="dense has no router"):
        generation_agreement(model_of("dense"), shard, DropTop(1), **OPTIONS)
    with pytest.raises(ValueError, match="no sequence has so many"):
        generation_agreement(model_of("cartesian"), shard[:0], DropTop(1), **OPTIONS)
