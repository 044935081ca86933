# SPDX-License-Identifier: Apache-2.0
"""What `/openapi.json` says of the steering routes.

The routes read bodies and queries with parsers of their own, whose errors name the
field. So FastAPI does not see what they take.
"""

from __future__ import annotations

from vllm.config.steering_json import Json

_ERROR: Json = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"type": "integer"},
                "in_use": {"type": "integer"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ERROR_CONTENT = {"application/json": {"schema": _ERROR}}
_STATUSES = {
    400: "A bad field, named in `param`.",
    401: "No steering key, or a wrong one.",
    403: "No steering key is configured, or the path is outside `module_roots`.",
    404: "No such module, preset or file.",
    408: "The caller disconnected.",
    409: "Not now: the name is taken, the module is in use, no slot fits, another "
    "change is under way, the engine is asleep, a file beside the module is broken, "
    "or the server was started without steering.",
    413: "The body is too large.",
    500: "A rank failed; nothing was changed.",
    503: "The server is shutting down; nothing was changed.",
}


def errors(*statuses: int) -> dict[int | str, Json]:
    """The answers of a route that are errors. Every route asks the engine: 503."""
    return {
        status: {"description": _STATUSES[status], "content": _ERROR_CONTENT}
        for status in (*statuses, 503)
    }


def takes(schema: Json) -> Json:
    """A route with a JSON body."""
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def asks(**parameters: tuple[str, Json]) -> Json:
    """A route with query parameters, each a description and a schema."""
    return {
        "parameters": [
            {"name": name, "in": "query", "description": text, "schema": schema}
            for name, (text, schema) in parameters.items()
        ]
    }
