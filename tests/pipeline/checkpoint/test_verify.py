"""Ranks divide the files of a checkpoint to verify them: each is hashed once, the verdict is one, progress is said."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import verify
from pipeline.checkpoint.files import PartWriter, Piece, checkpoint_path, publish
from pipeline.checkpoint.restore import find
from pipeline.distributed.ranks import Agreement
from tests.forked_ranks import run_ranks

SIZES = (300, 200, 100, 50, 20, 10)


def write_checkpoints(run: Path, *steps: int) -> None:
    """Checkpoints of several files of unequal sizes."""
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:08d}.tmp"
        folder.mkdir(parents=True)
        files = {}
        for rank, size in enumerate(SIZES):
            writer = PartWriter(folder, rank)
            writer.add(Piece(f"w{rank}", 0, (size,), {"weight": torch.full((size,), float(step))}))
            files |= writer.finish()
        publish(folder, checkpoint_path(run, step), {"step": step}, files)


def hashed_by(place, run: Path) -> tuple[str | None, dict[str, int]]:
    """What is found, and how many bytes of which file this rank hashed."""
    hashed: dict[str, int] = {}
    really = verify._Hashing._sha256

    def note(self, path: Path) -> str:
        found = really(self, path)
        hashed[f"{path.parent.name}/{path.name}"] = self.num_bytes[path.name]
        return found

    verify._Hashing._sha256 = note
    found = find(run, Agreement(), place.is_main)
    return found and found.name, hashed


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_file_is_hashed_by_one_rank(tmp_path: Path, world_size: int) -> None:
    write_checkpoints(tmp_path, 1, 2)
    path = checkpoint_path(tmp_path, 2)
    sizes = {f"{path.name}/{p.name}": p.stat().st_size for p in path.iterdir() if p.name != "manifest.json"}
    results = run_ranks(world_size, hashed_by, tmp_path)
    assert {name for name, _ in results} == {"step_00000002"}
    assert {name: size for _, hashed in results for name, size in hashed.items()} == sizes
    assert sum(len(hashed) for _, hashed in results) == len(sizes)
    loads = [sum(hashed.values()) for _, hashed in results]
    assert sum(loads) == sum(sizes.values()) and max(loads) <= sum(sizes.values()) / world_size + max(sizes.values())


def damage_in_turn(place, run: Path, agreement_of=Agreement) -> list[tuple[str, str | None]]:
    """(file, checkpoint that is found) for each file of the newest checkpoint, damaged in three ways in turn."""
    agreement, found = agreement_of(), []
    path = checkpoint_path(run, 2)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[-2] ^= 1
        for damage in (bytes(flipped), content[:-1], None):
            agreement.wait()
            if place.is_main:
                file.write_bytes(damage) if damage is not None else file.unlink()
            agreement.wait()
            chosen = find(run, agreement, place.is_main)
            found.append((file.name, chosen and chosen.name))
            agreement.wait()
            if place.is_main:
                file.write_bytes(content)
    agreement.wait()
    return [*found, ("", find(run, agreement, place.is_main).name)]


@pytest.mark.slow
def test_damage_that_any_rank_finds_is_known_to_all(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 1, 2)
    for found in run_ranks(2, damage_in_turn, tmp_path):
        assert len(found) == 3 * (len(SIZES) + 2) + 1
        assert {chosen for _, chosen in found[:-1]} == {"step_00000001"} and found[-1] == ("", "step_00000002")


def slowly_hashed(place, run: Path) -> tuple[str, list[str]]:
    """What is found and said when rank 0 hashes until it has said how far it is."""
    said, words, hashed = threading.Event(), [], verify._Hashing._sha256

    def note(line: str, **_: object) -> None:
        words.append(line)
        said.set()

    def slow(self, path: Path) -> str:
        assert said.wait(60)
        return hashed(self, path)

    verify.POLL_SECONDS, verify.SAY_SECONDS, verify.print = 0.01, -1.0, note
    if place.is_main:
        verify._Hashing._sha256 = slow
    return find(run, Agreement(), place.is_main).name, words


def test_ranks_wait_for_the_slowest_which_says_how_far_it_is(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 1)
    (first, words), (second, silent) = run_ranks(2, slowly_hashed, tmp_path)
    assert first == second == "step_00000001" and silent == []
    assert words[0] == "checking step_00000001: 0.0 of 0.0 GiB hashed"


def test_a_manifest_that_lists_no_sizes_is_refused(tmp_path: Path) -> None:
    from pipeline.checkpoint.files import _with_own_hash, read_manifest

    write_checkpoints(tmp_path, 1, 2)
    path = checkpoint_path(tmp_path, 2)
    for entry in ({}, {"bytes": "many", "sha256": ""}, {"bytes": None, "sha256": ""}, {"bytes": float("inf")}, []):
        content = read_manifest(path)
        content["files"]["state.json"] = entry
        (path / "manifest.json").write_bytes(_with_own_hash(content))
        assert "unreadable" in verify.shared_defect(path, Agreement())
        assert verify.newest_whole([path, checkpoint_path(tmp_path, 1)], Agreement())[0].name == "step_00000001"
        content["files"]["state.json"] = {"bytes": 1, "sha256": ""}
        (path / "manifest.json").write_bytes(_with_own_hash(content))
