"""Addresses in object stores and on web servers, with those members of a path that reading prepared data needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_prep.stores.requests import StoreError, entries_of, lists_folders, read_whole, size_of


class Address:
    """An address like ``s3://bucket/cc3m``, where a ``Path`` may stand as well.

    Only what is asked here is asked of the store, each time anew. Methods raise StoreError when the store does not
    answer or refuses.
    """

    __slots__ = ("url",)

    def __init__(self, url: str) -> None:
        """Raises StoreError for what is no address, or names one store inside another (``A::B``)."""
        scheme, mark, rest = url.partition("://")
        if not mark or not scheme.isalnum() or "::" in url or not rest.strip("/"):
            raise StoreError(f"{url}: no address of a store, expected one like s3://BUCKET/FOLDER")
        self.url = f"{scheme.lower()}://{rest.rstrip('/')}"

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Address({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self.url == other.url

    def __lt__(self, other: Address) -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """The folder above; a bucket or host is above itself."""
        above, _, name = self.url.rpartition("/")
        return self if above.endswith(":/") or not name else Address(above)

    def resolve(self) -> Address:
        return self

    def is_file(self) -> bool:
        return size_of(self.url) is not None

    def is_dir(self) -> bool:
        """Whether anything lies below; taken for granted where a server does not list its folders."""
        return not lists_folders(self.url) or any(True for _ in entries_of(self.url))

    def exists(self) -> bool:
        return self.is_file() or (lists_folders(self.url) and self.is_dir())

    def iterdir(self) -> Iterator[Address]:
        """What lies in the folder; nothing where a server does not list its folders."""
        if lists_folders(self.url):
            yield from (self / name for name, _ in entries_of(self.url))

    def glob(self, pattern: str) -> Iterator[Address]:
        """What lies at ``pattern``: names and ``*`` for any name, divided by ``/``."""
        first, _, rest = pattern.partition("/")
        for one in self.iterdir() if first == "*" else [self / first]:
            if rest:
                yield from one.glob(rest)
            elif first == "*" or one.exists():
                yield one

    def read_bytes(self) -> bytes:
        """The whole content; raises FileNotFoundError where there is none."""
        return read_whole(self.url)


def data_path(text: str | Path | Address) -> Path | Address:
    """A path, or the address that ``text`` is; ``file://`` is a path. Raises StoreError."""
    if isinstance(text, Address) or "://" not in str(text):
        return text if isinstance(text, Address) else Path(text)
    if str(text).lower().startswith("file://"):
        return Path(unquote(urlsplit(str(text)).path))
    return Address(str(text))
