"""The status page: static files that come with the package, and headers that let a browser do nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Nothing but what we serve: no inline script or style, nothing from elsewhere, in nobody's frame.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file as it is served."""

    body: bytes
    headers: Mapping[str, str]


def load() -> dict[str, Page]:
    """All of them, by path; that of the page itself is `/`. Blocks."""
    found = {}
    for file in resources.files("orchestrator").joinpath("web").iterdir():
        kind = TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            found[path] = Page(file.read_bytes(), {"Content-Type": kind, **HEADERS})
    return found
