"""What objects show of themselves in a notebook: closed tags, names as text, what comes first."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest

import analysis as an
from cartmoe.cards import MOST, card


class Text(HTMLParser):
    """The words of a page, whose tags must all be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.unclosed: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.unclosed == []

    def handle_starttag(self, tag, attrs):
        self.unclosed.append(tag)

    def handle_endtag(self, tag):
        assert self.unclosed.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def shown(thing) -> str:
    return " ".join(filter(None, Text(thing._repr_html_()).words))


@pytest.fixture(scope="module")
def model():
    return an.load("cartesian")


@pytest.fixture(scope="module")
def docs(model):
    return an.documents("stdlib", model, length=64, limit=6, max_tokens_per_document=64)


def test_a_card_shows_text_as_text_and_the_first_rows():
    table = pd.DataFrame({"<b>": ["</td>"] * (MOST + 1)})
    html = card("<script>", {"a&b": "<i>"}, {"some rows": table})
    words = Text(html).words
    assert {"<script>", "a&b", "<i>", "<b>", "</td>"} <= set(words)
    assert f"some rows, the first {MOST} of {MOST + 1} rows" in words
    assert words.count("</td>") == MOST


def test_models_show_their_size_and_routers(model):
    said = shown(model)
    assert "906,184" in said
    assert "24,576,000 tokens of stdlib" in said
    assert "num_experts" in said
    assert "2 of 2 MoE layers" in shown(an.load("olmoe"))
    assert "routers" not in shown(an.load("dense"))


def test_documents_show_how_much_of_which_domain(docs):
    said = shown(docs)
    assert f"{docs.num_tokens:,} tokens to predict in {len(docs)} windows of 64 tokens" in said
    for domain in set(docs.domain):
        assert domain in said


def test_perturbations_and_conditions_show_what_they_do():
    assert "The m highest logits of each token to -inf" in shown(an.DropTop(1))
    said = shown(an.Condition(an.DropTop(1), an.Where(stage=1), point="scores"))
    assert "stage 1" in said
    assert "scores" in said
    assert "The m highest logits" in said
    assert "where" in shown(an.Condition(lambda logits_TE, ctx: logits_TE))


def test_results_show_the_clean_loss_and_the_largest_changes(model, docs):
    results = an.sweep(model, docs, an.DropTop(1), progress=False)
    said = shown(results)
    top = results.damage().sort_values("delta_nats", ascending=False).label.iloc[0]
    assert f"{results.clean().nats.iloc[0]:.3f}" in said
    assert said.index(top) > said.index("damage(), nats per token")
    assert "Unfinished" not in said
    assert shown(replace(results, planned=99)).startswith("Unfinished.")
    losses = results.losses[results.losses.condition == "clean"]
    assert "damage()" not in shown(replace(results, losses=losses))


def test_what_is_drawn_again_is_called_by_its_name(model, docs, tmp_path):
    """Packages of the standard library, documents of anything else."""
    results = an.sweep(model, docs, an.DropTop(1), controls=False, progress=False)
    assert results.unit == docs.unit == docs[:2].unit == "packages"
    assert " packages, 1 conditions" in repr(results)
    assert "over packages, drawn within domains" in an.caption(results)
    results.save(tmp_path / "kept")
    assert an.read(tmp_path / "kept").unit == "packages"
    own = an.documents({"a": "some text", "b": "other text"}, model)
    assert an.sweep(model, own, an.DropTop(1), controls=False, progress=False).unit == "documents"


def test_overlap_shows_means_beside_nulls(model, docs):
    overlap = an.measure_overlap(model, docs, ["lift", "load"], progress=False)
    said = shown(overlap)
    lift = overlap.pairs[overlap.pairs.metric == "lift"]
    assert f"{lift.value.mean():.3f}".rstrip("0") in said
    assert "null" in said


def test_a_relation_shows_its_correlations(model, docs):
    relation = an.relate(model, docs, ["router_cosine"], sites="layer 0 stage 0", progress=False)
    said = shown(relation)
    assert "router_cosine" in said
    assert "p_holm" in said
