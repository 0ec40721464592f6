"""What a verb would do, printed without writing anything: rows, reasons, expected yield, disk and hours."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from data_prep.annotations.annotated import AnnotatedSplit
from data_prep.annotations.published import compare
from data_prep.image_places import open_places
from data_prep.options.shared import positive_rate
from data_prep.record import Record, Rejection, UrlRow
from data_prep.shard_writer import describe_counts
from data_prep.sources.expectations import REPORTED_YIELDS, expected_bytes, expected_time, in_words

_MAX_HOSTS = 200_000  # kept at a time; beyond, the rarer half is forgotten, so that shown counts may be too low


def add_dry_run(parser: argparse.ArgumentParser, rate: float = 100) -> None:
    """``rate``: images a second that the hours are counted with."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument(
        "--images-per-second", type=positive_rate, default=rate, help="for the time that --dry-run says"
    )


class Counted:
    """Counts the rows that go through it: ``images``, ``captions``, ``rejected`` by reason, ``hosts``."""

    def __init__(self, rows: Iterable[UrlRow | Rejection]) -> None:
        self._rows = rows
        self.images = self.captions = 0
        self.rejected: Counter[str] = Counter()
        self.hosts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[UrlRow | Rejection]:
        for row in self._rows:
            if isinstance(row, Rejection):
                self.rejected[row.reason] += row.rows
            else:
                self.images += 1
                self.captions += len(row.captions)
                self.hosts[_host(row.url)] += 1
                if len(self.hosts) > _MAX_HOSTS:
                    self.hosts = Counter(dict(self.hosts.most_common(_MAX_HOSTS // 2)))
            yield row

    @property
    def rows(self) -> int:
        """Captions read, whether usable or not."""
        return self.captions + self.rejected.total()

    def counts(self, corpus: str, split: str) -> str:
        """The number of rows beside the published one."""
        return f"{corpus} {split}: {compare(corpus, split, {'rows': self.rows})}"


def plan_download(args: argparse.Namespace, corpus: str, published: str, rows: Iterable[UrlRow | Rejection]) -> int:
    """Print what downloading ``rows`` would be; ``published`` is the split's name among the published counts."""
    counted = Counted(rows)
    for _ in counted:
        pass
    print(counted.counts(corpus, published))
    print(f"usable: {counted.images:,} images with {counted.captions:,} captions; unusable rows: ", end="")
    print(describe_counts(counted.rejected))
    reported = REPORTED_YIELDS.get(corpus, ())
    for one in reported:
        print(f"yield reported: {one.share:.1%} ({one.when}; {one.source})")
    expected = counted.images * (reported[0].share if reported else 1)
    note = "the latest of these; an expectation, links rot" if reported else "no yield is known of this corpus: at most"
    print(f"images expected: {expected:,.0f} ({note})")
    _print_disk(args.image_size, expected, "the originals need room besides while they are downloaded")
    time = expected_time(counted.images, args.images_per_second)
    print(f"time: {time} at {args.images_per_second:g} downloads/s (--images-per-second)")
    common = ", ".join(f"{host} {count:,}" for host, count in counted.hosts.most_common(5))
    print(f"hosts: {len(counted.hosts):,}; most often {common or 'none'}")
    return _end(args.output / args.split)


def plan_images(args: argparse.Namespace, parts: Iterable[tuple[Path, AnnotatedSplit, Sequence[Path]]]) -> int:
    """Print what writing the splits would be, ``(split folder, split, folders and archives)`` each; their files are
    looked for, not opened."""
    split_dir = None
    for split_dir, annotated, places in parts:
        rejected: Counter[str] = Counter()
        for problem in annotated.problems:
            rejected[problem.reason] += problem.rows
        found = captions = size = 0
        with open_places(places) as opened:
            for image in annotated.images:
                files = [opened.find(names) for names in image.images] if places else []
                if None in files:
                    rejected["missing_video" if annotated.videos else "missing_image"] += len(image.captions)
                    continue
                found, captions = found + 1, captions + len(image.captions)
                size += sum(file.size for file in files if file is not None)
        _print_found(args, split_dir, found, captions, size if places else None, rejected)
    assert split_dir is not None
    return _end(split_dir)


def plan_records(args: argparse.Namespace, split_dir: Path, source: Iterable[Record | Rejection]) -> int:
    """Print what writing the records of a source would be; each is read, none is decoded."""
    rejected: Counter[str] = Counter()
    found = captions = size = 0
    for item in source:
        if isinstance(item, Rejection):
            rejected[item.reason] += item.rows
        else:
            found, captions = found + 1, captions + len(item.captions)
            size += sum(map(len, item.images)) + len(item.video or b"")
    _print_found(args, split_dir, found, captions, size, rejected)
    return _end(split_dir)


def _print_found(
    args: argparse.Namespace, split_dir: Path, found: int, captions: int, size: int | None, rejected: Counter[str]
) -> None:
    """``size``: bytes of the images or clips; None where they were not looked for."""
    print(f"{split_dir}: {found:,} samples with {captions:,} texts; unusable rows: {describe_counts(rejected)}")
    if size is None:
        print("disk: not known, as no folder or archive of them is named; none was looked for")
    elif getattr(args, "image_size", None) is None:
        print(f"disk: {in_words(size)}, their bytes as they are")
    else:
        _print_disk(args.image_size, found, f"at most their {in_words(size)} now")
    time = expected_time(found, args.images_per_second)
    print(f"time: {time} at {args.images_per_second:g} samples/s (--images-per-second)")


def _print_disk(image_size: int | None, samples: float, further: str) -> None:
    if image_size is None:
        print("disk: not known, as the bytes stay as they come; --image-size N bounds it")
        return
    size = in_words(expected_bytes(samples, image_size))
    print(f"disk: about {size} at --image-size {image_size} (0.39 bytes a pixel, measured on photographs); {further}")


def _end(split_dir: Path) -> int:
    there = "is there already, --overwrite would replace it" if split_dir.exists() else "is not there yet"
    print(f"{split_dir} {there}; nothing was written")
    return 0


def _host(url: str) -> str:
    place = re.split("[/?#]", url.partition("//")[2], maxsplit=1)[0].rpartition("@")[2]
    try:
        return (urlsplit(url).hostname if "[" in place else place.partition(":")[0].lower()) or "none"
    except ValueError:
        return "unreadable"
