# SPDX-License-Identifier: Apache-2.0
"""Make PyPI's torchvision importable with a CPU build of torch.

vLLM imports torchvision for multimodal models. PyPI has only a build for CUDA. Its
compiled operators do not load with `torch==…+cpu`, so the file that registers their
shapes cannot be imported. vLLM's model classes do not use these operators. This script
replaces the file by an empty one. PyTorch's own index has builds that match
(`--extra-index-url https://download.pytorch.org/whl/cpu`) and need none of this.

    uv pip install --target DIR --no-deps torchvision==0.28.0
    python tools/stub_torchvision.py DIR
    PYTHONPATH=DIR …
"""

from __future__ import annotations

import argparse
from pathlib import Path

STUB = '"""Empty: see tools/stub_torchvision.py of vllm-steering."""\n'


def stub(site: Path) -> Path:
    """Empty the file that fails; its path.

    Raises:
        FileNotFoundError: `site` holds no torchvision.
    """
    path = site / "torchvision" / "_meta_registrations.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected torchvision under {site}")
    # A package manager may share the file between environments: replace, not write.
    path.unlink()
    path.write_text(STUB)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="directory that holds torchvision")
    print(f"emptied {stub(parser.parse_args().site)}")


if __name__ == "__main__":
    main()
