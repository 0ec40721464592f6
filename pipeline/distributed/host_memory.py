"""Tunes the C library's allocator for training on a CPU, and measures how much memory is available."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_KEPT = 32 << 20  # bytes; glibc refuses a higher threshold


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks in the process, which saves the page faults of allocating them again in each step.

    Blocks above ``LARGEST_KEPT`` are still mapped one by one: in the heap, small blocks beside a freed ZeRO bucket of
    800 MB would fragment it, and the address space would grow with every step. Returns False, without effect, where the
    C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, -1))


def available_bytes() -> int | None:
    """Bytes that this process can still allocate, by the machine and by its control groups (v2); None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        own = next(
            line.split("::", 1)[1]
            for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
            if line.startswith("0::")
        )
    except (OSError, ValueError, StopIteration):
        return None
    root = Path("/sys/fs/cgroup")
    folder = root / own.lstrip("/")
    while folder != root.parent:
        free = min(free, _left_in_group(folder) or free)
        folder = folder.parent
    return free


def _left_in_group(folder: Path) -> int | None:
    """Bytes that a control group may still allocate, page cache counted as free; None without a limit."""
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stats = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return max(limit - used + int(stats.get("inactive_file", 0)), 0)
