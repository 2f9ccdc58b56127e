"""The page of a study: what it says, that it can be read by everybody, and that it needs and runs
nothing from elsewhere, whatever things are called."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from analysis.report.page import write_report
from analysis.study.run import run
from analysis.study.store import Store
from analysis.study.study import Study

SCRIPT = "<script>alert(1)</script>"
RTL = "נתב \"quoted\" & 'x'"
IMAGE = '"><img src=x onerror=alert(1)>'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements in order, each (tag, attributes, the tags around it, its own text)."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict, tuple, list]] = []
        self.open: list[tuple[str, dict, tuple, list]] = []
        self.feed(text)
        assert not self.open, f"not closed: {[tag for tag, *_ in self.open]}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        around = tuple(element[0] for element in self.open)
        self.elements.append((tag, dict(attrs), around, []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(e[0] for e in self.open), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[3].append(data)

    def all(self, *tags):
        return [element for element in self.elements if element[0] in tags]

    def values(self, name):
        """Of that attribute, wherever it stands."""
        return [attrs[name] for _, attrs, *_ in self.elements if name in attrs]

    def texts(self, *tags):
        return [" ".join("".join(text).split()) for *_, text in self.all(*tags)]

    @property
    def text(self):
        (main,) = self.texts("main")
        return main


@pytest.fixture(scope="module")
def study(write_study, checkpoint_of, texts, tmp_path_factory):
    """The directory of a finished study, whose models and domains have names that would be run."""
    place = tmp_path_factory.mktemp("page")
    for number, path in enumerate(sorted(texts.glob("*.txt"))):
        domain = place / "texts" / ("prose", IMAGE, RTL)[number % 3]
        domain.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, domain)
    models = [
        {"path": str(checkpoint_of("smoe_share")), "name": SCRIPT},
        {"path": str(checkpoint_of("cartesian")), "name": RTL},
    ]
    path = write_study(
        place / "study.toml",
        name=f"a study {SCRIPT}",
        data={"corpus": str(place / "texts")},
        train=None,
        models=models,
        measure={"tokens": True},
        contrasts={"reference": RTL, "margin": 0.1},
    )
    run(Study.read(path), place / "out", progress=False)
    return place / "out"


@pytest.fixture(scope="module")
def source(study, tmp_path_factory):
    return write_report(study, tmp_path_factory.mktemp("written") / "new" / "page.html").read_text()


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_headings_have_one_order(page):
    levels = [int(tag[1]) for tag, *_ in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.texts("h2") == [
        "What was asked", "Summary", "Robustness", "Figures", "Controls", "Tables", "Manifest",
        "How to reproduce", "Limits", "Methods, and how to cite",
    ]  # fmt: skip


def test_ids_are_unique_and_what_refers_to_them_finds_them(page, source):
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 100  # with those of the pictures
    links = [link for link in page.values("href") if link.startswith("#")]
    inside = [link[1:] for link in (*links, *page.values("xlink:href"))]
    assert {*inside, *page.values("aria-labelledby")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", source)) <= set(ids)
    assert page.texts("a")[1:11] == page.texts("h2")
    contents = [a["href"] for tag, a, around, _ in page.elements if tag == "a" and "nav" in around]
    assert contents == [f"#{attrs['id']}" for _, attrs, *_ in page.all("h2")]


def test_pictures_have_names(page):
    drawn = page.all("svg")
    said = {attrs.get("id"): "".join(text) for _, attrs, _, text in page.elements}
    assert len(drawn) == len(page.all("figcaption")) == 11
    for _, attrs, around, _ in drawn:
        assert attrs["role"] == "img"
        assert "figure" in around
        assert re.search("Largest: .* nats per token|worst 1 %", said[attrs["aria-labelledby"]])
    assert page.all("img") == []


def test_tables_have_titles_and_heads(page):
    tables = page.all("table")
    assert len(page.all("caption")) == len(tables) > 9
    assert all(attrs["scope"] in ("col", "row") for _, attrs, *_ in page.all("th"))
    rows = [attrs for _, attrs, around, _ in page.elements if around[-1:] == ("tr",)]
    assert sum(attrs.get("scope") == "row" for attrs in rows) > 100
    regions = [a for _, a, *_ in page.all("div") if a.get("role") == "region"]
    assert len(regions) == len(tables) + len(
        page.all("figure")
    )  # whatever may be wider than a phone
    assert all(a["tabindex"] == "0" and a["aria-labelledby"] for a in regions)


def test_nothing_comes_from_elsewhere_and_nothing_runs(page, source):
    (policy,) = [a["content"] for _, a, *_ in page.all("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for tag, attrs, *_ in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base")
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "srcset")]
    refers = [*page.values("href"), *page.values("xlink:href")]
    assert {link for link in refers if not link.startswith("#")} == {
        "https://arxiv.org/abs/2410.16077"
    }
    assert not re.search(r"@import|url\((?!#)", source)
    assert page.all("html")[0][1]["lang"] == "en"


def test_names_are_shown_as_they_are(page):
    names = [text for text in page.texts("th") if text == SCRIPT]
    assert len(names) > 10
    assert RTL in page.texts("th")
    assert {IMAGE, RTL} <= set(page.texts("td"))
    assert SCRIPT in page.texts("h1")[0]
    assert any(SCRIPT in text for text in page.texts("text"))  # of a picture


def test_what_it_says(page):
    for said in (
        "conditions, measured on 4 documents of",
        "Positive control: too few documents (4; at least 20)",
        f"beforehand ({RTL} less each other model, margin 0.1 nats per token), of 1",
        "No two models have more than 1 and 1 training seeds",
        "Families are not ordered",
        "another training run is not in them",
        "Identity control: hooks alone change nothing, to the last bit: passed",
        "? from fewer than 20 documents",
        "python -m analysis run study.toml --out DIR",
        "[[conditions]]",
        "@inproceedings{su2025",
        "CPU capability",
        "corpus fingerprint",
        "DropTop The m highest logits",
    ):
        assert said in page.text, said
    assert "Unfinished" not in page.text
    first, *rest = page.texts("li")[10:]  # after the contents
    assert re.match("Disabling each token’s first choice costs these 2 checkpoints between ", first)
    assert all(text[0].isalpha() or text.startswith(("<", RTL)) for text in rest)


def test_the_same_study_is_the_same_page(study, source, tmp_path):
    assert write_report(study, tmp_path / "again.html").read_text() == source


def test_an_unfinished_study_is_marked(study, tmp_path):
    """On the page and in every figure, with what there is; nothing but the page is written."""
    out = tmp_path / "half"
    shutil.copytree(study, out)
    plan = json.loads((out / "plan.json").read_text())
    last = plan["cells"][-1]["condition"]
    with Store(out / "results.sqlite") as store:
        store.remove(cell["key"] for cell in plan["cells"] if cell["condition"] == last)
    before = sorted(out.rglob("*"))
    page = Page(write_report(out).read_text())
    assert sorted(out.rglob("*")) == sorted([*before, out / "report.html"])
    (note,) = ("".join(text) for _, a, _, text in page.all("p") if a.get("role") == "note")
    assert re.match(r"Unfinished: \d+ of 63 cells\.", note)
    for *_, text in page.all("svg"):
        assert "Unfinished: " in "".join(text)


def test_clean_runs_alone(study_dict_of, checkpoint_of, tmp_path):
    models = [{"path": str(checkpoint_of("dense")), "name": "dense"}]
    conditions = [{"perturbation": "DropTop"}]
    study = study_dict_of(train=None, models=models, conditions=conditions)
    run(Study.from_dict(study), tmp_path, progress=False)
    page = Page(write_report(tmp_path).read_text())
    assert page.texts("h2")[2] == "Controls"  # neither robustness nor figures
    assert "Nothing but clean runs was measured." in page.text
    assert "The study was made in Python; as JSON it is:" in page.text


def test_mistakes(study, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no study"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"out is .*, a directory; name a file"):
        write_report(study, tmp_path)
    with pytest.raises(FileExistsError, match="is a file; name a directory"):
        write_report(study, study / "plan.json" / "page.html")
    old = tmp_path / "page.html"
    old.write_text("old")
    monkeypatch.setattr("analysis.report.page.page_of", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(study, old)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]
