"""Pages hold all that they show, and run nothing of a text."""

import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest

import analysis as an
from analysis.explorer.page import LARGEST, Page

from .conftest import TEXT

HOSTILE = [
    "<script>alert(1)</script><!-- </script> -->",
    "\0\x01\x1b[31m\r\x7f\x85 control",
    "\u202eright to left\u202c \u05d0\u05d1\u05d2 \u200f\u2028",
    'x" onload="alert(1)',
    "&lt;b&gt; {{ title }} {% raw %} \\u003c ]]>",
    "a" * 1500,
]


def answers_of(page):
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="answers">(.*?)</script>', page, re.S)
    return json.loads(text)


@pytest.fixture(scope="module")
def page(model):
    """Of the default conditions."""
    return an.explorer_page(model, TEXT, length=32, progress=False)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("kind", ["explorer", "tokens"])
def test_hostile_text_is_kept_and_not_run(model, text, kind):
    if kind == "tokens":
        page = an.tokens_page(model, text, an.DropTop(1))
    else:
        page = an.explorer_page(model, text, an.DropTop(1), cards=False, progress=False)
    told = answers_of(page)
    assert told["passage"]["text"] == text
    assert "".join(told["passage"]["tokens"]) == text.replace("\0", " ")
    assert [tag.split()[0] for tag in re.findall(r"<(/?script\b.*?)>", page)] == [
        *("script", "/script"),  # the answers
        *("script", "/script"),  # what reads them
    ]
    assert "alert(1)</" not in page
    page.encode("utf-8", errors="strict")


def test_a_title_is_no_markup(model):
    page = an.tokens_page(model, TEXT, an.DropTop(1), title="<b>&\"'</b>")
    assert "<title>&lt;b&gt;" in page
    assert "<b>" not in page


def test_nothing_is_fetched(page):
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\"'\s]*", page) == []
    assert re.findall(r"\b(?:src|href|action)=\"(?!data:,\")[^\"]*", page) == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|WebSocket", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy.startswith("default-src 'none';")
    (script,) = re.findall(r'<script type="module">(.*?)</script>', page, re.S)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    for part in (script, style):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_its_answers_are_those_of_a_sweep(page, model):
    told = answers_of(page)
    conditions = [an.DropTop(m) for m in (1, 2, 3, 4)]
    docs = an.explorer.passage.Passage.of(model, TEXT, 32).docs
    damage = an.sweep(model, docs, conditions, controls=False, progress=False).damage(full=True)
    runs = [run for run in told["runs"] if run["perturbation"] == "DropTop"]
    nats = [run["nats"] - told["passage"]["nats"] for run in runs if run["where"] == "all"]
    assert nats == pytest.approx(damage.delta_nats.tolist(), abs=1e-6)


def test_controls_are_those_that_have_answers(page, model):
    told = answers_of(page)
    assert told["about"]["live"] is False
    controls = {control["name"]: control for control in told["about"]["controls"]}
    assert controls["DropTop"]["strengths"] == [0, 1, 2, 3, 4]  # 0 is the text undisturbed
    assert controls["NoRouted"]["strengths"] == [0.0, 1.0]
    assert controls["TopK"]["strengths"] == [1, 2, 3, 4]
    names = {(run["perturbation"], run["strength"], run["where"]) for run in told["runs"]}
    assert (told["perturbation"], told["strength"], told["where"]) in names
    assert len(names) == len(told["runs"])
    assert {where for _, _, where in names} == {*told["about"]["places"]}
    experts = sum(site.num_experts for site in model.sites())
    assert len({(card["site"], card["expert"]) for card in told["cards"]}) == experts


def test_conditions_of_every_kind(model):
    conditions = [
        an.Condition(an.DropTop(2), "stage 1", effect="selection"),
        an.Condition(an.GaussianNoise(0.5), eval_seed=3),
        an.Condition(an.Quantize("fp8")),
        an.SwapRanks(1, 3),
        an.DropExperts(ids={"layer 0": [1]}),
    ]
    told = answers_of(an.explorer_page(model, TEXT, conditions, cards=False, progress=False))
    assert [run["perturbation"] for run in told["runs"]] == [
        "DropTop, selection",
        "GaussianNoise, seed 3",
        "Quantize(fp8)",
        "SwapRanks(s=3)",
        "DropExperts(ids=layer 0+1)",
    ]
    assert told["cards"] == []


def test_a_page_of_a_thousand_tokens_is_no_megabyte():
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40))[:1000]
    page = an.explorer_page("cartesian", text, cards=False, progress=False)
    told = answers_of(page)
    assert len(told["passage"]["tokens"]) == 1000
    assert len(told["runs"]) == 26  # all of them
    assert 300_000 < len(page.encode()) <= LARGEST


def test_what_does_not_fit_is_left_out(model, monkeypatch):
    whole = an.explorer_page(model, TEXT, cards=False, progress=False)
    monkeypatch.setattr("analysis.explorer.page.LARGEST", len(whole.encode()) - 1)
    smaller = an.explorer_page(model, TEXT, cards=False, progress=False)
    assert len(answers_of(smaller)["runs"]) == len(answers_of(whole)["runs"]) - 1


def test_cards_that_fill_a_page_are_left_out(model, monkeypatch):
    """Of very many experts."""
    monkeypatch.setattr("analysis.explorer.page.LARGEST", 20_000)
    page = an.explorer_page(model, TEXT, progress=False)
    assert answers_of(page)["cards"] == []
    assert len(answers_of(page)["runs"]) == 1


def test_as_a_file_and_in_a_notebook(page, tmp_path):
    assert page.save(tmp_path / "page.html").read_text(encoding="utf-8") == page
    with pytest.raises(FileNotFoundError):
        page.save(tmp_path / "none" / "page.html")
    frame = page._repr_html_()
    assert 'sandbox="allow-scripts"' in frame
    assert html.unescape(re.search(r'srcdoc="(.*?)"', frame, re.S)[1]) == page
    assert repr(page) == f"Page({len(page):,} characters); save(path) writes it"
    assert isinstance(page, Page | str)


def test_what_cannot_be_asked(model):
    with pytest.raises(ValueError, match="text is empty; give some"):
        an.tokens_page(model, "", an.DropTop(1))
    with pytest.raises(ValueError, match="where is 'layer 9'"):
        an.tokens_page(model, TEXT, an.DropTop(1), where="layer 9")
    with pytest.raises(ValueError, match="perturbations is 'DropTop'; give an object"):
        an.explorer_page(model, TEXT, "DropTop")
    with pytest.raises(ValueError, match="conditions is empty; give at least one, or None"):
        an.explorer_page(model, TEXT, [])
    with pytest.raises(ValueError, match="perturbation has 2 of them; a text alone shows one"):
        an.tokens_page(model, TEXT, [an.DropTop(1), an.DropTop(2)])


def test_it_says_how_long_a_text_was(model):
    page = an.tokens_page(model, "x" * 3000, an.DropTop(1))
    told = answers_of(page)["passage"]
    assert (len(told["tokens"]), told["num_given"]) == (2048, 3000)
    assert np.isfinite(told["nats"])
