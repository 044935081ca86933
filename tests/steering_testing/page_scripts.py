# SPDX-License-Identifier: Apache-2.0
"""Runs the playground's scripts in Node.js, with a stand-in for the browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from vllm.entrypoints.serve.steering.playground import FOLDER

BROWSER = Path(__file__).with_name("browser.js")


def run_in_node(folder: Path, script: str, answers: dict[str, Any]) -> Any:
    """What a script prints as JSON; it stands beside the page's own.

    Args:
        folder: an empty directory.
        script: a module's text; `asked` lists the calls, `await settled()` waits for
            what they answer, and `$` finds an element.
        answers: the server's JSON by the beginning of the path.
    """
    target = folder / "page"
    shutil.copytree(FOLDER, target)
    (target / "package.json").write_text('{"type": "module"}')
    selects = ["module", "site", "shade", "sweep-feature", "sweep-tier"]
    given = {"ANSWERS": answers, "SELECTS": selects}
    lines = [f"export const {name} = {json.dumps(own)};" for name, own in given.items()]
    (target / "given.js").write_text("\n".join(lines))
    shutil.copy(BROWSER, target)
    (target / "main.js").write_text(f'import "./browser.js";\n{script}')
    done = subprocess.run(
        ["node", "main.js"], cwd=target, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
