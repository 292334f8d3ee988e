"""The dashboard's page: files as they are, that load nothing from elsewhere."""

from functools import partial
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

FILES = {
    "/dashboard": ("page.html", "text/html"),
    "/dashboard/style.css": ("style.css", "text/css"),
    "/dashboard/page.js": ("page.js", "text/javascript"),
}
"""The page asks for the key, if there is one, and sends it as all clients do: the page itself needs
none, and the key is in no address."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Let the application answer with the page's files."""
    folder = Path(__file__).parent
    for path, (name, kind) in FILES.items():
        content = (folder / name).read_bytes()
        app.add_api_route(path, partial(_file, content, kind), include_in_schema=False)


def _file(content: bytes, kind: str) -> Response:
    return Response(content, headers=_HEADERS, media_type=f"{kind}; charset=utf-8")
