"""The page in a real browser: choose, ask, both answers stream, at a phone's width. Needs Chromium."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving import NAME, live, served_base, write_prefix

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="NO BROWSER: the page is not tested; install chromium and chromium-driver",
)


@pytest.fixture(scope="module")
def browser() -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Any:
    base, folder = served_base(max_position_embeddings=100_000), tmp_path_factory.mktemp("prefixes")
    for name, length in (("first", 4), ("second", 7)):
        write_prefix(base, folder / name, length=length, seed=length)
    with live(base, prefix_dir=folder, cached_tokens=10**7, max_tokens=100_000, endless=True) as made:
        yield made


def wait_for(browser: Any, check: Any) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(check)


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def note(browser: Any, place: str) -> str:
    text: str = find(browser, f"#{place} .note").text
    return text


@needs_browser
def test_base_and_prefix_answer_side_by_side(browser: Any, server: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import Select

    browser.set_window_size(1200, 800)
    browser.get(server.url)
    wait_for(browser, lambda _: len(find(browser, "#prefix").find_elements("tag name", "option")) == 2)
    Select(find(browser, "#prefix")).select_by_visible_text("second")
    tokens = find(browser, "#tokens")
    tokens.clear()
    tokens.send_keys("40")
    find(browser, "#send").click()
    for place, name in (("base", NAME), ("with", f"{NAME}:second")):
        wait_for(browser, lambda _, place=place: "tokens/s" in note(browser, place))
        assert note(browser, place).startswith("40 tokens in")
        assert find(browser, f"#{place} h2").text == name
        assert find(browser, f"#{place} .text").get_attribute("textContent")
        line = find(browser, f"#{place} pre").text
        assert line.startswith(f"curl -N {server.url}/v1/chat/completions")
        assert f'"model":"{name}"' in line
    left, right = (find(browser, f"#{place}").rect for place in ("base", "with"))
    assert left["y"] == right["y"]
    errors = [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert not errors
    assert browser.get_screenshot_as_png()[:4] == b"\x89PNG"


@needs_browser
def test_page_fits_a_phone_streams_and_stops(browser: Any, server: Any) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        browser.get(server.url)
        wait_for(browser, lambda _: len(find(browser, "#prefix").find_elements("tag name", "option")) == 2)
        browser.execute_script("document.getElementById('tokens').value = 50000")
        find(browser, "#send").click()
        text = find(browser, "#with .text")
        wait_for(
            browser, lambda _: len(text.get_attribute("textContent")) > 5
        )  # it streams: it is far from done
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        first, second = (find(browser, f"#{place}").rect for place in ("base", "with"))
        assert second["y"] > first["y"]
        find(browser, "#stop").click()
        wait_for(browser, lambda _: note(browser, "base") == note(browser, "with") == "stopped")
        wait_for(browser, lambda _: server.service.engine.active == 0)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_error_is_shown_where_the_answer_would_be(browser: Any, server: Any) -> None:
    browser.get(server.url)
    wait_for(browser, lambda _: len(find(browser, "#prefix").find_elements("tag name", "option")) == 2)
    browser.execute_script("document.getElementById('tokens').value = 500000")
    find(browser, "#send").click()
    wait_for(browser, lambda _: "too long" in note(browser, "base") and "too long" in note(browser, "with"))


def test_page_asks_no_other_server_and_is_one_file() -> None:
    import prefixtune.serve

    page = (Path(prefixtune.serve.__path__[0]) / "playground.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert "src=" not in page
    assert os.path.getsize(Path(prefixtune.serve.__path__[0]) / "playground.html") < 20_000
