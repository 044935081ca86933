# SPDX-License-Identifier: Apache-2.0
"""Take the pictures of docs/images/ from a running `make playground`.

    python tools/playground_screenshots.py [URL] [FOLDER]

Needs `selenium`, and Debian's `chromium` and `chromium-driver`. Writes
playground-light.png, playground-dark.png and playground-phone.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

WAIT_S = 600
WIDE, PHONE = (1280, 1060), (390, 844)


def start() -> webdriver.Chrome:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def look(driver: webdriver.Chrome, size: tuple[int, int], scheme: str) -> None:
    """Set the window's size and the preferred colour scheme."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": width < 500}
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def fill(driver: webdriver.Chrome, element_id: str, text: str) -> None:
    """Replace what is in a field."""
    field = driver.find_element(By.ID, element_id)
    field.clear()
    field.send_keys(text)


def play(driver: webdriver.Chrome, url: str) -> None:
    """Hold the sea feature, add a vector, and run four columns."""
    wait = WebDriverWait(driver, WAIT_S)

    def all_of(selector: str) -> list:
        return driver.find_elements(By.CSS_SELECTOR, selector)

    driver.get(f"{url}/steering/")
    wait.until(lambda _: "module(s)" in driver.find_element(By.ID, "server").text)
    fill(driver, "label-query", "sea, ships" + Keys.ENTER)
    wait.until(lambda _: all_of("#found button"))[0].click()
    wait.until(lambda _: "sea, ships" in driver.find_element(By.ID, "clamps").text)
    slider = all_of("#clamps input[type=range]")[0]
    for _ in range(5):  # from 1.25 to 1
        slider.send_keys(Keys.ARROW_LEFT)
    all_of("input[value=delta]")[0].click()
    all_of("input[value=vectors]")[0].click()
    strength = all_of("#vectors input[type=range]")[0]
    for _ in range(4):  # from 1 to 2
        strength.send_keys(Keys.ARROW_RIGHT)
    fill(driver, "max-tokens", "50")
    run = driver.find_element(By.ID, "run")
    run.click()
    wait.until(lambda _: run.is_enabled())
    answer = all_of(".column[data-mode=full] .tokens")[0]
    for _ in range(6):
        answer.send_keys(Keys.ARROW_RIGHT)
    fill(driver, "sweep-words", "sea, ship, sail, boat, ocean, captain, wave")
    fill(driver, "max-tokens", "40")
    all_of("#sweep-form button")[0].click()
    wait.until(lambda _: len(all_of("#sweep-plot circle")) == 8)
    fill(driver, "max-tokens", "50")
    Select(driver.find_element(By.ID, "export-column")).select_by_value("full")
    driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")


def main() -> None:
    """Play once, and take every picture."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    folder = sys.argv[2] if len(sys.argv) > 2 else "docs/images"
    driver = start()
    try:
        look(driver, WIDE, "light")
        play(driver, url)
        for name, size, scheme in (
            ("light", WIDE, "light"),
            ("dark", WIDE, "dark"),
            ("phone", PHONE, "light"),
        ):
            look(driver, size, scheme)
            top = 0
            if name == "phone":
                columns = driver.find_element(By.ID, "results")
                top = columns.rect["y"]
            driver.execute_script(f"scrollTo(0, {top})")
            driver.save_screenshot(str(Path(folder) / f"playground-{name}.png"))
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
