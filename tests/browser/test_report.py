"""The report of a study in a browser: nothing is asked of a network, axe-core finds nothing
serious, and it can be read on a phone, in the dark, and printed."""

from __future__ import annotations

import base64

import pytest

from analysis.report import write_report
from analysis.study import Study, run

from ..tiny import tiny_study, write_corpus

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a tiny study."""
    folder = tmp_path_factory.mktemp("report")
    families = ["dense", "smoe_share", "cartesian"]
    text = tiny_study(corpus=write_corpus(folder / "corpus"), steps=20, families=families)
    (folder / "tiny.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTMOE_CACHE", str(folder / "cache"))
        run(Study.read(folder / "tiny.toml"), folder / "out", progress=False)
        return write_report(folder / "out", folder / "report.html")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_readable(page, browse, width, dark):
    browser = browse(width, 900, dark=dark).open(page)
    assert browser.findings() == []
    assert browser.js("return document.documentElement.scrollWidth") <= width
    assert len(browser.all("figure svg")) > 3


def test_it_is_printed(page, browse):
    browser = browse().open(page)
    options = {"printBackground": True, "preferCSSPageSize": True}
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", options)["data"]
    assert base64.b64decode(printed).startswith(b"%PDF")
