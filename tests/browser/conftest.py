"""A Chromium without a head and without a network, which must have nothing to complain of."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

NEEDED = (
    "tests in a browser need Chromium with its driver, selenium and axe-core: "
    "apt-get install chromium chromium-driver npm; make test-browser installs the others"
)
AXE = Path(sys.prefix, "share", "axe", "node_modules", "axe-core", "axe.min.js")
OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # containers have no other users
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
OWN = ("file:", "data:", "blob:", "about:", "chrome:", "http://127.0.0.1", "ws://127.0.0.1")


def chromium() -> str | None:
    """Where it is."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A window of one size; `driver` is selenium's."""

    def __init__(self, width: int, height: int, dark: bool):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = chromium() or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        for option in OPTIONS:
            options.add_argument(option)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options, service)
        self.driver.set_script_timeout(30)
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, url) -> Browser:
        """A path, or an address of this machine."""
        self.driver.get(url if isinstance(url, str) else url.as_uri())
        return self

    def js(self, script: str, *args):
        """What the script returns, two frames later than now, so that what was asked is drawn."""
        self.driver.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )
        return self.driver.execute_script(script, *args)

    def one(self, selector: str):
        """The first element."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        """All elements."""
        return self.driver.find_elements("css selector", selector)

    def findings(self) -> list[str]:
        """What axe-core finds that is serious or critical, and where."""
        self.driver.execute_script(AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then(found => done(found.violations))"
        )
        return [
            f"{one['id']}: {node['html'][:150]}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]

    def picture(self, path: Path) -> Path:
        """A screenshot of what is in the window."""
        self.driver.save_screenshot(str(path))
        return path

    def complaints(self) -> list[str]:
        """Errors on the console, and what was asked for beyond this machine."""
        errors = [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent]
        return errors + [url for url in urls if not url.startswith(OWN)]


@pytest.fixture(scope="session")
def _installed():
    try:
        import selenium  # noqa: F401

        found = chromium() and shutil.which("chromedriver") and AXE.is_file()
    except ImportError:
        found = None
    if not found:
        pytest.fail(NEEDED)


@pytest.fixture
def browse(_installed):
    """browse(width=1280, height=900, dark=False, checked=True) -> a `Browser`; one that is checked
    must have no complaints at the end of the test."""
    with ExitStack() as stack:
        opened = []

        def window(width=1280, height=900, dark=False, checked=True) -> Browser:
            browser = Browser(width, height, dark)
            stack.callback(browser.driver.quit)
            opened.extend([browser] if checked else [])
            return browser

        yield window
        assert [browser.complaints() for browser in opened] == [[] for _ in opened]
