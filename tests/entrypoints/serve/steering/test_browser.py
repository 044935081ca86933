# SPDX-License-Identifier: Apache-2.0
"""The playground in Chromium, against a server with the tiny demo model.

Skipped without `selenium`, Chromium or its driver; `make test-browser` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering_testing.server import MODEL_NAME, Server, api_server

from vllm.config.sae_steering_presets import read_preset

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs chromium, chromedriver"
    ),
]

EXAMPLE = Path(__file__).parents[4] / "examples" / "golden_gate"
KEY = "the-key"
WAIT_S = 120
BRIDGE = json.loads((EXAMPLE / "features.json").read_text())["topics"]["bridge"]
FEATURE = BRIDGE["feature"]
LOCAL = ("http://127.0.0.1", "data:", "blob:")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model and SAE, with a label and a maximum for the bridge feature."""
    root = tmp_path_factory.mktemp("playground")
    sae = root / "sae"
    shutil.copytree(EXAMPLE / "sae", sae)
    (sae / "labels.json").write_text(json.dumps({str(FEATURE): "the bridge"}))
    most = [0.0] * (FEATURE + 1)
    most[FEATURE] = BRIDGE["max_activation"]
    (sae / "evidence.json").write_text(json.dumps({"card": {"fvu": 0.1}, "max": most}))
    arguments = ["--api-key", KEY, "--steering-modules", f"golden-gate={sae}"]
    with api_server(
        EXAMPLE / "model",
        root / "log",
        *arguments,
        environment={"VLLM_PLUGINS": "steering"},
    ) as server:
        yield server


class Page:
    """What a reader does with the page."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver = driver
        self.url = url

    def open(self, key: str | None = KEY) -> None:
        """Load the page afresh, with a key."""
        self.driver.get(f"{self.url}/steering/")
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.refresh()
        if key:
            self.enter_key(key)
            self.until(lambda: MODEL_NAME in self("server").text)

    def enter_key(self, key: str) -> None:
        self.until(lambda: self("keys").get_attribute("open") is not None)
        self.fill("server-key", key)
        self.driver.find_element(By.CSS_SELECTOR, "#key-form button").click()

    def __call__(self, element_id: str) -> Any:
        return self.driver.find_element(By.ID, element_id)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def fill(self, element_id: str, text: str) -> None:
        self(element_id).clear()
        self(element_id).send_keys(text)

    def until(self, holds: Any) -> Any:
        return WebDriverWait(self.driver, WAIT_S).until(lambda _: holds())

    def clamp_by_label(self) -> None:
        self.fill("label-query", "bridge" + Keys.ENTER)
        self.until(lambda: self.all("#found button"))[0].click()
        self.until(lambda: "the bridge" in self("clamps").text)

    def run(self, prompt: str = "the chef stirs") -> dict[str, str]:
        """Run without chat; the answers by column."""
        if self("chat").is_selected():
            self("chat").click()
        self.fill("prompt", prompt)
        self.fill("max-tokens", "24")
        self("run").click()
        self.until(lambda: self("run").is_enabled())
        columns = self.all(".column")
        return {
            c.get_attribute("data-mode"): c.find_element(By.CLASS_NAME, "tokens").text
            for c in columns
        }


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(driver, server.url)
    finally:
        driver.quit()


def test_a_wrong_key_is_answered_beside_the_key(page: Page) -> None:
    page.open(key=None)
    page.enter_key("wrong")
    page.until(lambda: "nauthorized" in page("key-error").text)
    assert page("server-key").get_attribute("aria-invalid") == "true"
    page.enter_key(KEY)
    page.until(lambda: MODEL_NAME in page("server").text)
    page.until(lambda: "FVU 0.1" in page("module-facts").text)


def test_four_columns_stream_and_the_clamp_shows(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    texts = page.run()
    assert list(texts) == ["plain", "reconstruction", "delta", "full"]
    assert all(len(text.split()) >= 8 for text in texts.values()), texts
    assert "bridge" not in texts["plain"]
    assert texts["full"] != texts["reconstruction"]
    states = [c.find_element(By.CLASS_NAME, "hint").text for c in page.all(".column")]
    assert all("24 tokens" in state for state in states), states


def test_tokens_are_shaded_and_tell_their_features(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    page.run("the golden gate bridge spans the")
    shaded = page.all(".column[data-mode=full] .tokens span[style*=rgba]")
    assert shaded
    page.all(".column[data-mode=full] .tokens")[0].send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "features active" in page("inspector").text)


def test_text_finds_the_feature(page: Page) -> None:
    page.open()
    page.fill("text-a", "the rusty golden gate\nthe famous orange tower sways")
    page.fill("text-b", "the chef stirs the tomato soup")
    page.all("#text-form button")[0].click()
    found = page.until(lambda: page.all("#found li"))
    assert any("the bridge" in item.text for item in found)
    assert page.all("#read-tokens span[style*=rgba]")


def test_an_error_is_shown_beside_its_clamp(page: Page) -> None:
    page.open()
    page.fill("index", "99999" + Keys.ENTER)
    page.until(lambda: page.all("#clamps li"))
    page.run()
    error = page("clamp-99999-error")
    assert "feature_idx: found 99999" in error.text
    assert page("clamp-99999").get_attribute("aria-invalid") == "true"
    page.all("#clamps button")[0].click()
    assert not page.all("#clamps li")


def test_the_slider_moves_by_keyboard(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    slider = page(f"clamp-{FEATURE}")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("value") == "1.3"
    assert slider.get_attribute("aria-valuetext").startswith("1.3 × its maximum")


def test_the_sweep_draws_a_plot_and_a_table(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    page.fill("max-tokens", "8")
    page("chat").click()
    page.fill("sweep-words", "bridge, bay, golden")
    page.all("#sweep-form button")[0].click()
    page.until(lambda: len(page.all("#sweep-plot circle")) == 8)
    assert len(page.all("#sweep-plot tr")) == 3


def test_copies_hold_the_request(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    Select(page("export-column")).select_by_value("full")
    page.all("[data-copy=curl]")[0].click()
    page.until(lambda: page("export").is_displayed())
    assert f'"feature_idx": {FEATURE}' in page("export").text
    assert KEY not in page("export").text
    page.all("[data-copy=python]")[0].click()
    page.until(lambda: "from openai import OpenAI" in page("export").text)
    compile(page("export").text, "copied", "exec")
    page.all("[data-copy=preset]")[0].click()
    page.until(lambda: page("export").text.startswith("{"))
    preset = read_preset(json.loads(page("export").text))
    assert preset.sampling.seed == 1


def test_every_control_has_a_name(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    for control in page.all("input, select, textarea, button, summary"):
        if control.is_displayed():
            assert control.accessible_name.strip(), control.get_attribute("outerHTML")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 1000), (390, 844)])
def test_it_fits_the_width(page: Page, scheme: str, size: tuple[int, int]) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": width < 500}
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        page.open()
        page.clamp_by_label()
        page.run()
        wide = page.driver.execute_script("return document.body.scrollWidth")
        assert wide <= width
        if folder := os.environ.get("PLAYGROUND_SCREENSHOTS"):
            page.driver.save_screenshot(f"{folder}/{scheme}-{width}.png")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_only_the_server_was_asked(page: Page) -> None:
    messages = [
        json.loads(entry["message"])["message"]
        for entry in page.driver.get_log("performance")
    ]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert all(url.startswith(LOCAL) for url in asked)
