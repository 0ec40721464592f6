"""Finds in a page what the Nu validator and screen readers stumble over; for tests of pages."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "image", "use", "path", "rect", "col"}
SELF_CLOSING = {"image", "use", "path", "rect"}  # of SVG: may be closed by "/>" or by an end tag


class Markup(HTMLParser):
    """``faults`` in the order of the page, none where it is fine."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.ids: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._level, self._references, self._labelled, self._rows = 0, [], set(), []
        self._text = ""
        if not html.lower().startswith("<!doctype html>"):
            self.faults.append("no doctype")
        self.feed(html)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag, _ in self._open]
        self.faults += [f"id {one!r} twice" for one in sorted({one for one in self.ids if self.ids.count(one) > 1})]
        self.faults += [f"nothing has the id {one!r}" for one in self._references if one not in self.ids]
        self.faults += [f"<input> {one} has no label" for one in self._labelled]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()
        elif self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        names = [name for name, _ in attributes]
        self.faults += [f"<{tag}> has {name} twice" for name in set(names) if names.count(name) > 1]
        if "id" in found:
            self.ids.append(found["id"] or "")
            if not found["id"] or re.search(r"\s", found["id"]):
                self.faults.append(f"id {found['id']!r}")
        for name in ("href", "for"):
            if (found.get(name) or "").startswith("#") or name == "for" and name in found:
                self._references.append((found[name] or "").removeprefix("#"))
        self._check(tag, found)
        if tag not in VOID or tag in SELF_CLOSING and self.get_starttag_text()[-2:] != "/>":
            self._open.append((tag, found))

    def _check(self, tag: str, found: dict[str, str | None]) -> None:
        hidden = found.get("aria-hidden") == "true" or any(a.get("aria-hidden") == "true" for _, a in self._open)
        if tag == "img" and not (found.get("alt") or "").strip():
            self.faults.append("<img> without a text in its place")
        if tag == "svg" and not hidden and (found.get("role") != "img" or not (found.get("aria-label") or "").strip()):
            self.faults.append("<svg> without role or name")
        if tag in ("metadata", "rdf:rdf"):
            self.faults.append(f"<{tag}>, which HTML does not have")
        if re.fullmatch("h[1-6]", tag):
            if int(tag[1]) > self._level + 1:
                self.faults.append(f"<{tag}> after a heading of level {self._level}")
            self._level = int(tag[1])
        if tag == "table":
            self._rows = []
        if tag == "th" and found.get("scope") not in ("col", "row", "colgroup", "rowgroup"):
            self.faults.append("<th> that does not say of what it is the head")
        if tag in ("article", "section") and not (tag == "section" and found.get("aria-label")):
            self.faults.append(f"<{tag}> without a heading or name")
        if tag == "input":
            self._labelled.add(found.get("id"))
        if tag == "label":
            self._labelled.discard(found.get("for"))
        if found.get("tabindex") == "0" and not (found.get("role") and found.get("aria-label")):
            self.faults.append(f"<{tag}> takes the keyboard and has no name")
        if tag == "dd" and not any(one in ("dl", "div") for one, _ in self._open):
            self.faults.append("<dd> outside of a list")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID and tag not in SELF_CLOSING:
            return
        if not self._open or self._open[-1][0] != tag:
            self.faults.append(f"</{tag}> closes {self._open[-1][0] if self._open else 'nothing'}")
            return
        self._open.pop()
