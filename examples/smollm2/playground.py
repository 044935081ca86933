# SPDX-License-Identifier: Apache-2.0
"""Serve SmolLM2 with its SAE, a vector and the playground.

The page is http://localhost:8000/steering/

python examples/smollm2/playground.py [further options of `vllm serve`]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import checkpoint

SAE = Path(__file__).parent / "sae"
VECTOR = Path(__file__).parent / "cheerful.safetensors"


def command(model: Path, further: list[str]) -> list[str]:
    """The command line of the server."""
    options = [
        "--served-model-name", "SmolLM2-135M-Instruct", "--max-model-len", "2048",
        "--max-num-seqs", "32", "--kv-cache-memory-bytes", "512M", "--enforce-eager",
        "--steering-modules", f"smollm2={SAE}", f"cheerful={VECTOR}",
        *further,
    ]  # fmt: skip
    module = "vllm.entrypoints.cli.main"
    return [sys.executable, "-m", module, "serve", str(model), *options]


def main() -> None:
    """Become the server."""
    try:
        model = checkpoint.prepare()
    except checkpoint.Unavailable as error:
        sys.exit(f"{error}\nServe a model of your own: docs/features/playground.md.")
    os.environ.setdefault("VLLM_PLUGINS", "steering")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    further = sys.argv[1:]
    port = further[further.index("--port") + 1] if "--port" in further[:-1] else "8000"
    print(
        f"When the log says `Application startup complete`, in about a minute, open "
        f"http://localhost:{port}/steering/",
        flush=True,
    )
    run = command(model, further)
    os.execv(run[0], run)


if __name__ == "__main__":
    main()
