"""The widget through its traits, as a browser sets them."""

import json
import sys
from types import FunctionType

import pytest

import analysis as an
from analysis.adapters.base import as_adapter

from .conftest import TEXT


@pytest.fixture
def widget(model):
    """A new one."""
    return an.explore(model, TEXT, length=32)


def test_it_is_a_function():
    assert isinstance(an.explore, FunctionType)
    import analysis.explorer

    assert analysis.explore is analysis.explorer.explore


def test_a_slider_changes_text_and_curve(widget):
    before, points = widget.run, widget.curve["nats"]
    widget.set_state({"strength": 3.0, "asked": 1})
    assert widget.run["nats"] != before["nats"]
    assert widget.run["nll"] != before["nll"]
    assert widget.curve["nats"][3] == widget.run["nats"]
    assert points[3] is None
    assert widget.answered == 1
    widget.set_state({"strength": 1.0, "asked": 2})
    assert widget.run == before


def test_a_refused_question_has_no_curve_of_another(widget):
    widget.set_state({"strength": 3.0, "asked": 1})
    widget.set_state({"perturbation": "RandomRouting", "asked": 2})  # a share of 3
    assert "share is 3.0" in widget.message
    assert widget.run == {}
    assert set(widget.curve["nats"]) == {None}  # of RandomRouting, at shares
    widget.set_state({"perturbation": "none of them", "asked": 3})
    assert widget.curve == {"nats": []}


def test_a_message_on_a_card_goes_with_the_next_one(widget):
    widget.set_state({"expert": [0, 99], "asked": 1})
    assert "expert is 99" in widget.message
    widget.set_state({"expert": [5], "asked": 2})
    assert "give [site, expert], or []" in widget.message
    widget.set_state({"expert": [0, 3], "asked": 3})
    assert widget.message == ""
    assert widget.card


def test_every_question_is_answered(widget):
    for question in (
        {"perturbation": "GaussianNoise", "strength": 0.5},
        {"where": "stage 1"},
        {"text": "other words"},
    ):
        before = widget.run
        widget.set_state(question | {"asked": widget.asked + 1})
        assert widget.message == ""
        assert widget.run != before
        assert widget.answered == widget.asked
    assert "".join(widget.passage["tokens"]) == "other words"


def test_points_of_the_curve_come_when_they_are_wanted(widget):
    run = widget.run
    while None in widget.curve["nats"]:
        number = widget.curve["nats"].index(None)
        widget.set_state({"wanted": number, "asked": widget.asked + 1})
        assert widget.curve["nats"][number] is not None
        assert widget.answered == widget.asked
    assert widget.run is run
    assert widget.curve["nats"][0] == pytest.approx(widget.passage["nats"], abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"text": ""}, "text is empty; give some"),
        ({"text": "\ud800"}, "surrogates not allowed"),
        ({"strength": -1.0}, "m is -1; it must be at least 0"),
        ({"strength": 7.0}, "m is 7; trunk.blocks.0.ffn.stages.0.router has only 6 experts"),
        ({"strength": 1.5}, "m is 1.5; it must be a whole number"),
        ({"perturbation": "Nothing"}, "perturbation is 'Nothing'; choose one of"),
        ({"perturbation": "Replay"}, "perturbation is 'Replay'; choose one of"),
        ({"where": "layer 99"}, "where is 'layer 99'; it must select routers"),
        ({"where": "somewhere"}, "where is 'somewhere'; write 'all'"),
        ({"expert": [9, 0]}, "site is 9; choose one of"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_not_raised(widget, wrong, said, capfd):
    good = {name: getattr(widget, name) for name in wrong}
    widget.set_state(wrong | {"asked": 1})
    assert said in widget.message
    assert widget.answered == 1
    json.dumps(widget.get_state(), allow_nan=False)
    widget.set_state(good | {"asked": 2})
    widget.strength = 2.0
    assert widget.message == ""
    assert widget.run["nats"] != widget.passage["nats"]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_expert_has_a_card(widget):
    widget.set_state({"expert": [1, 2], "asked": 1})
    assert (widget.card["site"], widget.card["expert"]) == ("layer 0 stage 1", 2)
    widget.set_state({"expert": [], "asked": 2})
    assert widget.card == {}
    widget.expert = [0, 1]
    widget.text = "another text"
    assert (widget.card, widget.expert) == ({}, [])


def test_a_model_that_others_disturb_is_not_measured(tiny_model):
    model = tiny_model("cartesian", vocab_size=256)
    widget = an.explore(as_adapter(model), TEXT)
    with model.trunk.blocks[0].ffn.register_forward_hook(lambda *_: None):
        widget.strength = 2.0
        assert "what is measured would not be the model" in widget.message
        assert widget.run == {}
    widget.strength = 1.0
    widget.strength = 2.0
    assert widget.message == ""


def test_how_it_begins(model):
    widget = an.explore(model, TEXT, "GaussianNoise", where="stage 1")
    assert (widget.perturbation, widget.strength, widget.where) == ("GaussianNoise", 1.0, "stage 1")
    for wrong in ({"perturbation": "Drop"}, {"strength": -1}, {"where": "layer 9"}, {"text": ""}):
        with pytest.raises(ValueError, match=f"({'|'.join((*wrong, 'm'))}) is"):
            an.explore(model, **{"text": TEXT} | wrong)


def test_what_it_needs_is_said(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "analysis.explorer.widget", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'cartmoe\[lab\]'"):
        an.explore(model, TEXT)
