"""Freed memory stays in the process, and the process does not grow."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

COUNT_FAULTS = """
import ctypes, resource, sys
from pipeline.distributed.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
MIB = 2**20
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 * MIB) for _ in range(16)]
    for block in blocks:
        libc.memset(block, 1, 8 * MIB)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for _ in range(10)][5:]))
"""

GROW = """
from pathlib import Path
from pipeline.distributed.host_memory import keep_freed_memory
assert keep_freed_memory()
import torch
MIB = 2**18
def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096 / 2**20
sizes, small = [], []
for _ in range(20):
    buckets = [torch.empty(256 * MIB) for _ in range(2)]
    small.append(torch.empty(1000))
    del buckets
    small.append(torch.empty(1000))
    sizes.append(address_space())
print(sizes[-1] - sizes[0])
"""


@pytest.mark.slow
def test_freed_blocks_are_reused():
    """A step's blocks, freed together as at its end: by default they go back to the system and are faulted in anew."""
    found = {mode: int(output_of(COUNT_FAULTS, mode)) for mode in ("default", "keep")}
    assert found["keep"] < 0.1 * found["default"]


@pytest.mark.slow
def test_the_heap_does_not_grow_by_the_largest_blocks():
    """Two buckets a step, as ZeRO has them; small blocks that stay carve what was freed, and the next need new room."""
    assert float(output_of(GROW)) < 256


def output_of(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout
