# SPDX-License-Identifier: Apache-2.0
"""OpenAI's form of an error."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from vllm.config.steering_json import Json


def error_response(
    status: int,
    kind: str,
    message: str,
    field: str | None,
    headers: Mapping[str, str] | None = None,
    **more: object,
) -> JSONResponse:
    """An answer that refuses a request.

    Args:
        status: of HTTP.
        kind: the error's `type`.
        message: what was found, and what would be accepted.
        field: the path of the field that it is about.
        headers: of the answer.
        more: further keys of the error.
    """
    error: Json = {"message": message, "type": kind, "param": field, "code": status}
    return JSONResponse({"error": {**error, **more}}, status, headers)
