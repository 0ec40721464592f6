"""Ranks read ranges of a checkpoint: each element once over all ranks, the same state as read whole."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoint import reading, restore
from pipeline.checkpoint.files import KINDS, CheckpointError, PartWriter, Piece, checkpoint_path, publish
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from pipeline.distributed.ranks import Agreement
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import make_engine, micro_batches, tiny_config

WHOLE = {
    "matrix": torch.arange(77.0).reshape(7, 11),
    "small": torch.tensor([3.0, 5.0]),
    "flags": torch.tensor([True, False, True]),
    "half": torch.arange(9.0).to(torch.bfloat16),
    "count": torch.tensor(12),
    "nothing": torch.empty(0, 4),
}


def write_divided(run: Path, cuts: list[list[int]], max_file_bytes: int = 1 << 30) -> Path:
    """A checkpoint of WHOLE: rank r wrote elements ``cuts[r][0]`` to ``cuts[r][1]`` of the matrix, rank 0 the rest."""
    folder = run / "checkpoints" / "step_00000001.tmp"
    folder.mkdir(parents=True)
    files = {}
    for rank, (begin, end) in enumerate(cuts):
        writer = PartWriter(folder, rank, max_file_bytes)
        for name, value in WHOLE.items():
            if name == "matrix" and begin < end:
                writer.add(Piece(name, begin, (7, 11), {"weight": value.flatten()[begin:end].clone()}))
            elif name != "matrix" and rank == 0:
                writer.add(Piece(name, 0, tuple(value.shape), {"weight": value}))
        files |= writer.finish()
    publish(folder, checkpoint_path(run, 1), {"step": 1}, files)
    return checkpoint_path(run, 1)


@pytest.mark.parametrize("max_file_bytes", [1, 1 << 30])
def test_any_range_equals_the_slice_of_the_whole(tmp_path: Path, max_file_bytes: int) -> None:
    path = write_divided(tmp_path, [[0, 20], [20, 21], [21, 70], [70, 77]], max_file_bytes)
    reader = Reader(path)
    assert reader.shapes("weight") == {name: tuple(value.shape) for name, value in WHOLE.items()}
    for name, value in WHOLE.items():
        assert torch.equal(reader.read("weight", name), value) and reader.read("weight", name).dtype == value.dtype
        flat = value.flatten()
        ranges = [(name, begin, end) for begin in range(len(flat) + 1) for end in range(begin, len(flat) + 1)]
        before = reader.num_bytes
        for (_, begin, end), values in zip(ranges, reader.read_ranges("weight", ranges), strict=True):
            assert torch.equal(values, flat[begin:end])
        assert reader.num_bytes - before == sum(end - begin for _, begin, end in ranges) * value.element_size()


@pytest.mark.parametrize("cuts", [[[0, 20], [21, 77]], [[0, 20], [19, 77]], [[1, 77]], [[0, 76]], [[0, 77], [0, 77]]])
def test_an_element_that_is_missing_or_twice_there_is_refused(tmp_path: Path, cuts) -> None:
    path = write_divided(tmp_path, cuts)
    with pytest.raises(CheckpointError, match=r"of weight of matrix it holds .*, expected 0 to 77 once"):
        Reader(path)


def test_a_file_that_shrinks_after_its_check_is_no_tensor(tmp_path: Path) -> None:
    path = write_divided(tmp_path, [[0, 40], [40, 77]])
    reader = Reader(path)
    file = path / "weight-00001-00000.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ends too early"):
        reader.read("weight", "matrix")


def opened_headers(place, path: Path) -> tuple[list[str], dict]:
    opened = []
    really = reading.safe_open
    reading.safe_open = lambda file, **options: opened.append(file.name) or really(file, **options)
    reader = Reader(path, agreement=Agreement())
    return opened, {name: value.float().numpy() for name, value in reader.read_all("weight")}


def test_the_headers_are_read_once_over_all_ranks(tmp_path: Path) -> None:
    path = write_divided(tmp_path, [[0, 20], [20, 21], [21, 70], [70, 77]])
    found = run_ranks(3, opened_headers, path)
    assert sorted(name for opened, _ in found for name in opened) == sorted(p.name for p in path.glob("*.safetensors"))
    assert max(len(opened) for opened, _ in found) == math.ceil(4 / 3)
    for _, tensors in found:
        for name, value in WHOLE.items():
            assert torch.equal(torch.as_tensor(tensors[name]), value.float()), name


def refused_headers(place, path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Reader(path, agreement=Agreement())
    return str(error.value)


def test_a_header_that_one_rank_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    path = write_divided(tmp_path, [[0, 20], [20, 77]])
    (path / "weight-00001-00000.safetensors").write_bytes(b"not a tensor")
    first, second = run_ranks(2, refused_headers, path)
    assert first == second and "weight-00001-00000.safetensors holds no tensors of ours" in first


def save(place, config, stage: int, run: Path) -> dict[str, str]:
    engine, agreement = make_engine(place, config, stage)
    for step in range(3):
        engine.step(step, micro_batches(config, place, step))
    saver = Saver(run, engine, config.train, place, agreement)
    assert saver.save(RunState(step=3)) and saver.wait()
    return state_of(engine)


def load_at_every_stage(
    place, config, run: Path, stages: tuple[int, ...]
) -> dict[int, tuple[int, Counter, dict, bool]]:
    """By stage: bytes of tensors read, files opened for them, the state then, and whether working copies follow it."""
    num_bytes, opened = [0], Counter()
    really_read, really_open = os.preadv, open

    def count_bytes(descriptor, buffers, offset):
        found = really_read(descriptor, buffers, offset)
        num_bytes[0] += found
        return found

    def count_files(file, *arguments, **options):
        opened[Path(file).name] += 1
        return really_open(file, *arguments, **options)

    reading.os = SimpleNamespace(**{**vars(os), "preadv": count_bytes})
    reading.open = count_files
    found = {}
    for stage in stages:
        engine, agreement = make_engine(place, config, stage)
        num_bytes[0] = 0
        opened.clear()
        assert restore.load(checkpoint_path(run, 3), engine, agreement).step == 3
        found[stage] = (num_bytes[0], Counter(opened), state_of(engine), copies_follow(engine))
    return found


def state_of(engine) -> dict[str, str]:
    tensors = {f"{kind} {name}": value for name, held in engine.named_state() for kind, value in held.items()}
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}


def copies_follow(engine) -> bool:
    """Whether the weights that a forward pass sees are the masters in its dtype, on this rank."""
    import deepspeed

    masters = {name: held["weight"] for name, held in engine.named_state()}
    parameters = dict(engine.objective.named_parameters())
    whole = deepspeed.zero.GatheredParameters(list(parameters.values())) if engine.stage == 3 else nullcontext()
    with whole:
        return all(torch.equal(value.data, masters[name].to(value.dtype)) for name, value in parameters.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "saved_at", "world_size"),
    [("fp32", 0, 2), ("fp32", 2, 4), ("fp32", 3, 1), ("fp32", 3, 2), ("bf16", 2, 2), ("bf16", 3, 4)],
)
def test_all_ranks_together_read_a_checkpoint_once(tmp_path: Path, precision: str, saved_at: int, world_size: int):
    """At every stage, in bytes: each element of each tensor is read by one rank, whoever needs it."""
    config = tiny_config(precision=precision)
    expected = run_ranks(2, save, config, saved_at, tmp_path)[0]
    reader = Reader(checkpoint_path(tmp_path, 3))
    whole = sum(value.nbytes for kind in KINDS for _, value in reader.read_all(kind))
    stages = (1, 2, 3) if precision == "bf16" else (0, 1, 2, 3)
    ranks = run_ranks(world_size, load_at_every_stage, config, tmp_path, stages)
    for stage in stages:
        assert sum(rank[stage][0] for rank in ranks) == whole, (stage, [rank[stage][0] for rank in ranks])
        for _, _, state, copies_are_new in (rank[stage] for rank in ranks):
            assert state == expected and copies_are_new, stage
    if world_size == 2 and saved_at == 3:
        for number, rank in enumerate(ranks):
            own = {f"{kind}-{number:05d}-00000.safetensors" for kind in KINDS}
            others = set(rank[3][1]) - own
            assert not others or number == 1 and {*others} == {"weight-00000-00000.safetensors"}, "a buffer of rank 0"
