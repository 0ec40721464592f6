"""How this process asks the system for memory, which training on a CPU feels."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_KEPT = 32 << 20  # bytes; glibc refuses a higher threshold


def keep_freed_memory() -> bool:
    """Keeps freed blocks in the process instead of giving them back: large activations are not faulted in anew.

    A step allocates and frees the same gigabytes again and again; by default glibc gives them back at the step's end,
    and every page of the next step costs a fault. Blocks above ``LARGEST_KEPT`` are still mapped one by one: in the
    heap, small neighbours that stay would carve what each leaves behind, and a ZeRO bucket of 800 MB would need new
    room in every step, until the system refuses to fork. Returns False where the C library is not glibc, which then
    keeps its own rules.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, -1))


def available_bytes() -> int | None:
    """Memory that this process can still have: of the machine, and of the control group that limits it (v2).

    None where the system does not say.
    """
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
    """What a control group may still allocate; the page cache counts as free. None without a limit."""
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stats = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return max(limit - used + int(stats.get("inactive_file", 0)), 0)
