"""The explorer's pages in a browser, from files."""

import base64

import pytest

import analysis as an
from analysis.adapters.base import as_adapter

pytestmark = pytest.mark.browser

TEXT = "def queue(size):\n\treturn [0] * size  # naïve\n" * 3
HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=alert(1)> \u202etxt\u202c \x1b"
WIDTHS = pytest.mark.parametrize("width", [390, 1280])
LOOK = """return [...document.querySelectorAll('.tokens span')].map(
  (token) => getComputedStyle(token).backgroundColor)"""

STATE = """return [
  document.querySelector('.summary').textContent,
  [...document.querySelectorAll('.point')].map((point) => point.getAttribute('class')),
]"""
COLORS = """const style = getComputedStyle(document.querySelector('.moe-explorer'));
return [style.color, style.backgroundColor]"""
SITE = """const site = document.querySelector('.modes select');
site.value = arguments[0];
site.dispatchEvent(new Event('change'))"""


@pytest.fixture(scope="session")
def pages(tiny_model, tmp_path_factory):
    """By name, the paths of an explorer's page, of a text alone, and of a hostile one."""
    model, folder = (
        as_adapter(tiny_model("cartesian", vocab_size=256)),
        tmp_path_factory.mktemp("p"),
    )
    made = {
        "explorer": an.explorer_page(model, TEXT, progress=False),
        "tokens": an.tokens_page(model, TEXT, an.DropTop(1)),
        "hostile": an.tokens_page(model, HOSTILE + "x" * 1900, an.DropTop(1)),
    }
    return {name: page.save(folder / f"{name}.html") for name, page in made.items()}


@WIDTHS
@pytest.mark.parametrize("name", ["explorer", "tokens", "hostile"])
def test_it_fits(pages, browse, name, width):
    browser = browse(width).open(pages[name])
    assert browser.js("return document.documentElement.scrollWidth") == width
    tokens = browser.js("return document.querySelectorAll('.tokens span').length")
    assert tokens == (len(TEXT.encode()) if name != "hostile" else len(HOSTILE.encode()) + 1900)
    assert browser.js("return document.documentElement.lang") == "en"
    assert len(browser.all("h1")) == 1
    assert browser.findings() == []


@WIDTHS
def test_the_slider_changes_text_and_curve(pages, browse, width):
    browser = browse(width).open(pages["explorer"])
    before, points = browser.js(STATE)
    colors = browser.js(LOOK)
    browser.one("input[type=range]").send_keys("\ue014")  # the right arrow
    after, moved = browser.js(STATE)
    assert before != after
    assert points.index("point now") + 1 == moved.index("point now")
    assert browser.js(LOOK) != colors
    assert browser.one("output").text == "2"


def test_a_click_on_the_curve_moves_the_slider(pages, browse):
    browser = browse().open(pages["explorer"])
    browser.all(".point")[3].click()
    assert browser.js("return document.querySelector('input[type=range]').value") == "3"
    browser.all(".point")[0].click()  # nothing is perturbed
    assert "→" not in browser.js("return document.querySelector('.summary').textContent")
    assert {*browser.js(LOOK)} == {browser.js(LOOK)[0]}


@WIDTHS
def test_an_expert_has_a_card(pages, browse, width):
    browser = browse(width).open(pages["explorer"])
    assert not browser.one(".card").is_displayed()
    row = browser.all(".rows button")[2]
    browser.js("arguments[0].scrollIntoView({ block: 'center' })", row)
    row.click()
    browser.js("")
    card = browser.one(".card")
    assert card.find_element("css selector", "h2").text == "Expert 2, layer 0 stage 0"
    assert "nats per token" in card.text
    assert row.get_attribute("aria-pressed") == "true"
    near = card.find_element("css selector", ".nearest button")
    name = near.text
    browser.js("arguments[0].click()", near)
    browser.js("")
    assert card.find_element("css selector", "h2").text.lower().startswith(name)
    card.find_element("css selector", ".close").click()
    browser.js("")
    assert not card.is_displayed()


def test_keys_move_through_the_text(pages, browse):
    browser = browse().open(pages["tokens"])
    tokens = browser.one(".tokens")
    tokens.send_keys("\ue014\ue014")
    active = tokens.get_attribute("aria-activedescendant")
    assert browser.one(f"#{active}").get_attribute("data-token") == "2"
    told = browser.one(".tooltip").text
    assert "token 3" in told
    assert "nats" in told
    assert "margin" in told
    tokens.send_keys("\ue015")  # down a line, whose tab begins left of it
    line = browser.js("return document.activeElement.getAttribute('aria-activedescendant')")
    assert browser.one(f"#{line}").get_attribute("data-token") == "17"
    tokens.send_keys("\ue010")  # to the end, which nobody reads
    assert "it is the last" in browser.one(".tooltip").text
    tokens.send_keys("\ue00c")
    assert not browser.one(".tooltip").is_displayed()


@pytest.mark.parametrize("mode", ["before", "after", "margin"])
def test_other_colors_have_a_legend(pages, browse, mode):
    browser = browse().open(pages["explorer"])
    damage = browser.js(LOOK)
    browser.one(f"input[value={mode}]").click()
    assert browser.js(LOOK) != damage
    assert any(character.isdigit() for character in browser.one(".legend").text)
    first = browser.js(LOOK)
    browser.js(SITE, 3)
    assert browser.js(LOOK) != first
    changed = len(browser.all(".tokens .changed"))
    assert changed == 0 if mode == "margin" else changed > 0


def test_a_hostile_text_is_shown(pages, browse):
    browser = browse(390).open(pages["hostile"])
    shown = browser.js("return document.querySelector('.tokens').textContent")
    assert shown.startswith("<script>document.title = 'run'</script><img src=x onerror=alert(1)>")
    assert "⟨202E⟩txt⟨202C⟩ ⟨1B⟩x" in shown
    assert browser.driver.title.startswith("cartesian under DropTop(1)")
    assert len(browser.all("script")) == 2
    assert browser.all("main img") == []


def test_dark_and_on_paper(pages, browse):
    light = browse().open(pages["explorer"]).js(COLORS)
    browser = browse(dark=True).open(pages["explorer"])
    assert browser.js(COLORS) == ["rgb(230, 232, 235)", "rgb(22, 24, 27)"]
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.js(COLORS) == light


def test_a_complaint_would_be_seen(browse, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<img src='http://example.invalid/x.png'><script>missing()</script>")
    complaints = browse(checked=False).open(page).complaints()
    assert "http://example.invalid/x.png" in complaints
    assert any("missing is not defined" in complaint for complaint in complaints)
