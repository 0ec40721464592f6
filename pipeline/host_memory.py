"""How this process asks the system for memory, which training on a CPU feels."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Keeps freed blocks in the process instead of giving them back: large activations are not faulted in anew.

    A step allocates and frees the same gigabytes again and again; by default glibc maps each large block afresh, and
    every page of it costs a fault. Returns False where the C library is not glibc, which then keeps its own rules.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
