"""Rehearses a resume of a model of billions of parameters on hundreds of ranks: bytes and calls per rank, no files.

    python -m benchmarks.proof.resume_rehearsal [--ranks 512] [--billions 10] [--every 16]

Names and shapes are those of an FLM on PyTorch's meta device. What each rank wrote is worked out as DeepSpeed divides
parameters; where each rank reads is asked of the code that does it in a run (``Layout``, ``owners_of``). Of the kinds
of tensors (weight and two moments), which are divided alike, one is worked out and counted three times; of the ranks,
every 16th is asked for the calls, all for the bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from model.config import Vocabulary
from pipeline.checkpoint.files import KINDS, MAX_FILE_BYTES, MOMENTS
from pipeline.checkpoint.reading import Headers, Key, Layout
from pipeline.config.options import Config
from pipeline.distributed.sharing import owners_of
from pipeline.engine.full_state import zero3_range
from pipeline.engine.optim import parameter_groups
from pipeline.finetuning.table import task_of

Shapes = Mapping[str, tuple[int, ...]]
Held = dict[str, tuple[int, int]]  # name -> first element and end
HEADER_BYTES_PER_TENSOR = 160  # an entry of safetensors' header and of our metadata
CELLS = ((1, 1), (2, 2), (3, 3), (3, 2), (2, 3))  # ZeRO stage of who wrote, of who resumes


@dataclass
class Cost:
    """What a resume asks of the file system, of the rank with the most and of all."""

    written_at: int  # ZeRO stage
    resumed_at: int
    ranks: int
    files: int
    checkpoint_gb: float  # 1e9 bytes
    hashed_gb_rank: float
    hashed_gb_all: float
    hashed_files_rank: int
    header_files_rank: int  # opened for their headers
    layout_mb: float  # of headers that a rank is sent by the others
    read_gb_rank: float
    read_gb_all: float
    opened_rank: int  # opens to read tensors
    reads_rank: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--billions", type=float, default=10.0, help="parameters")
    parser.add_argument("--every", type=int, default=16, help="ask every so many ranks for their calls")
    parser.add_argument("--output", type=Path, default=None, help="JSON of the table")
    arguments = parser.parse_args()
    shapes, groups = large_model(arguments.billions)
    print(f"{sum(map(math.prod, shapes.values())) / 1e9:.2f} B parameters in {len(shapes)} tensors")
    costs = [rehearse(shapes, groups, arguments.ranks, *cell, arguments.every) for cell in CELLS]
    print(table(costs))
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n", encoding="utf-8")
    return 0


def large_model(billions: float) -> tuple[Shapes, list[list[str]]]:
    """Shapes by name of an FLM of about so many parameters, and the names of each group of its optimizer."""
    config = Config()
    text, vision = config.model.text, config.model.vision
    vision.name, vision.patch_size, vision.image_size, vision.width, vision.layers = None, 14, 224, 1664, 48
    text.heads, text.bottom_layers, text.top_layers = 32, 12, 12
    per_square = 12 * 12 + 12 * 16 + 12 * 12 + 12 * 16  # bottom, top and their reconstructors
    text.width = 256 * math.ceil((max(billions - 2, 0.1) * 1e9 / per_square) ** 0.5 / 256)
    text.ffn_width = 4 * text.width
    with torch.device("meta"):
        objective = task_of(config).build(config, Vocabulary(50_265, bos_id=0, pad_id=1, eos_id=2, mask_id=50_264))
    names = {parameter: name for name, parameter in objective.named_parameters()}
    groups = parameter_groups(objective.named_parameters(), objective.parameter_group, objective.decays, config.optim)
    return (
        {name: tuple(parameter.shape) for parameter, name in names.items()},
        [[names[parameter] for parameter in group["params"]] for group in groups],
    )


def rehearse(
    shapes: Shapes, groups: list[list[str]], ranks: int, written_at: int, resumed_at: int, every: int = 1
) -> Cost:
    """A resume on ``ranks`` ranks of what as many wrote, each at its ZeRO stage (1, 2 or 3)."""
    written = [held(shapes, groups, written_at, ranks, rank) for rank in range(ranks)]
    headers, sizes = [], {}
    for rank, parts in enumerate(written):
        found, num_bytes = headers_of(shapes, parts, rank)
        headers.append(found)
        sizes |= num_bytes
    layout = Layout(Path("rehearsal"), headers)
    hashed = [0] * ranks
    hashed_files = [0] * ranks
    for file, owner in owners_of(sizes, ranks).items():
        hashed[owner] += sizes[file]
        hashed_files[owner] += 1
    reading = [held(shapes, groups, resumed_at, ranks, rank) for rank in range(ranks)]
    read = [4 * len(KINDS) * sum(end - begin for begin, end in one.values()) for one in reading]
    calls = [calls_of(layout, one) for one in reading[::every]]
    return Cost(
        written_at=written_at,
        resumed_at=resumed_at,
        ranks=ranks,
        files=len(sizes),
        checkpoint_gb=4 * len(KINDS) * sum(map(math.prod, shapes.values())) / 1e9,
        hashed_gb_rank=max(hashed) / 1e9,
        hashed_gb_all=sum(hashed) / 1e9,
        hashed_files_rank=max(hashed_files),
        header_files_rank=math.ceil(len(sizes) / ranks),
        layout_mb=len(KINDS) * sum(len(zlib.compress(pickle.dumps(one), 1)) for one in headers) / 1e6,
        read_gb_rank=max(read) / 1e9,
        read_gb_all=sum(read) / 1e9,
        opened_rank=max(opened for opened, _ in calls),
        reads_rank=max(reads for _, reads in calls),
    )


def held(shapes: Shapes, groups: list[list[str]], stage: int, ranks: int, rank: int) -> Held:
    """What a rank's optimizer holds of each parameter; names of which it holds nothing are left out.

    Stage 3 divides each parameter into equal parts; stages 1 and 2 join the parameters of a group and divide those.
    """
    found: Held = {}
    if stage == 3:
        for name, shape in shapes.items():
            whole = math.prod(shape)
            begin, end = zero3_range(math.ceil(whole / ranks), whole, rank)
            if begin < end:
                found[name] = (begin, end)
        return found
    for group in groups:
        alignment = 2 * ranks  # of DeepSpeed, for NCCL
        size = math.ceil(sum(math.prod(shapes[name]) for name in group) / alignment) * alignment // ranks
        start = 0
        for name in group:
            end = start + math.prod(shapes[name])
            low, high = max(start, size * rank), min(end, size * (rank + 1))
            if low < high:
                found[name] = (low - start, high - start)
            start = end
    return found


def headers_of(shapes: Shapes, parts: Held, rank: int) -> tuple[Headers, dict[str, int]]:
    """The headers of the files of weights that a rank wrote, and the bytes of all its files."""
    files: list[list[str]] = [[]]
    num_bytes = 0
    for name, (begin, end) in parts.items():
        files[-1].append(name)
        num_bytes += 4 * (end - begin)
        if num_bytes >= MAX_FILE_BYTES:
            files.append([])
            num_bytes = 0
    rows, keys, sizes = [], [], {}
    for number, names in enumerate(one for one in files if one):
        offset = HEADER_BYTES_PER_TENSOR * len(names)
        for name in names:
            begin, end = parts[name]
            rows.append((len(keys), begin, end, number, offset))
            keys.append(Key("weight", name, shapes[name], "F32"))
            offset += 4 * (end - begin)
        sizes |= {f"{kind}-{rank:05d}-{number:05d}.safetensors": offset for kind in KINDS}
    written = [file for file in sizes if not file.startswith(MOMENTS)]
    return Headers(written, keys, np.array(rows, dtype=np.int64).reshape(-1, 5)), sizes


def calls_of(layout: Layout, parts: Held) -> tuple[int, int]:
    """(opens, reads) of a rank that reads its part of all kinds, each file opened once."""
    stretches = [one for name, part in parts.items() for one in layout.stretches("weight", name, *part)]
    return len(KINDS) * len({one.file for one in stretches}), len(KINDS) * len(stretches)


def table(costs: Sequence[Cost]) -> str:
    """The costs as a Markdown table."""
    return "\n".join(_rows(costs))


def _rows(costs: Sequence[Cost]) -> Iterator[str]:
    yield (
        "| ZeRO of writer, reader | files | hashed: GB a rank, all | files a rank | headers: files a rank, MB sent "
        "| read: GB a rank, all | opens, reads a rank |"
    )
    yield "|---|---|---|---|---|---|---|"
    for cost in costs:
        yield (
            f"| {cost.written_at}, {cost.resumed_at} | {cost.files} | {cost.hashed_gb_rank:.3f}, "
            f"{cost.hashed_gb_all:.1f} | {cost.hashed_files_rank} | {cost.header_files_rank}, {cost.layout_mb:.0f} "
            f"| {cost.read_gb_rank:.3f}, {cost.read_gb_all:.1f} | {cost.opened_rank}, {cost.reads_rank} |"
        )


if __name__ == "__main__":
    sys.exit(main())
