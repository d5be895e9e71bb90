"""The page at /: a playground over the public interface, in files that this server has itself.

Invariant: the page loads nothing from elsewhere and may ask no other server, and it is told so
before a script of it runs. It knows no more than any client: keys are asked for under /v1 alone.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePath

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = "page"
INDEX = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            # blob: pictures that were chosen, as the page shows them
            "img-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for each time, so that a newer server is not met by an older one's page.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    kind: str
    tag: str  # changes with the content

    @classmethod
    def read(cls, file: Traversable) -> "PageFile":
        """Return a file of this package."""
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return cls(content, KINDS[PurePath(file.name).suffix], f'"{digest[:16]}"')

    async def answer(self, request: Request) -> Response:
        """Return it, or only that it is still the same."""
        headers = HEADERS | {"ETag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.kind)


def page_files() -> dict[str, PageFile]:
    """Return the page's files by their addresses. What the page itself says of addresses is
    relative, so that it also works where a proxy puts the server below a path."""
    folder = resources.files(__package__) / FOLDER
    files = {}
    for file in folder.iterdir():
        # what an editor leaves beside them is not the page's
        if PurePath(file.name).suffix in KINDS:
            files[f"/{FOLDER}/{file.name}"] = PageFile.read(file)
    files["/"] = files.pop(f"/{FOLDER}/{INDEX}")
    return files


def add_playground(app: FastAPI, files: Mapping[str, PageFile]) -> None:
    """Give an application the page."""
    for path, file in files.items():
        app.add_route(path, file.answer, methods=["GET", "HEAD"], include_in_schema=False)
