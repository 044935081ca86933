# SPDX-License-Identifier: Apache-2.0
"""What a reader does with the playground, through selenium."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from steering_testing.server import MODEL_NAME

KEY = "the-key"
WAIT_S = 120


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

    def fill_field(self, selector: str, text: str) -> None:
        [field] = self.all(selector)
        field.clear()
        field.send_keys(text)

    def until(self, holds: Any) -> Any:
        return WebDriverWait(self.driver, WAIT_S).until(lambda _: holds())

    def clamp_by_label(self) -> None:
        self.fill("label-query", "bridge" + Keys.ENTER)
        self.until(lambda: self.all("#found button"))[0].click()
        self.until(lambda: "the bridge" in self("clamps").text)

    @contextmanager
    def window(self, width: int, height: int) -> Iterator[None]:
        """A window of another size; that of a phone is a phone's."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": width < 500}
        )
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def run(self, prompt: str = "the chef stirs", tokens: str = "24") -> dict[str, str]:
        """Run without chat; the answers by column."""
        if self("chat").is_selected():
            self("chat").click()
        self.fill("prompt", prompt)
        self.fill("max-tokens", tokens)
        self("run").click()
        self.until(lambda: self("run").is_enabled())
        columns = self.all(".column")
        return {
            c.get_attribute("data-mode"): c.find_element(By.CLASS_NAME, "tokens").text
            for c in columns
        }
