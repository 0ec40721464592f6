"""The report of prepared data, one self-contained page: where rows went, what is in the shards, samples of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_prep.checks.measure import measure_split
from data_prep.filters import REASONS
from data_prep.manifest import Manifest, ManifestError, Shard, read_manifest, write_atomically
from data_prep.passport import HISTOGRAMS, PASSPORT, STAGES
from data_prep.reporting.charts import histogram, stacked_bar
from data_prep.reporting.contact_sheet import Picture, Repeated, contact_sheet, repeated_images
from data_prep.shard_writer import describe_counts

REPORT_NAME = "report.html"
_SHARDS_SHOWN, _REPEATED_SHOWN = 200, 8
_MAX_BARS = 41
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_FIGURES = {
    "caption_words": ("Words of a caption", "captions"),
    "shorter_side": ("Shorter side in pixels", "images"),
    "aspect": ("Longer over shorter side", "images"),
    "image_bytes": ("Bytes of an image", "images"),
}


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Split:
    """What the page shows of a split."""

    name: str
    tiles: list[tuple[str, str]]
    stages: dict[str, Any]
    reasons: list[dict[str, Any]]
    figures: list[Figure]
    hosts: list[dict[str, Any]]
    sheet: list[Picture]
    repeated: list[Repeated] | None
    files: list[tuple[str, Any, str]]
    shards: list[Shard]
    num_shards: int
    provenance: str


def write_report(
    split_dirs: Sequence[Path], output: Path, num_samples: int, seed: int, find_repeated: bool, workers: int
) -> None:
    """Write the page of these splits to ``output``; raises ManifestError for one that is missing or damaged.

    Counts are those of the passports; a split that was prepared without one is read through for them.
    """
    splits = [_describe(split_dir, num_samples, seed, find_repeated, workers) for split_dir in split_dirs]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number)
    title = ", ".join(dict.fromkeys(split.name.partition("/")[0] for split in splits))
    write_atomically(output, environment.get_template("corpus.html.j2").render(title=title, splits=splits))


def _describe(split_dir: Path, num_samples: int, seed: int, find_repeated: bool, workers: int) -> Split:
    manifest = read_manifest(split_dir)
    try:
        passport = manifest.provenance.get(PASSPORT) or measure_split(split_dir, manifest, workers).as_json()
        return Split(
            name=f"{manifest.corpus}/{manifest.split}",
            tiles=_tiles(manifest, passport),
            stages=_stages(passport),
            reasons=_reasons(passport),
            figures=[_figure(name, passport[name]) for name in HISTOGRAMS if passport[name]["bins"]],
            hosts=_hosts(passport),
            sheet=contact_sheet(split_dir, manifest, num_samples, seed),
            repeated=repeated_images(split_dir, manifest, workers, _REPEATED_SHOWN) if find_repeated else None,
            files=_files(manifest),
            shards=list(manifest.shards.among(range(min(_SHARDS_SHOWN, len(manifest.shards))))),
            num_shards=len(manifest.shards),
            provenance=_options(manifest),
        )
    except _UNREADABLE as error:
        if isinstance(error, ManifestError):
            raise
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ManifestError(
            f"{split_dir}: can't be described ({found}); `python -m data_prep doctor --decode` says what is damaged"
        ) from error


def _tiles(manifest: Manifest, passport: dict[str, Any]) -> list[tuple[str, str]]:
    rows = passport["rows"]
    return [
        (number(manifest.rows), "rows (image and caption)"),
        (number(manifest.samples), "samples"),
        (number(passport["images"]), "clips" if manifest.is_video else "images"),
        (f"{sum(manifest.shards.bytes.tolist()) / 2**20:,.1f}", f"MiB in {len(manifest.shards)} shards"),
        (share(rows["written"], rows["read"]), f"of {number(rows['read'])} rows read were written"),
        *[(number(count), f"as .{extension}") for extension, count in passport["formats"].items()],
    ]


def _stages(passport: dict[str, Any]) -> dict[str, Any]:
    rows = passport["rows"]
    words = {"source": "rejected before download", "download": "not downloaded", "filters": "rejected by a filter"}
    counts = [("written", rows["written"]), *((words[stage], rows[f"rejected_by_{stage}"]) for stage in STAGES)]
    return {"bar": stacked_bar("Rows", *zip(*counts)), "counts": counts}


def _reasons(passport: dict[str, Any]) -> list[dict[str, Any]]:
    read = passport["rows"]["read"]
    ordered = sorted(passport["rejected"].items(), key=lambda one: (-one[1]["rows"], one[0]))
    return [
        {
            "name": reason,
            "rows": one["rows"],
            "share": share(one["rows"], read),
            "meaning": REASONS.get("http_NNN" if reason.startswith("http_") else reason, ""),
            "example": one["example"],
        }
        for reason, one in ordered
    ]


def _figure(name: str, counted: dict[str, Any]) -> Figure:
    """The bins from the first that holds something to the last."""
    edges = [f"{edge:g}" for edge in HISTOGRAMS[name]]
    used = [place for place, edge in enumerate(edges) if edge in counted["bins"]]
    shown = edges[used[0] : used[-1] + 1]
    counts = [counted["bins"].get(edge, 0) for edge in shown]
    if len(shown) > _MAX_BARS:  # those after it are wider, and would look like peaks
        shown, counts = shown[:_MAX_BARS], [*counts[: _MAX_BARS - 1], sum(counts[_MAX_BARS - 1 :])]
    title, of = _FIGURES[name]
    note = f"{number(counted['min'])} to {number(counted['max'])}"
    if "sum" in counted:
        note += f", {number(counted['sum'] / sum(counts))} on average"
    labels = list(shown)
    if name == "image_bytes":
        labels = [_size(int(HISTOGRAMS[name][edges.index(edge)])) for edge in shown]
    labels[-1] += "+" if used[-1] > edges.index(shown[-1]) or used[-1] == len(edges) - 1 else ""
    note += f"; {number(sum(counts))} {of}; a bar begins at its label"
    return Figure(title, note, histogram(title, labels, counts))


def _size(count: int) -> str:
    """A power of two of bytes, short."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if count >= size:
            return f"{count // size}{unit}"
    return str(count)


def _hosts(passport: dict[str, Any]) -> list[dict[str, Any]]:
    rest = passport["other_hosts"]
    named = list(passport["hosts"].items())
    named += [(f"{number(rest['hosts'])} others", rest)] if rest["hosts"] else []
    return [
        {
            "name": host,
            "rows": (rows := one["written"] + sum(one["rejected"].values())),
            "written": one["written"],
            "share": share(one["written"], rows),
            "lost": describe_counts(one["rejected"]) if one["rejected"] else "",
        }
        for host, one in named
    ]


def _files(manifest: Manifest) -> list[tuple[str, Any, str]]:
    """Name, bytes and SHA-256 of the source files as a manifest has them, older ones without bytes."""
    files = manifest.provenance.get("arguments", {}).get("files", {})
    facts = ((name, one if isinstance(one, dict) else {"sha256": one}) for name, one in dict(files).items())
    return [(str(name), one.get("bytes"), str(one.get("sha256", ""))) for name, one in facts]


def _options(manifest: Manifest) -> str:
    shown = {name: value for name, value in manifest.provenance.items() if name != PASSPORT}
    return json.dumps({**shown, "fingerprint": manifest.fingerprint()}, indent=1, ensure_ascii=False)


def number(value: Any) -> str:
    """A number for people: thousands apart, at most two digits after the point."""
    if not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}"


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
