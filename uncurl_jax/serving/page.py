"""The web page at /: one file, nothing fetched from elsewhere, no template."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import NamedTuple


class Page(NamedTuple):
    """The page and how it is sent.

    Attributes:
      html: the file.
      headers: a content security policy that permits its own script and style, by their hashes,
        and requests to this server; and no framing.
    """

    html: bytes
    headers: dict[str, str]


def load_page() -> Page:
    """Reads the page from the package."""
    html = resources.files("uncurl_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'",
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    headers = {"content-security-policy": "; ".join(policy), "cache-control": "no-store"}
    return Page(html.encode(), headers)


def _hashes(html: str, tag: str) -> str:
    """Returns the CSP sources of the contents of all elements of a kind."""
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        for content in re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    )
