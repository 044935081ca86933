# SPDX-License-Identifier: Apache-2.0
"""Files and output of the commands that run a model."""

from __future__ import annotations

import logging
import os
from pathlib import Path


def read_text(option: str, file: str) -> str:
    """The content of a UTF-8 file.

    Raises:
        ValueError: it cannot be read; the message names the option and the file.
    """
    try:
        # A byte order mark is not a part of the text.
        return Path(file).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option} {file}: byte {error.start} is not UTF-8, expected UTF-8 text"
        ) from None
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror}") from None


def quiet_log() -> None:
    """Keep the engine's log, but for errors, out of what a command prints.

    `VLLM_LOGGING_LEVEL` in the environment wins.
    """
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        # The engine reads the variable again; what runs before it has read it already.
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)
