# SPDX-License-Identifier: Apache-2.0
"""`/steering/`: the playground, a static page that uses the server's own routes.

The page holds no data and no key, so loading it needs no key. Its requests are
authenticated like any other.
"""

from __future__ import annotations

from os import PathLike, stat_result
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PATH = "/steering"
# Resolved, because the files of a development install are symbolic links.
FOLDER = Path(__file__).resolve().parent / "static"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
        "form-action 'self'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Playground(StaticFiles):
    """The files of the page, which may load nothing from other hosts."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True)

    def get_path(self, scope: Scope) -> str:
        """The path below `PATH`, also where a proxy has removed `--root-path`.

        Starlette takes a mounted path to begin with the root path.
        """
        root = scope.get("root_path", "")
        if not scope["path"].startswith(root):
            scope = {**scope, "root_path": PATH}
        return super().get_path(scope)

    def file_response(
        self,
        full_path: str | PathLike[str],
        stat_result: stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        return response


async def to_page(request: Request) -> Response:
    """Redirect to the page, relative to the path that the browser has."""
    return RedirectResponse(f".{PATH}/")
