"""An expert's card: the same numbers as the tables of damage and overlap."""

import pytest

import analysis as an
from analysis.explorer.session import Session

from .conftest import TEXT


def test_what_losing_an_expert_costs_and_how_much_it_is_used(session, model):
    site, docs = model.sites()[1], session.passage.docs
    table = an.expert_damage(model, docs, sites=site, progress=False)
    cards = [session.card(1, expert) for expert in range(site.num_experts)]
    assert [card["load"] for card in cards] == pytest.approx(table.load.tolist())
    assert [card["damage"] for card in cards] == pytest.approx(table.damage.tolist(), abs=1e-6)
    used = [card for card in cards if card["load"]]
    masses = [card["weight"] * card["load"] * site.top_k for card in used]
    assert masses == pytest.approx(table.mass[table.load > 0].tolist(), rel=1e-5)


def test_its_neighbors_are_those_of_overlap(session, model):
    site = model.sites()[0]
    overlap = an.measure_overlap(model, session.passage.docs, "cka", sites=site, progress=False)
    own = overlap.pairs[(overlap.pairs.expert_i == 2) & (overlap.pairs.expert_j >= 0)]
    best = own.sort_values("value", ascending=False).head(3)
    found = session.card(0, 2)["nearest"]
    assert [row["expert"] for row in found] == best.expert_j.tolist()
    assert [row["cka"] for row in found] == pytest.approx(best.value.tolist(), abs=5.1e-4)


def test_contexts_are_where_its_weight_is_largest(session):
    card = session.card(0, 3)
    weights = [context["weight"] for context in card["contexts"]]
    assert weights == sorted(weights, reverse=True)
    assert len({context["token"] for context in card["contexts"]}) == len(weights) > 1
    for context in card["contexts"][:2]:
        around = context["before"] + context["token"] + context["after"]
        assert around in "\0" + TEXT or "\ufffd" in around


def test_affinity_by_kind_of_token_or_by_domain(model, texts):
    alone = Session(model, TEXT, length=32)
    card = alone.card(0, 1)
    assert card["by"] == "kind of token"
    assert {row["name"] for row in card["affinity"]} <= {*an.perturb.KINDS}
    assert sum(row["tokens"] for row in card["affinity"]) == len(alone.passage.texts)
    docs = an.documents(texts, model, length=32, limit=6, max_tokens_per_document=32)
    docs.domain[:3] = ["x", "x", "y"]
    given = Session(model, TEXT, docs, length=32)
    card = given.card(0, 1)
    assert card["by"] == "domain"
    assert {row["name"]: row["tokens"] for row in card["affinity"]}["x"] == 64
    assert card["num_documents"] == 6
    assert given.card(0, 1) is card  # kept,
    given.read("another text")
    assert given.card(0, 1) is card  # and not of the text


def test_of_very_few_tokens(model):
    card = Session(model, "ab").card(0, 0)
    assert card["num_tokens"] == 2
    assert card["nearest"] == []


def test_another_expert(session):
    with pytest.raises(ValueError, match="expert is 99; choose one of 0, 1"):
        session.card(0, 99)
