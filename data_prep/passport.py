"""What a split is made of, counted while it is written: rows at each stage, hosts, captions, sizes and formats."""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from data_prep.images import ImageProblem, image_problems
from data_prep.manifest import file_sha256
from data_prep.record import Record, Rejection

PASSPORT = "passport"  # its place in a manifest's provenance
STAGES = ("source", "download", "filters")  # where a row can be rejected, in this order
TOP_HOSTS = 20
HISTOGRAMS = {  # what is counted -> the lower edges of its bins; the last bin has no upper edge
    "caption_words": (*range(41), 45, 50, 60, 80, 100, 150, 200),
    "shorter_side": (1, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096),
    "aspect": (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.5, 3, 4, 6, 10, 20),
    "image_bytes": (0, *(2**power for power in range(10, 29))),
}
_KEY = re.compile("[A-Za-z0-9_-]+")
_HOST = re.compile(r"https?://[^\s]+", re.IGNORECASE)
_OF_TABLES = ("bad_url", "malformed_row", "empty_caption", "nul_in_caption", "invalid_utf8", "duplicate_id")
_STORED = ("JPEG", "PNG", "WEBP")
_MAX_SEGMENTS = 64  # of a JPEG before its frame


class Statistics:
    """Counts of the records and rejections of a split; equal input in equal order gives equal JSON.

    Memory grows with the number of hosts and reasons, not with that of rows.
    """

    def __init__(self) -> None:
        self.rows = self.samples = self.images = 0
        self.stages: Counter[str] = Counter()
        self.reasons: dict[str, list[Any]] = {}  # reason -> [rows, name of the first]
        self.hosts: dict[str, Counter[str]] = {}  # host -> rows by reason, "" for those that were written
        self._unnamed = 0  # hosts that ``from_json`` was told the sum of
        self._of_unnamed: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.histograms = {name: _Histogram(edges) for name, edges in HISTOGRAMS.items()}

    def add(self, record: Record) -> None:
        """Count a record as it is written: its images in the formats of ``record.extensions``, or its clip."""
        contents = record.images if record.video is None else (record.video,)
        rows = len(record.captions)
        self.rows += rows
        self.samples += 1
        self.images += len(contents)
        for caption in record.captions:
            self.histograms["caption_words"].add(len(caption.split()))
        for content, extension in zip(contents, record.extensions):
            self.formats[extension] += 1
            self.histograms["image_bytes"].add(len(content))
            size = picture_size(content) if record.video is None else record.meta.get("frame_size")
            if size is not None and min(size) > 0:
                self.histograms["shorter_side"].add(min(size))
                self.histograms["aspect"].add(max(size) / min(size))
        self._count_host(record.meta.get("url"), "", rows)

    def reject(self, rejection: Rejection) -> None:
        """Count what is not written; the stage is ``stage_of`` it."""
        self.stages[stage_of(rejection)] += rejection.rows
        counted = self.reasons.setdefault(rejection.reason, [0, rejection.name])
        counted[0] += rejection.rows
        found = _HOST.search(rejection.name)
        self._count_host(found and found[0], rejection.reason, rejection.rows)

    def merge(self, other: Statistics) -> None:
        """Add what another part of the split counted."""
        self.rows += other.rows
        self.samples += other.samples
        self.images += other.images
        self.stages += other.stages
        self.formats += other.formats
        for reason, (rows, example) in other.reasons.items():
            self.reasons.setdefault(reason, [0, example])[0] += rows
        for host, counts in other.hosts.items():
            self.hosts.setdefault(host, Counter()).update(counts)
        self._unnamed += other._unnamed
        self._of_unnamed.update(other._of_unnamed)
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])

    def forget_rejections(self) -> None:
        """Keep what is counted of rows that were written."""
        self.stages, self.reasons = Counter(), {}
        self.hosts = {host: Counter({"": counts[""]}) for host, counts in self.hosts.items() if counts[""]}
        self._of_unnamed = Counter({"": self._of_unnamed[""]})

    def _count_host(self, url: Any, reason: str, rows: int) -> None:
        if isinstance(url, str) and (host := host_of(url)):
            self.hosts.setdefault(host, Counter())[reason] += rows

    def as_json(self, top_hosts: int | None = TOP_HOSTS) -> dict[str, Any]:
        """The counts; None for ``top_hosts`` names all hosts, so that ``from_json`` gives all of it back."""
        rejected = {f"rejected_by_{stage}": self.stages[stage] for stage in STAGES}
        ordered = sorted(self.hosts, key=lambda host: (-self.hosts[host].total(), host))
        shown = ordered if top_hosts is None else ordered[:top_hosts]
        rest = Counter(self._of_unnamed)
        for host in ordered[len(shown) :]:
            rest.update(self.hosts[host])
        return {
            "rows": {"read": self.rows + self.stages.total(), **rejected, "written": self.rows},
            "samples": self.samples,
            "images": self.images,
            "formats": dict(sorted(self.formats.items())),
            "rejected": {
                reason: {"rows": rows, "example": example} for reason, (rows, example) in sorted(self.reasons.items())
            },
            "hosts": {host: _host_as_json(self.hosts[host]) for host in shown},
            "other_hosts": {"hosts": len(ordered) - len(shown) + self._unnamed, **_host_as_json(rest)},
            **{name: histogram.as_json() for name, histogram in self.histograms.items()},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Statistics:
        """What ``as_json`` gave; raises KeyError, TypeError or AttributeError for something else."""
        statistics = cls()
        rows = content["rows"]
        statistics.rows, statistics.samples, statistics.images = rows["written"], content["samples"], content["images"]
        statistics.stages = Counter({stage: rows[f"rejected_by_{stage}"] for stage in STAGES})
        statistics.formats = Counter(content["formats"])
        statistics.reasons = {reason: [one["rows"], one["example"]] for reason, one in content["rejected"].items()}
        for host, one in content["hosts"].items():
            statistics.hosts[host] = Counter({"": one["written"], **one["rejected"]})
        rest = content["other_hosts"]
        statistics._unnamed = rest["hosts"]
        statistics._of_unnamed = Counter({"": rest["written"], **rest["rejected"]})
        for name, histogram in statistics.histograms.items():
            histogram.take(content[name])
        return statistics


class _Histogram:
    """Numbers counted in bins of given lower edges, with the least and the largest, and their sum if all are int."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = [0] * len(edges)
        self._least: float | None = None
        self._largest: float | None = None
        self._sum = 0

    def add(self, value: float) -> None:
        self._counts[max(0, bisect_right(self._edges, value) - 1)] += 1
        if self._least is None or value < self._least:
            self._least = value
        if self._largest is None or value > self._largest:
            self._largest = value
        self._sum += value if isinstance(value, int) else 0  # a sum of floats would depend on the order

    def merge(self, other: _Histogram) -> None:
        self._counts = [mine + others for mine, others in zip(self._counts, other._counts)]
        bounds = [value for value in (self._least, other._least) if value is not None]
        self._least = min(bounds) if bounds else None
        bounds = [value for value in (self._largest, other._largest) if value is not None]
        self._largest = max(bounds) if bounds else None
        self._sum += other._sum

    def as_json(self) -> dict[str, Any]:
        """Bins that hold something: lower edge -> how many."""
        bins = {f"{edge:g}": count for edge, count in zip(self._edges, self._counts) if count}
        content = {"min": self._least, "max": self._largest, "bins": bins}
        return content | ({"sum": self._sum} if self._sum else {})

    def take(self, content: dict[str, Any]) -> None:
        self._counts = [content["bins"].get(f"{edge:g}", 0) for edge in self._edges]
        self._least, self._largest, self._sum = content["min"], content["max"], content.get("sum", 0)


def stage_of(rejection: Rejection) -> str:
    """Which of STAGES rejected it. Filters name a record by its key, sources by its place, such as "row 7: URL"."""
    if _KEY.fullmatch(rejection.name):
        return "filters"
    is_download = "://" in rejection.name and rejection.reason not in _OF_TABLES
    return "download" if is_download or rejection.reason == "lost_by_downloader" else "source"


def host_of(url: str) -> str:
    """The host of an address in small letters, without user and port; "" where there is none."""
    try:
        return urlsplit(url.strip()).hostname or ""
    except ValueError:
        return ""


def picture_size(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of a stored image by its header, nothing decoded; None where it has none."""
    size = _jpeg_size(content) if content.startswith(b"\xff\xd8") else None
    if size is not None:
        return size
    try:
        with image_problems(), Image.open(io.BytesIO(content), formats=_STORED) as image:
            return image.size
    except ImageProblem:
        return None


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Of a plain JPEG, in a tenth of the time that Pillow takes; None where Pillow must say. ITU T.81, B.2.2."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        head = content[position : position + 9]
        if len(head) < 9 or head[0] != 0xFF:
            return None
        if 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC):
            width, height = int.from_bytes(head[7:9]), int.from_bytes(head[5:7])
            return (width, height) if width and height else None
        position += 2 + int.from_bytes(head[2:4])
    return None


def source_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files that a split is made of, by name; of equal names with the folder before them."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        name = path.name if path.name not in found else f"{path.parent.name}/{path.name}"
        found[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return found


def _host_as_json(counts: Counter[str]) -> dict[str, Any]:
    return {"written": counts[""], "rejected": {reason: rows for reason, rows in sorted(counts.items()) if reason}}
