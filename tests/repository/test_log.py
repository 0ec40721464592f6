"""docs/log.md: every entry begins with its result in one bold sentence, and the index at the top repeats it."""

from __future__ import annotations

import re
from pathlib import Path

LOG = Path(__file__).resolve().parents[2] / "docs" / "log.md"


def test_the_index_names_every_entry_with_its_result() -> None:
    text = LOG.read_text(encoding="utf-8").split("```\n", 2)[2]  # after the example of an entry
    indexed = re.findall(r"(?m)^\| (\d{4}-\d\d-\d\d) \| \[(.+)\]\(#(.+)\) \| (.+) \|$", text)
    entries = re.findall(r"(?m)^## (\d{4}-\d\d-\d\d)  (.+)\n\n\*\*(.+)\*\*$", text)
    assert len(entries) == len(re.findall(r"(?m)^## ", text)), "an entry without its date, title or bold result line"
    anchors = [re.sub(r"[^\w\- ]", "", f"{date}  {title}".lower()).replace(" ", "-") for date, title, _ in entries]
    expected = [(date, title, anchor, result) for (date, title, result), anchor in zip(entries, anchors)]
    assert indexed == expected
    assert [date for date, *_ in entries] == sorted((date for date, *_ in entries), reverse=True), "newest first"
