"""The two pages of the server, each one HTML text without anything to load: the model's, and the list of endpoints."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("page")


def front_page() -> str:
    """page.html with its style and script inside."""
    text = (FOLDER / "page.html").read_text(encoding="utf-8")
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return text.replace("/* page.css */", style).replace("/* page.js */", script)


def docs_page(openapi: Mapping[str, Any]) -> str:
    """The endpoints of an OpenAPI description as a plain page."""
    text = (FOLDER / "docs.html").read_text(encoding="utf-8")
    return text.replace("<!-- endpoints -->", "\n".join(_endpoints(openapi)))


def policy(*pages: str) -> str:
    """The Content-Security-Policy that allows exactly the styles and scripts of ``pages`` (CSP level 3, hashes)."""
    sources = {
        tag: sorted({_hash(text) for page in pages for text in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)})
        for tag in ("style", "script")
    }
    rules = ["default-src 'none'", "img-src 'self' blob: data:", "connect-src 'self'", "base-uri 'none'"]
    rules += ["form-action 'none'", "frame-ancestors 'none'"]
    rules += [f"{tag}-src {' '.join(hashes)}" for tag, hashes in sources.items() if hashes]
    return "; ".join(rules)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _endpoints(openapi: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            yield f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2>"
            yield f"<p>{html.escape(operation.get('description', operation.get('summary', '')))}</p>"
            yield from _table(list(_inputs(operation)))
            yield "</section>"


def _inputs(operation: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of what an operation takes."""
    for one in operation.get("parameters", ()):
        yield one["name"], _type(one["schema"]), one.get("description", "")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        properties = content.get("schema", {}).get("properties", {})
        if not properties:
            yield "(body)", kind, "the picture itself; other fields stand in the query"
        for name, schema in properties.items():
            yield name, _type(schema), schema.get("description", "")


def _type(schema: Mapping[str, Any]) -> str:
    if schema.get("format") == "binary":
        return "file"
    return str(schema.get("type") or " or ".join(_type(one) for one in schema.get("anyOf", ())))


def _table(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    if not rows:
        return
    yield "<table><thead><tr><th>field</th><th>type</th><th>meaning</th></tr></thead><tbody>"
    for name, kind, meaning in rows:
        cells = f"<td><code>{html.escape(name)}</code></td><td>{html.escape(kind)}</td><td>{html.escape(meaning)}</td>"
        yield f"<tr>{cells}</tr>"
    yield "</tbody></table>"
