"""Two network namespaces of this machine that act as two nodes, joined by one cable."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_CLONE_NEWNS, _CLONE_NEWNET, _MS_REC_PRIVATE = 0x00020000, 0x40000000, 0x4000 | 0x40000  # linux/sched.h, linux/mount.h


@dataclass(frozen=True)
class Nodes:
    """Names of the namespaces and the addresses of the two nodes, reachable from each other alone."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def enter(self, node: int) -> None:
        """Move this process to a node; it keeps its files."""
        with open(f"/run/netns/{self.names[node]}") as namespace:
            _call("setns", namespace.fileno(), _CLONE_NEWNET)

    def cut(self) -> None:
        """Pull the cable: nothing gets through any more, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", "cable", "down")


def hide(folder: Path) -> None:
    """Mount an empty folder over one, for this process alone."""
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, _MS_REC_PRIVATE, None)
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", 0, None)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Skips the test, with the reason, where this machine lets nobody make namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: the command `ip` (iproute2) is not installed")
    names = (f"openflm-{os.getpid()}-0", f"openflm-{os.getpid()}-1")
    addresses = ("10.213.7.1", "10.213.7.2")
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
    except subprocess.CalledProcessError as error:
        _remove(names)
        pytest.skip(f"no network namespaces on this machine: {error.stderr.strip()}")
    try:
        yield Nodes(names, addresses)
    finally:
        _remove(names)


def _remove(names: tuple[str, str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
