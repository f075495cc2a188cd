"""Headless Chromium (Debian's packages chromium and chromium-driver) for tests that look at pages."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("chromium", "chromedriver")
PHONE = 360
"""Width of a small phone in CSS pixels."""
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # there is none for root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--mute-audio",
    "--autoplay-policy=no-user-gesture-required",  # scripts may press play
    "--hide-scrollbars",
)


class Browser:
    """One window, and what the page in it did since it was opened."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file or an address in a window of that many CSS pixels."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # of the page before
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= PHONE}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def evaluate(self, script: str, *arguments: Any) -> Any:
        """What a script `return`s."""
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, script: str, *arguments: Any) -> Any:
        """What an asynchronous script gives to its last argument, a function, within 30 s."""
        return self.driver.execute_async_script(script, *arguments)

    def errors(self) -> list[str]:
        """Of the console, since the page was opened or this was asked."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """What was asked for beyond files and data in the page."""
        sent = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]

    def overflow(self) -> float:
        """By how many pixels the page is wider than its window."""
        element = "document.documentElement"
        return float(self.evaluate(f"return {element}.scrollWidth - {element}.clientWidth"))

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """What the window shows, or the whole page."""
        if whole:
            size = self.evaluate("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
            self.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] <= PHONE},
            )
        self.driver.save_screenshot(str(path))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Skips where there is no Chromium: `apt-get install chromium chromium-driver`, and selenium of the test extra."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    missing += [] if importlib.util.find_spec("selenium") else ["selenium"]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver; pip install selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for option in OPTIONS:
        options.add_argument(option)
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        driver.set_script_timeout(30)
        yield Browser(driver)
    finally:
        driver.quit()
