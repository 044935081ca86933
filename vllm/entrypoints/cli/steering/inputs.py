# SPDX-License-Identifier: Apache-2.0
"""What commands are given, checked before an engine starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vllm.config.steering import ModuleInfo


def quiet_engine() -> None:
    """Let the engine print errors only, unless VLLM_LOGGING_LEVEL says otherwise.

    Its log would go where the command's result goes.
    """
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        # The engine reads the variable again; what runs before it has read it already.
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)


def read_text(option: str, file: str) -> str:
    """The content of a UTF-8 file.

    Raises:
        ValueError: it cannot be read; the message names the option and the file.
    """
    try:
        # A byte order mark is not a part of the text.
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option} {file}: found no UTF-8 at byte {error.start}, expected a UTF-8 "
            "text"
        ) from None
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror}") from None


def need_sae(path: str, module: ModuleInfo) -> None:
    """Raise `ValueError` for a module of steering vectors."""
    if module.kind != "sae":
        raise ValueError(f"{path}: found steering vectors, expected an SAE")


def texts_of(option: str, file: str) -> list[str]:
    """The texts of a UTF-8 file: paragraphs, or lines where there is one paragraph.

    Raises:
        ValueError: it cannot be read, or has no text.
    """
    content = read_text(option, file)
    paragraphs = [part.strip() for part in content.split("\n\n") if part.strip()]
    if len(paragraphs) == 1:
        lines = [line.strip() for line in paragraphs[0].splitlines()]
        paragraphs = [line for line in lines if line]
    if not paragraphs:
        raise ValueError(f"{option} {file}: expected at least one text, found none")
    return paragraphs


def check_model_path(model: str) -> None:
    """Raise `ValueError` for a path that is no model, before vLLM takes it for a name.

    A name of the Hugging Face Hub is not looked up here.
    """
    place = Path(model).expanduser()
    looks_local = model.startswith(("/", ".", "~")) or model.count("/") > 1
    if place.is_dir() and not (place / "config.json").is_file():
        found = "a directory without config.json"
    elif place.exists() and not place.is_dir() and place.suffix != ".gguf":
        found = "a file"
    elif looks_local and not place.exists():
        found = "no such directory"
    else:
        return
    raise ValueError(
        f"--model {model}: found {found}, expected the directory of a model, or a name "
        "on the Hugging Face Hub such as google/gemma-2-2b"
    )
