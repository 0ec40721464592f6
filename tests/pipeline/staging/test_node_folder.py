"""The copies of a node: whole, verified, never mixed, and given up without a trace by whoever dies or fails."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import shutil
import signal
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest

from data_prep.manifest import Manifest, load_manifest
from data_prep.shard_table import Shard
from data_prep.stores.kept_files import own_folder
from pipeline.data.open_shards import ShardError
from pipeline.staging import node_folder
from pipeline.staging.node_folder import NodeFolder, OtherContent, Stopped, remove_leftovers
from tests.forked_command import fork
from tests.pipeline.data.test_reader import records, write_split


@pytest.fixture(autouse=True)
def any_disk(monkeypatch) -> None:
    monkeypatch.setattr(node_folder, "SPARE_BYTES", 0)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return write_split(tmp_path / "train", records(12))


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return own_folder(tmp_path / "disk")


def opened(stage: Path, split: Path) -> NodeFolder:
    folder = NodeFolder(stage, split, load_manifest(split))
    assert folder.take()
    return folder


def files(folder: NodeFolder) -> dict[str, bytes]:
    """Everything below a folder of copies, by path."""
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def originals(split: Path, *numbers: int) -> dict[str, bytes]:
    names = [f"{number:05d}.{kind}" for number in numbers for kind in ("tar", "index.npy")]
    return {f"ready/{name}": (split / name).read_bytes() for name in names}


def in_child(work) -> int:
    """The exit code of ``work`` in a fork of this process."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def test_a_copy_is_the_original_and_as_large_as_was_said(stage: Path, split: Path) -> None:
    folder = opened(stage, split)
    folder.add(1)
    folder.add(0)
    assert files(folder) == originals(split, 0, 1) and folder.ready == {0, 1}
    assert [sum(map(len, originals(split, number).values())) for number in range(3)] == folder.sizes.tolist()
    folder.remove(1)
    assert files(folder) == originals(split, 0) and folder.ready == {0}


def test_one_process_at_a_time_until_it_ends(stage: Path, split: Path) -> None:
    first, second = (NodeFolder(stage, split, load_manifest(split)) for _ in range(2))
    assert first.take() and not second.take() and not second.taken
    assert in_child(lambda: NodeFolder(stage, split, load_manifest(split)).take()) == 0
    first.close()
    assert second.take() and second.taken


def test_other_versions_of_a_corpus_have_folders_of_their_own(stage: Path, split: Path, tmp_path: Path) -> None:
    other = write_split(tmp_path / "other" / "train", records(13)[1:])  # same names and sizes, other images
    both = [opened(stage, split), opened(stage, other)]
    for folder in both:
        folder.add(0)
    assert both[0].path != both[1].path
    assert files(both[0]) == originals(split, 0) and files(both[1]) == originals(other, 0)
    assert opened_elsewhere(stage, shutil.copytree(split, tmp_path / "moved")) == both[0].path


def opened_elsewhere(stage: Path, split: Path) -> Path:
    return NodeFolder(stage, split, load_manifest(split)).path


def test_what_a_killed_process_left_is_used_after_it_was_checked(stage: Path, split: Path, monkeypatch) -> None:
    """Killed in the middle of the third shard: two whole copies, one of which is damaged while nobody looks."""

    def die_in_the_third() -> None:
        folder = opened(stage, split)
        folder.add(0)
        folder.add(1)
        write = os.write
        monkeypatch.setattr(os, "write", lambda target, data: write(target, data[:100]) and os.kill(os.getpid(), 9))
        folder.add(2)

    assert in_child(die_in_the_third) == -signal.SIGKILL
    folder = NodeFolder(stage, split, load_manifest(split))
    assert any(name.startswith("part/") and len(data) == 100 for name, data in files(folder).items())
    damaged = folder.path / "ready" / "00001.tar"
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    assert folder.take() and folder.left == {0, 1} and folder.ready == set()
    assert not any(name.startswith(("part/", "ready/")) for name in files(folder)), "nothing is read before its check"
    read = []
    monkeypatch.setattr(node_folder, "open_plain_file", noting(node_folder.open_plain_file, read))
    for number in range(3):
        folder.add(number)
    assert files(folder) == originals(split, 0, 1, 2) and folder.left == set()
    assert {Path(path).name for path in read if Path(path).parent == split} == {
        *("00001.tar", "00001.index.npy", "00002.tar", "00002.index.npy")
    }


def noting(function, calls: list):
    def noted(path):
        calls.append(path)
        return function(path)

    return noted


@pytest.mark.parametrize("place", ["ready", "left"])
def test_half_a_copy_and_what_is_no_copy_are_removed(stage: Path, split: Path, place: str) -> None:
    folder = opened(stage, split)
    folder.add(0)
    folder.add(1)
    folder.close()
    for number in (0, 1):
        for kind in ("tar", "index.npy"):
            name = f"{number:05d}.{kind}"
            os.replace(folder.path / "ready" / name, folder.path / place / name)
    os.unlink(folder.path / place / "00001.index.npy")
    (folder.path / place / "99999.tar").write_bytes(b"x")
    (folder.path / place / "folder").mkdir()
    again = opened(stage, split)
    assert again.left == {0} and set(files(again)) == {"left/00000.tar", "left/00000.index.npy"}


@pytest.mark.parametrize("name", ["00001.tar", "00001.index.npy"])
@pytest.mark.parametrize("damage", ["a bit", "longer", "shorter"])
def test_an_original_of_other_content_is_not_copied(stage: Path, split: Path, name: str, damage: str) -> None:
    content = bytearray((split / name).read_bytes())
    content[-1] ^= 1
    content = {"a bit": content, "longer": content + bytes(10**6), "shorter": content[:-1]}[damage]
    (split / name).write_bytes(content)
    folder = opened(stage, split)
    with pytest.raises(OtherContent, match=f"{name}: .*its manifest"):
        folder.add(1)
    assert files(folder) == {} and folder.ready == set()
    folder.add(0)


def test_a_manifest_without_hashes_goes_by_sizes(stage: Path, split: Path) -> None:
    manifest = load_manifest(split)
    shards = [Shard(**{**vars(shard), "sha256": "", "index_sha256": ""}) for shard in manifest.shards]
    folder = NodeFolder(stage, split, Manifest(**{**vars(manifest), "shards": shards}))
    assert folder.take()
    folder.add(0)
    assert files(folder) == originals(split, 0)
    os.truncate(split / "00001.tar", 1024)
    with pytest.raises(OtherContent):
        folder.add(1)


def fails(code: int):
    def failing(*arguments, **options):
        raise OSError(code, os.strerror(code))

    return failing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_leaves_nothing_behind(stage: Path, split: Path, monkeypatch, code: int) -> None:
    folder = opened(stage, split)
    folder.add(0)
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails(code))
        with pytest.raises(OSError) as caught:
            folder.add(1)
        assert caught.value.errno == code
    assert files(folder) == originals(split, 0) and len(os.listdir("/proc/self/fd")) == descriptors
    folder.add(1)
    assert files(folder) == originals(split, 0, 1)


def test_a_limit_of_file_sizes_is_an_error_not_the_end_of_the_process(stage: Path, split: Path) -> None:
    def limited() -> int:
        folder = opened(stage, split)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        try:
            folder.add(0)
        except OSError as error:
            return 0 if error.errno == errno.EFBIG and files(folder) == {} else 1
        return 2

    assert in_child(limited) == 0


def test_room_for_others_is_kept(stage: Path, split: Path, monkeypatch) -> None:
    folder, usage = opened(stage, split), namedtuple("usage", "total used free")
    size = (split / "00000.tar").stat().st_size
    monkeypatch.setattr(node_folder, "SPARE_BYTES", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, size + 999))
    with pytest.raises(OSError, match="No space left"):
        folder.add(0)
    assert files(folder) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, size + 1000))
    folder.add(0)


def test_an_original_that_is_gone_or_cut_short_meanwhile(stage: Path, split: Path, monkeypatch) -> None:
    folder, pread = opened(stage, split), os.pread
    (split / "00000.tar").unlink()
    with pytest.raises(ShardError, match="missing shard"):
        folder.add(0)
    monkeypatch.setattr(os, "pread", lambda source, size, at: pread(source, size, at) if at == 0 else b"")
    monkeypatch.setattr(node_folder, "_CHUNK_BYTES", 1000)
    with pytest.raises(OSError, match="ends too early"):
        folder.add(1)
    assert files(folder) == {}


def test_copying_stops_when_it_is_told_to(stage: Path, split: Path, monkeypatch) -> None:
    monkeypatch.setattr(node_folder, "_CHUNK_BYTES", 1000)
    folder, asked = opened(stage, split), []
    with pytest.raises(Stopped):
        folder.add(0, lambda: asked.append(None) or len(asked) > 3)
    assert files(folder) == {}


def test_a_process_forked_in_the_middle_of_a_copy_keeps_none_of_its_room(stage: Path, split: Path) -> None:
    folder, codes = opened(stage, split), []

    def no_part_is_open() -> int:
        links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        return 1 if any("/part/" in link for link in links) else 0

    def fork_once() -> bool:
        if folder._writing is not None and not codes:
            codes.append(in_child(no_part_is_open))
        return False

    folder.add(0, fork_once)
    assert codes == [0] and files(folder) == originals(split, 0)


def test_leftovers_of_other_corpora_are_removed_unless_somebody_works_on_them(
    stage: Path, split: Path, tmp_path: Path
) -> None:
    at_work = opened(stage, write_split(tmp_path / "a" / "train", records(4)))
    ended = opened(stage, write_split(tmp_path / "b" / "train", records(5)))
    mine = opened(stage, split)
    for folder in (at_work, ended, mine):
        folder.add(0)
        folder.path.joinpath("part", "x").write_bytes(b"")
    ended.close()
    mine.close()
    remove_leftovers(stage, {mine.name})
    assert sorted(os.listdir(stage)) == sorted([at_work.name, mine.name])
    assert len(files(at_work)) == 3


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_copies_are_made_and_nobody_elses_are_removed(
    stage: Path, split: Path, tmp_path: Path, monkeypatch, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", fails(code))
    other = opened(stage, write_split(tmp_path / "a" / "train", records(4)))
    other.add(0)
    folder = opened(stage, split)
    folder.add(0)
    remove_leftovers(stage, {folder.name})
    assert files(folder) == originals(split, 0) and len(files(other)) == 2


def test_a_lock_that_is_granted_to_all_costs_copies_not_their_content(stage: Path, split: Path, monkeypatch) -> None:
    """As of some shared file systems: two processes make and remove the same copies."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)

    def work(seed: int) -> None:
        folder = opened(stage, split)
        for turn in range(60):
            try:
                number = (turn * seed) % 3
                folder.remove(number) if number in folder.ready else folder.add(number)
            except OSError as error:
                assert error.errno == errno.ENOENT
                folder.ready.discard(number)

    children = [fork(partial(work, seed)) for seed in (1, 2)]
    hashes = {name: hashlib.sha256(data).digest() for name, data in originals(split, 0, 1, 2).items()}
    ready = NodeFolder(stage, split, load_manifest(split)).path / "ready"
    while children:
        for name, expected in hashes.items():
            try:
                found = hashlib.sha256((ready.parent / name).read_bytes()).digest()
            except FileNotFoundError:
                continue
            assert found == expected
        for child in [*children]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert os.waitstatus_to_exitcode(status) == 0
                children.remove(child)
        time.sleep(0.001)


def test_folders_of_others_are_not_used(tmp_path: Path, monkeypatch) -> None:
    name = f"openflm-{os.geteuid()}"
    with pytest.raises(FileNotFoundError):
        own_folder(tmp_path / "not mounted")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / name).symlink_to(tmp_path)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / name).mkdir()
    (tmp_path / "open" / name).chmod(0o777)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / name).write_bytes(b"")
    for folder in ("linked", "open", "file"):
        with pytest.raises(PermissionError, match="another's"):
            own_folder(tmp_path / folder)
    monkeypatch.setattr(os, "mkdir", fails(errno.EACCES))
    with pytest.raises(PermissionError):
        own_folder(tmp_path)


def test_the_folder_of_this_user_is_made_once_and_closed_to_others(tmp_path: Path) -> None:
    assert own_folder(tmp_path) == own_folder(tmp_path)
    assert own_folder(tmp_path).stat().st_mode & 0o777 == 0o700
