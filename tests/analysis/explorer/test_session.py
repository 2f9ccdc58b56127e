"""The explorer's numbers are those of a sweep, from one clean pass over a text."""

import base64
import queue
from pathlib import Path

import numpy as np
import pytest
import torch

import analysis as an
from analysis.adapters.base import as_adapter
from analysis.explorer.passage import LIMIT, Passage, default_text, token_texts
from analysis.explorer.session import Session
from analysis.explorer.wire import packed, slots_json
from cartmoe.tokenizers import ByteTokenizer

from .conftest import TEXT

QUESTIONS = [("DropTop", 1, "all"), ("GaussianNoise", 0.5, "stage 1"), ("NoRouted", 1, "layer 2")]
QUESTIONS += [("RandomRouting", 1.0, "layer 0 stage 1"), ("Lag", 2, "all"), ("Worst", 1, "all")]
QUESTIONS += [("DropTop", 2, "stage 0 tokens letter"), ("TopK", 1, "layer 0 positions 3:9")]


def unpacked(numbers):
    """What the browser makes of them."""
    kind = f"<{'i' if numbers['signed'] else 'u'}{numbers['bytes']}"
    return np.frombuffer(base64.b64decode(numbers["base64"]), kind) * numbers["step"]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_losses_are_those_of_a_sweep(session, model, question):
    condition = session.condition(*question)
    options = dict(controls=False, tokens=True, progress=False)
    swept = an.sweep(model, session.passage.docs, condition, **options)
    kept = {id: swept.tokens(model.name, 0, id).nll for id in ("clean", condition.id)}
    nll = {id: np.frombuffer(b"".join(rows), np.float32) for id, rows in kept.items()}
    passage = session.passage
    assert np.array_equal(passage.undisturbed.nll_N.numpy(), nll["clean"])
    assert np.array_equal(passage.run(condition).nll_N.numpy(), nll[condition.id])
    assert not np.array_equal(nll["clean"], nll[condition.id])
    answer = session.answer(condition)
    assert answer["nats"] == pytest.approx(nll[condition.id].mean(), abs=1e-6)
    assert unpacked(answer["nll"]) == pytest.approx(nll[condition.id], abs=5.1e-4)


@pytest.mark.parametrize("name", an.PERTURBATIONS)
def test_every_control_has_an_answer(session, name):
    if name not in session.controls:
        return
    clean = session.clean()["nats"]
    control = session.controls[name]
    nats = session.answer(session.condition(name, control.strengths[-1], "all"))["nats"]
    unchanging = name in ("DropUnchosen", "Temperature", "Quantize", "SwapRanks")
    assert unchanging or nats != clean
    if control.neutral is not None:
        undone = session.answer(session.condition(name, control.neutral, "all"))
        assert undone["nats"] == clean
        assert undone["slots"] == {}


def test_decisions_before_and_after(session, model):
    site = model.sites()[0]
    run = session.passage.run(session.condition("DropTop", 1, str(site)))
    before, after = session.passage.undisturbed.slots[site], run.slots[site]
    assert torch.equal(after.ids_NK[:, 0], before.ids_NK[:, 1])
    assert (before.weights_NK.sum(-1) - 1).abs().max() < 1e-6
    # What stands before the perturbed site decides as before, and is not told again.
    answer = session.answer(session.condition("DropTop", 1, "layer 2"))
    assert [*answer["slots"]] == ["layer 2 stage 0", "layer 2 stage 1"]


def test_margins_are_those_of_the_router(session, model):
    site, passage = model.sites()[0], session.passage
    logits_NE = passage.clean.routings[site].logits_TE[passage.used_T].sort(descending=True).values
    K = site.top_k
    assert torch.equal(passage.margins[site], logits_NE[:, K - 1] - logits_NE[:, K])


def test_one_clean_pass_a_text(tiny_model):
    """Counted where a forward from the beginning, and nothing else, comes by."""
    model = tiny_model("cartesian", vocab_size=256)
    calls = []
    model.trunk.embed.register_forward_hook(lambda *_: calls.append(1))
    session = Session(as_adapter(model), TEXT, length=32)
    session.clean()
    assert len(calls) == 1
    for strength in (1, 2, 3, 2, 1):
        session.answer(session.condition("DropTop", strength, "all"))
        session.answer(session.condition("RandomRouting", 0.5, "stage 1"))
    assert len(calls) == 2  # the calibration
    session.read("another text")
    session.answer(session.condition("DropTop", 1, "all"))
    assert len(calls) == 4


def test_a_curve_comes_point_by_point(session):
    strengths = session.controls["DropTop"].strengths
    assert session.curve("DropTop", "all") == {"nats": [None] * len(strengths)}
    one = session.answer(session.condition("DropTop", 2, "all"))["nats"]
    assert session.curve("DropTop", "all")["nats"] == [None, None, one, *[None] * 4]
    assert session.curve("DropTop", "stage 0") == {"nats": [None] * len(strengths)}


def test_what_cannot_act_is_said_and_remembered(session):
    with pytest.raises(ValueError, match="where is 'layer 9'"):
        session.answer(session.condition("DropTop", 1, "layer 9"))
    assert session.curve("DropTop", "layer 9")["nats"][1] == "none"
    with pytest.raises(ValueError, match="perturbation is 'Drop'; choose one of 'DropTop'"):
        session.condition("Drop", 1, "all")


def test_places(session, tiny_model):
    assert session.places[:5] == ["all", "stage 0", "stage 1", "layer 0", "layer 2"]
    assert session.places[5:] == [str(site) for site in session.sites]
    single = Session.of(tiny_model("smoe", vocab_size=256), TEXT)
    assert single.places == ["all", "layer 0", "layer 2"]


TEXTS = [TEXT, "é", "漢字\u202e<script>\0\x1b", "\ufffd?", "a" * 300, " \n\t", "👩‍👩‍👧"]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_tokens_make_up_the_text(text):
    ids = ByteTokenizer().encode(text)
    parts = token_texts(ByteTokenizer(), ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text.replace("\0", " ")


def test_tokens_of_other_tokenizers():
    tokenizer = an.load("olmoe").tokenizer
    ids = tokenizer.encode(TEXT)
    assert "".join(token_texts(tokenizer, ids)) == TEXT
    assert token_texts(ByteTokenizer(), ByteTokenizer().encode("aé")[:2]) == ["a", "\ufffd"]


def test_a_long_text_is_cut(model):
    passage = Passage.of(model, "x" * (LIMIT + 7), 256)
    assert (len(passage.texts), passage.num_given) == (LIMIT, LIMIT + 7)


def test_without_a_text_it_stays_with_the_one_before(session):
    with pytest.raises(ValueError, match="text is empty; give some"):
        session.read("")
    assert session.clean()["text"] == TEXT
    tokens = session.passage.clean.tokens.token_ids_T
    assert (tokens >= 0).all()


def test_no_model_of_the_project_was_trained_on_the_default_text():
    assert Path(queue.__file__).read_text(encoding="utf-8").startswith(default_text())
    for name in an.models()["name"]:
        assert "queue" not in an.load(name).trained_on["groups"]


def test_models_that_do_not_fit(tiny_model):
    with pytest.raises(ValueError, match="has no router: it is dense"):
        Session.of(tiny_model("dense", vocab_size=256))
    with pytest.raises(ValueError, match=r"text has token \d+, and cartesian a vocabulary of 13"):
        Session.of(tiny_model("cartesian"))


@pytest.mark.parametrize("values", [[0.0], [1.5, 300.0], [-40.0, 0.25, 31.9], [1e4]])
def test_packed_numbers_come_back(values):
    back = unpacked(packed(torch.tensor(values), 1e-3))
    assert back == pytest.approx(values, abs=5e-4, rel=1e-6)


def test_a_light_slot_is_no_empty_one(session, model):
    slots = session.passage.undisturbed.slots[model.sites()[0]]
    light = slots._replace(weights_NK=torch.tensor([[1.0, 1e-5], [1.0, 0.0]]))
    weights = unpacked(slots_json(light)["weights"])
    assert (weights != 0).tolist() == [True, True, True, False]
