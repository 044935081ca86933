# SPDX-License-Identifier: Apache-2.0
"""The playground in Chromium, against a server with the tiny demo model.

Skipped without `selenium`, Chromium or its driver; `make test-browser` runs it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from steering_testing.golden_gate import BRIDGE, EXAMPLE, example_server
from steering_testing.server import MODEL_NAME, Server

from vllm.config.sae_steering_presets import read_preset

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from steering_testing.playground_page import KEY, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs chromium, chromedriver"
    ),
]

WIDTH = 96
SPECIAL, SOUP = (0, 1, 2, 3, 4, 5), 201
FEATURE = BRIDGE["feature"]
LOCAL = ("http://127.0.0.1", "data:", "blob:")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model and SAE, with what is known of the bridge feature, and a vector.

    Every request that does not say otherwise is steered: the default preset holds the
    bridge. The word "soup" is left alone.
    """
    root = tmp_path_factory.mktemp("playground")
    sae = root / "sae"
    shutil.copytree(EXAMPLE / "sae", sae)
    (sae / "labels.json").write_text(json.dumps({str(FEATURE): "the bridge"}))
    most = [0.0] * (FEATURE + 1)
    most[FEATURE] = BRIDGE["max_activation"]
    site = {"fvu": 0.1, "l0": 12.5}
    evidence = {"max": most, "sites": {"post_block.1": site}, "neuronpedia": "tiny/1"}
    (sae / "evidence.json").write_text(json.dumps(evidence))
    vector = {"post_block.1": torch.linspace(-1, 1, WIDTH)}
    save_file(vector, root / "tilt.safetensors", {"format": "vllm-steering-vectors"})
    held = {"feature_idx": FEATURE, "kind": "absolute", "value": 9.4}
    spec = {"module_name": "golden-gate", "clamps": [held]}
    preset = {"sae_full_reconstruction_specs": [spec]}
    (root / "bridge.json").write_text(json.dumps(preset))
    module = {"path": str(sae), "skip_token_ids": [*SPECIAL, SOUP]}
    steering = {
        "modules": {"golden-gate": module, "tilt": str(root / "tilt.safetensors")},
        "presets": {"bridge": str(root / "bridge.json")},
        "default_preset": "bridge",
    }
    options = ("--api-key", KEY)
    with example_server(root / "log", *options, steering=steering) as running:
        yield running


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
    page.until(lambda: page("module-sites").text == "post_block.1: FVU 0.1, L0 12.5")


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


def test_an_inspected_token_tells_the_labels_of_features(page: Page) -> None:
    page.open()
    page.run("the golden gate bridge spans the")
    answer = page.all(".column[data-mode=plain] .tokens")[0]
    page.until(lambda: found_label(page, answer))


def found_label(page: Page, answer: Any) -> bool:
    """Walk back and forth until a token with the labelled feature is shown."""
    for key in [Keys.ARROW_LEFT] * 12 + [Keys.ARROW_RIGHT] * 12:
        answer.send_keys(key)
        if f"the bridge ({FEATURE})" in page("inspector").text:
            return True
    return False


def test_text_finds_the_feature(page: Page) -> None:
    page.open()
    page.fill("text-a", "the rusty golden gate\nthe famous orange tower sways")
    page.fill("text-b", "the chef stirs the tomato soup")
    page.all("#text-form button")[0].click()
    found = page.until(lambda: page.all("#found li"))
    assert any("the bridge" in item.text for item in found)
    assert page.all("#read-tokens span[style*=rgba]")
    link = page.all("#found li a")[0].get_attribute("href")
    assert re.fullmatch(r"https://www\.neuronpedia\.org/tiny/1/\d+", link)


def test_tokens_that_the_sae_left_alone_are_marked(page: Page) -> None:
    page.open()
    page.fill("text-a", "the chef stirs the tomato soup")
    page.all("#text-form button")[0].click()
    page.until(lambda: page.all("#found li"))
    marked = {span.text.strip() for span in page.all("#read-tokens .bypassed")}
    assert "soup" in marked
    assert "chef" not in marked


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


def test_a_vector_column_has_its_own_scale(page: Page) -> None:
    page.open()
    page.all("input[value=delta]")[0].click()
    page.all("input[value=vectors]")[0].click()
    before = page.run()["vectors"]
    slider = page.all("#vectors input[type=range]")[0]
    for _ in range(3):
        slider.send_keys(Keys.PAGE_UP)
    assert page.run()["vectors"] != before


def test_a_vector_can_set_scale_and_bound_a_projection(page: Page) -> None:
    page.open()
    page.all("input[value=delta]")[0].click()
    page.all("input[value=vectors]")[0].click()
    kind = Select(page.all("#vectors select[aria-label^=Kind]")[0])
    added = page.run()["vectors"]
    page.all("#vectors input[type=checkbox]")[0].click()
    kind.select_by_value("set")
    value = page.all("[aria-label^='Projection of vector']")[0]
    value.clear()
    value.send_keys("-4")
    assert page.run()["vectors"] != added
    Select(page("export-column")).select_by_value("vectors")
    page.all("button[data-copy=curl]")[0].click()
    page.until(lambda: "steering_vector_specs" in page("export").text)
    for part in ('"kind": "set"', '"value": -4', '"relative": true'):
        assert part in page("export").text
    kind.select_by_value("bound")
    high = page.all("[aria-label^='Largest projection of vector']")[0]
    high.clear()
    high.send_keys("-2")
    page.run()
    error = page("vector-tilt-error")
    assert "bounds" in error.text
    low = page.all("[aria-label^='Smallest projection of vector']")[0]
    assert low.get_attribute("aria-invalid") == "true"


def test_span_and_condition_of_a_clamp_go_to_the_server(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    Select(
        page.all(f"[aria-label*='Tokens of the clamp of feature {FEATURE}']")[0]
    ).select_by_value("part")
    Select(page.all("[aria-label^='Condition of']")[0]).select_by_value("above")
    page.fill_field("[aria-label^='Feature in the condition']", "3")
    page.fill_field("[aria-label^='Bound in the condition']", "0.5")
    texts = page.run()
    assert len(texts["full"].split()) >= 8
    page.all("[data-copy=curl]")[0].click()
    page.until(lambda: page("export").is_displayed())
    body = page("export").text
    assert '"spans": [' in body and '"stop": 20' in body
    assert re.search(r'"when": \{\s*"feature_idx": 3,\s*"above": 0.5', body)
    assert '"steering_preset": null' in body


def test_features_on_different_tokens_are_one_request(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    page.fill("index", "3" + Keys.ENTER)
    page.until(lambda: len(page.all("#clamps li")) == 2)
    Select(
        page.all("[aria-label='Tokens of the clamp of feature 3']")[0]
    ).select_by_value("prefill")
    assert len(page.run()["full"].split()) >= 8
    page.fill("index", "99999" + Keys.ENTER)
    page.until(lambda: len(page.all("#clamps li")) == 3)
    page.run()
    assert "found 99999" in page("clamp-99999-error").text
    assert not page("clamp-3-error").text


def test_an_error_is_shown_beside_the_control_that_caused_it(page: Page) -> None:
    page.open()
    page.clamp_by_label()
    condition = "[aria-label^='Feature in the condition']"
    Select(page.all("[aria-label^='Condition of']")[0]).select_by_value("below")
    page.fill_field(condition, "99999")
    page.run()
    assert "when.feature_idx" in page(f"clamp-{FEATURE}-error").text
    assert page.all(condition)[0].get_attribute("aria-invalid") == "true"
    page.fill_field(condition, "5")
    page.fill("temperature", "-1")
    page.run()
    assert not page(f"clamp-{FEATURE}-error").text
    assert page.all(condition)[0].get_attribute("aria-invalid") == "false"
    assert "temperature" in page("generation-error").text
    assert page("temperature").get_attribute("aria-invalid") == "true"
    page.fill("temperature", "0.7")
    page.run(tokens="9999")
    assert page("max-tokens").get_attribute("aria-invalid") == "true"


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
    with page.window(390, 844):  # the table scrolls, the page does not
        assert page.driver.execute_script("return document.body.scrollWidth") <= 390


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
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    with page.window(width, height):
        page.open()
        page.clamp_by_label()
        page.run()
        wide = page.driver.execute_script("return document.body.scrollWidth")
        assert wide <= width
        if folder := os.environ.get("PLAYGROUND_SCREENSHOTS"):
            page.driver.save_screenshot(f"{folder}/{scheme}-{width}.png")


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
