"""How the downloader behaves towards the servers of others."""

from __future__ import annotations

from dataclasses import dataclass

USER_AGENT = "openflm-data-prep/0.1"
DISALLOW = ("noai", "noimageai", "noindex", "noimageindex")


@dataclass(frozen=True)
class Courtesy:
    """``per_host`` connections at a time to one host from one process, ``host_interval`` seconds at least between two
    of them; ``max_wait`` seconds at most of waiting that a server may ask for (Retry-After); ``disallow``: directives
    of a server that are obeyed."""

    user_agent: str = USER_AGENT
    disallow: tuple[str, ...] = DISALLOW
    per_host: int = 8
    host_interval: float = 0.0
    max_wait: float = 60.0

    def headers(self) -> dict[str, str]:
        """Headers of every request; the formats that are read come first, for servers that offer a choice."""
        accept = "image/jpeg, image/png, image/webp, image/gif, image/bmp;q=0.8, image/tiff;q=0.8, */*;q=0.1"
        return {"User-Agent": self.user_agent, "Accept": accept}
