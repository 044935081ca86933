# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/features/recipes.md run exactly as they are written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from steering_testing import pages
from steering_testing.server import ENVIRONMENT, OWN_PROCESS_ONLY, serving

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "features" / "recipes.md").read_text()
HERE = "http://localhost:8000"
BRIDGE = "bridge|golden|suspension|cable|deck"

pytestmark = [pytest.mark.server, pytest.mark.slow]


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a language under a heading."""
    text = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in OWN_PROCESS_ONLY}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | ENVIRONMENT | {"PATH": path} | more


def bash(code: str, **more: str) -> str:
    """What a block of the shell prints."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's server, on a port of its own."""
    (code,) = blocks("Start", "bash")
    prepare, serve = code.split("export ", 1)
    bash(prepare)
    exported, command = serve.split("\n", 1)
    variables = dict(pair.split("=") for pair in exported.split())
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["vllm", "serve"]
    log = tmp_path_factory.mktemp("recipes") / "log"
    with serving(words[2:], log, environment(**variables), ROOT) as server:
        yield server.url


@pytest.fixture(scope="module")
def names(url: str) -> dict[str, Any]:
    """What the Python recipes begin with."""
    found: dict[str, Any] = {}
    run_python("Start", url, found)
    return found


def texts(printed: str) -> list[str]:
    """The answers among the JSON documents that a recipe prints."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(printed):
        answer, at = decoder.raw_decode(printed, at)
        assert "error" not in answer, answer
        if answer.get("object") == "text_completion":
            found.append(answer["choices"][0]["text"])
    return found


SECTIONS = {
    "A condition": ["steered"],
    "Spans": ["steered"],
    "Directions": ["away"],
    "A vector of your own": ["steered"],
    "A preset": ["steered"],
    "A default for every request": ["steered", "opted_out"],
}


def run_python(section: str, url: str, names: dict[str, Any]) -> None:
    """Run the section's Python; it prints the words that the page shows."""
    (code,), (shown,) = blocks(section, "python"), blocks(section, "text")
    said = pages.printed(code.replace(HERE, url), names, Path(section))
    assert pages.words(said) == pages.words(shown), said


@pytest.mark.parametrize("section", SECTIONS)
def test_a_recipe_steers_from_the_shell_and_from_python(
    section: str, url: str, names: dict[str, Any]
) -> None:
    (shell,) = blocks(section, "bash")
    said = texts(bash(shell.replace(HERE, url)))
    try:
        run_python(section, url, names)
        assert said == [names[name] for name in SECTIONS[section]]
        assert names["plain"] not in said[:1]
        if "opted_out" in SECTIONS[section]:
            assert said[1] == names["plain"]
        if section != "Directions":
            assert re.search(BRIDGE, said[0])
            assert not re.search(BRIDGE, names["plain"])
        else:
            assert not re.search(BRIDGE, names["away"])
            assert names["steered"] != names["plain"]
        if section == "A preset":
            assert names["names"] == ["tiny", "golden"]
            assert names["beside"] != names["plain"]
    finally:
        if section == "A default for every request":
            (end,) = re.findall(r"\n`(curl [^`]*)`\nremoves the default", PAGE)
            bash(end.replace(HERE, url))


def test_many_settings_at_once_are_answered_as_one_by_one(
    url: str, names: dict[str, Any]
) -> None:
    run_python("Many settings at once", url, names)
    answers = names["answers"]
    assert len(answers) == 50
    for value in (0.0, names["strengths"][-1]):
        clamp = {"feature_idx": 457, "kind": "absolute", "value": value}
        alone = names["client"].completions.create(
            model="tiny",
            prompt="the chef stirs the tomato soup",
            max_tokens=24,
            temperature=0.8,
            seed=1,
            extra_body={
                "sae_clamp_specs": [{"module_name": "golden-gate", "clamps": [clamp]}]
            },
        )
        assert answers[value] == alone.choices[0].text
    assert re.search(BRIDGE, answers[names["strengths"][-1]])
    assert not re.search(BRIDGE, answers[0.0])


def test_the_features_of_answers_and_texts_become_frames(
    url: str, names: dict[str, Any]
) -> None:
    section = "Features of an answer and of texts"
    run_python(section, url, names)
    prompt, answer = names["prompt_frame"], names["answer_frame"]
    record = names["choice"].prompt_sae_features["golden-gate"]["post_block.1"]
    assert prompt.features.tolist() == sum(record["features"], [])
    assert prompt["values"].tolist() == sum(record["values"], [])
    # The last token of the answer was not read.
    assert answer.positions.nunique() == 7
    assert answer.positions.min() == prompt.positions.max() + 1
    first, second = names["frames"]
    pd.testing.assert_frame_equal(first, prompt, rtol=1e-4)
    largest = names["largest"]
    assert set(largest.index) == set(first.features) | set(second.features)
    (feature,) = set(first.features[first["values"] == first["values"].max()])
    assert largest[feature] >= first["values"].max() > 0
    (shell,) = blocks(section, "bash")
    said = json.loads(bash(shell.replace(HERE, url)))
    for frame, text in zip((first, second), said["data"], strict=True):
        own = names["frame_of"](text["sae_features"])
        pd.testing.assert_frame_equal(own, frame, rtol=1e-4)


def test_features_are_read_while_the_answer_is_written(
    url: str, names: dict[str, Any]
) -> None:
    run_python("Features while the answer is written", url, names)


@pytest.mark.engine
def test_the_offline_recipe_says_what_the_page_promises(tmp_path: Path) -> None:
    bash(blocks("Start", "bash")[0].split("export ", 1)[0])
    program = tmp_path / "offline.py"
    program.write_text(blocks("Offline", "python")[0])
    printed = bash(f"python {program}", VLLM_LOGGING_LEVEL="ERROR")
    said = dict(re.findall(r"^([a-z ]+):(.*)$", printed, re.MULTILINE))
    assert said["preset"] == said["default"]
    for name in ("condition", "span", "direction", "own vector", "preset"):
        assert said[name] != said["plain"], name


def program_path(program: str) -> str:
    """The folder of an evaluation's program, which has an environment of its own."""
    given = os.environ.get(f"STEERING_TEST_{program.upper()}")
    found = given or shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed")
    return f"{Path(found).parent}:{os.environ['PATH']}"


def make_preset(url: str) -> None:
    (shell,) = blocks("A preset", "bash")
    bash(shell.replace(HERE, url))


def test_lm_eval_tells_the_preset_from_the_plain_model(url: str) -> None:
    path = program_path("lm_eval")
    make_preset(url)
    (code,) = blocks("lm-eval", "bash")
    printed = bash(code.replace(HERE, url), PATH=path, HF_HUB_OFFLINE="1")
    print(printed)
    scores = re.findall(r"\|bridge *\|[↑ ]*\| *([0-9.]+)\|", printed)
    plain, golden = map(float, scores)
    assert plain == 0.0 and golden >= 0.5


def test_inspect_tells_the_preset_from_the_plain_model(
    url: str, tmp_path: Path
) -> None:
    path = program_path("inspect")
    make_preset(url)
    (code,) = blocks("Inspect", "bash")
    printed = bash(
        code.replace(HERE, url), PATH=path, INSPECT_LOG_DIR=str(tmp_path), NO_COLOR="1"
    )
    print(printed)
    plain, golden = map(float, re.findall(r"accuracy[: ]+([0-9.]+)", printed))
    assert plain < 0.2 and golden > 0.8
