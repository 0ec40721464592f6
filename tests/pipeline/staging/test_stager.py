"""Copies beside training: made in the order of need, shared by the ranks of a node, and never a reason to stop."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.stores.kept_files import own_folder
from pipeline.config.options import Config, ConfigError, validate
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.staging import node_folder, plan, stager
from pipeline.staging.node_folder import READY, name_of
from pipeline.staging.plan import ReadsAhead
from pipeline.staging.stager import Stager
from pipeline.staging.starting import start_staging
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split

ROWS_OF_A_SHARD = 4


@pytest.fixture(autouse=True)
def any_disk(monkeypatch) -> None:
    monkeypatch.setattr(node_folder, "SPARE_BYTES", 0)
    monkeypatch.setattr(stager, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(stager, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(stager, "LOCK_SECONDS", 0.01)


@pytest.fixture
def corpora(tmp_path: Path) -> list[Corpus]:
    """Two corpora of 3 and 2 shards of 4 rows."""
    return [
        Corpus(write_split(tmp_path / "a" / "train", records(12), corpus="a")),
        Corpus(write_split(tmp_path / "b" / "train", records(8), corpus="b")),
    ]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def make(disk: Path, corpora: list[Corpus], limit: int = 2**40, steps: int = 40, shuffle: str = "none") -> Stager:
    samples = [corpus.manifest.shards.rows for corpus in corpora]
    order = SampleOrder([len(corpus) for corpus in corpora], 3, shuffle=shuffle)
    ahead = ReadsAhead(order, samples, [0], 1, 2, 1, steps)
    made = Stager(own_folder(disk), corpora, ahead, np.concatenate(samples), limit)
    made.take_folders()
    return made


def ready(disk: Path, corpus: Corpus) -> set[str]:
    """Names of the shards of which there is a copy."""
    folder = own_folder(disk) / name_of(corpus.manifest) / READY
    return {path.name for path in folder.glob("*.tar")}


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


def shards(*numbers: int) -> set[str]:
    return {f"{number:05d}.tar" for number in numbers}


def test_all_shards_are_copied_in_the_order_in_which_they_are_read(disk: Path, corpora, monkeypatch) -> None:
    order, add = [], node_folder.NodeFolder.add
    monkeypatch.setattr(
        node_folder.NodeFolder,
        "add",
        lambda self, number, *rest: order.append((self, number)) or add(self, number, *rest),
    )
    staging = make(disk, corpora)
    staging.start(4)  # at row 8: shard 2 of a, then b, then a from its beginning
    wait_until(lambda: len(staging._numbers("ready")) == 5)
    staging.close()
    a, b = staging._folders
    assert order == [(a, 2), (b, 0), (b, 1), (a, 0), (a, 1)]
    assert ready(disk, corpora[0]) == shards(0, 1, 2) and ready(disk, corpora[1]) == shards(0, 1)


def test_copies_follow_the_run_within_their_room(disk: Path, corpora, monkeypatch) -> None:
    """With room for two shards and a look ahead of two: the one that is read and the next."""
    monkeypatch.setattr(plan, "STRETCH_SAMPLES", ROWS_OF_A_SHARD)
    monkeypatch.setattr(plan, "NUM_STRETCHES", 2)
    sizes, used = 0, []
    staging = make(disk, corpora, steps=10)
    limit = staging._limit = int(staging._sizes.max()) * 2
    staging.start(0)
    expected = [({0, 1}, set()), ({1, 2}, set()), ({2}, {0}), (set(), {0, 1}), (set(), {0, 1})]
    for step in range(10):
        staging.follow(step)
        a, b = expected[step // 2]
        wait_until(lambda a=a, b=b: ready(disk, corpora[0]) == shards(*a) and ready(disk, corpora[1]) == shards(*b))
        sizes = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
        used.append(sizes)
    staging.close()
    assert max(used) <= limit


def test_a_second_job_reads_what_is_there_and_takes_over_when_the_first_ends(disk: Path, corpora) -> None:
    first, second = make(disk, corpora), make(disk, corpora)
    first.start(0)
    second.start(0)
    wait_until(lambda: ready(disk, corpora[0]) == shards(0, 1, 2) and ready(disk, corpora[1]) == shards(0, 1))
    assert second._held() == set()
    first.close()
    wait_until(lambda: second._numbers("ready") == set(range(5)))
    second.close()
    assert ready(disk, corpora[0]) == shards(0, 1, 2)


def test_copies_of_an_earlier_job_are_out_of_use_until_checked(disk: Path, corpora) -> None:
    first = make(disk, corpora)
    first.start(0)
    wait_until(lambda: len(first._numbers("ready")) == 5)
    first.close()
    next_job = make(disk, corpora)
    assert ready(disk, corpora[0]) == set() and next_job._numbers("left") == set(range(5))
    next_job.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_failing_disk_is_said_once_and_tried_again(disk: Path, corpora, monkeypatch, capsys, code: int) -> None:
    write, failing = os.write, [True]

    def full(target, data):
        if failing[0] and b"\xff\xd8" in bytes(data):  # a JPEG: not a line of the test's own
            failing.append(True)
            raise OSError(code, os.strerror(code))
        return write(target, data)

    monkeypatch.setattr(os, "write", full)
    staging = make(disk, corpora)
    staging.start(0)
    if code == errno.ENOSPC:  # what is there is all that there is room for from now on
        wait_until(lambda: staging._limit == 0)
    else:
        wait_until(lambda: len(failing) > 4)
        failing[0] = False
        wait_until(lambda: len(staging._numbers("ready")) == 5)
    for step in range(3):
        staging.follow(step)
    staging.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and os.strerror(code) in lines[0] and "originals are read instead" in lines[0]


def test_what_goes_wrong_behind_the_last_step_is_said_at_the_end(disk: Path, corpora, capsys) -> None:
    for corpus in corpora:
        for tar in corpus.split_dir.glob("*.tar"):
            tar.write_bytes(tar.read_bytes()[:-1] + b"?")
    staging = make(disk, corpora)
    staging.start(0)
    wait_until(lambda: staging._refused.all())
    staging.close()
    assert capsys.readouterr().err.count("it is not copied") == 1


def test_an_altered_original_is_said_once_and_left_out(disk: Path, corpora, capsys) -> None:
    for corpus in corpora:
        tar = corpus.split_dir / "00000.tar"
        content = bytearray(tar.read_bytes())
        content[-1] ^= 1
        tar.write_bytes(content)
    staging = make(disk, corpora)
    staging.start(0)
    wait_until(lambda: staging._refused.sum() == 2 and len(staging._numbers("ready")) == 3)
    staging.follow(1)
    staging.follow(2)
    staging.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "SHA-256" in lines[0] and "it is not copied" in lines[0]


def test_a_mount_that_is_lost_and_comes_back(disk: Path, corpora, tmp_path: Path, capsys) -> None:
    os.rename(corpora[0].split_dir, tmp_path / "away")
    staging = make(disk, corpora)
    staging.start(0)
    wait_until(lambda: staging._warned)
    os.rename(tmp_path / "away", corpora[0].split_dir)
    wait_until(lambda: len(staging._numbers("ready")) == 5)
    staging.follow(1)
    staging.close()
    assert "missing shard" in capsys.readouterr().err


def test_two_paths_to_the_same_content_share_copies(disk: Path, corpora, tmp_path: Path) -> None:
    twin = Corpus(Path(shutil.copytree(corpora[0].split_dir, tmp_path / "twin")))
    staging = make(disk, [corpora[0], twin])
    staging.start(0)
    wait_until(lambda: len(staging._numbers("ready")) == 3)
    time.sleep(0.05)
    staging.close()
    assert ready(disk, twin) == shards(0, 1, 2)


# All ranks together


def config_of(stage_dir: Path | str | None) -> Config:
    config = Config()
    config.data.stage_dir = None if stage_dir is None else str(stage_dir)
    config.optim.micro_batch_size, config.train.steps = 2, 40
    return config


def on_rank(place: Place, folder: Path, node_of: list[str | None]) -> tuple:
    """Reads a corpus on a rank whose disk is that of its node; all ranks wait for the copies."""
    agreement = Agreement()
    corpus = Corpus(folder / "a" / "train")
    node = node_of[place.rank]
    config = config_of(folder / "nowhere" if node is None else folder / node)
    ranks = Ranks(place, None, agreement, None)
    order = SampleOrder([len(corpus)], 3)
    staging = start_staging(config, [corpus], order, ranks, 1, 0)
    before = [corpus.read(row) for row in range(len(corpus))]
    if staging is not None:
        wait_until(lambda: len(staging._numbers("ready")) == 3)
    agreement.wait()
    corpus.close()
    opened, original = set(), os.open
    os.open = lambda path, *rest, **more: opened.add(str(path)) or original(path, *rest, **more)
    after = [corpus.read(row) for row in range(len(corpus))]
    os.open = original
    agreement.wait()
    from_copies = any(f"/{node}/" in path for path in opened if path.endswith(".tar"))
    return staging is not None, before == after, from_copies


@pytest.mark.slow
def test_one_rank_of_each_node_copies_and_all_of_them_read(tmp_path: Path, corpora, capfd) -> None:
    """Ranks 0 and 2 on one node, 1 on another, 3 where the disk is not mounted."""
    (tmp_path / "n0").mkdir()
    (tmp_path / "n1").mkdir()
    found = run_ranks(4, on_rank, tmp_path, ["n0", "n1", "n0", None])
    assert [copies for copies, _, _ in found] == [True, True, False, False]
    assert all(same for _, same, _ in found)
    assert [from_copies for _, _, from_copies in found] == [True, True, True, False]
    said = capfd.readouterr()
    assert said.err.count("warning: data.stage_dir can't be used on") == 1 and "No such file" in said.err
    assert said.out.count("staging: up to") == 1


class WithAnotherRank:
    """In place of ``Agreement`` of two ranks, of which the other says ``other`` whatever is asked."""

    rank, world_size, is_main = 0, 2, True

    def __init__(self, other: str) -> None:
        self.other = other

    def gather(self, value) -> list:
        return [value, self.other]


def test_a_variable_that_is_not_set_is_refused_on_all_ranks(disk: Path, corpora, monkeypatch) -> None:
    monkeypatch.delenv("NODE_DISK", raising=False)
    with pytest.raises(ConfigError, match=r"\$\{NODE_DISK\}, in which a variable is not set on"):
        alone("${NODE_DISK}", corpora)
    monkeypatch.setenv("NODE_DISK", str(disk))
    ranks = Ranks(Place(0, 2, 0, "slurm", 1), None, WithAnotherRank("node7"), None)
    with pytest.raises(ConfigError, match="not set on node7"):
        start_staging(config_of("${NODE_DISK}"), corpora, None, ranks, 1, 0)
    assert os.listdir(disk) == []


def alone(disk: Path | str | None, corpora: list[Corpus], texts: int = 1) -> Stager | None:
    config = config_of(disk)
    config.data.texts_per_image = texts
    order = SampleOrder([len(one) if texts == 1 else one.manifest.samples for one in corpora], 3)
    return start_staging(config, corpora, order, Ranks(Place(0, 1, 0, "single", 1), None, Agreement(), None), 1, 0)


def test_variables_stand_for_folders(disk: Path, corpora, monkeypatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(disk))
    staging = alone("${NODE_DISK}", corpora)
    wait_until(lambda: len(staging._numbers("ready")) == 5)
    staging.close()
    assert ready(disk, corpora[0]) == shards(0, 1, 2)


def test_an_order_of_images_leads_to_their_shards(disk: Path, tmp_path: Path, monkeypatch) -> None:
    """With several texts per image the order counts images: 4 of 3 texts are 12 rows of a shard."""
    corpus = Corpus(write_split(tmp_path / "c" / "train", records(12, captions=3), corpus="c"))
    staging = alone(disk, [corpus], texts=3)
    reads = staging._ahead.from_step(0)
    staging.close()
    assert sorted(reads.shards.tolist()) == [0, 1, 2] and reads.samples.sum() == 2 * 40
    order, rows = SampleOrder([12], 3), corpus.first_rows()
    _, images, _ = order.at_many(range(80))
    expected = [corpus.place(int(rows[image]))[0] for image in images]
    assert reads.shards.tolist() == list(dict.fromkeys(expected))


def test_without_the_option_nothing_is_done(tmp_path: Path, corpora, monkeypatch) -> None:
    before = sorted(path for path in tmp_path.rglob("*"))
    assert alone(None, corpora) is None
    assert all(corpus._copies is None for corpus in corpora)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("wrong", ["", "s3://bucket/scratch"])
def test_what_is_no_folder_is_refused_at_once(wrong: str) -> None:
    with pytest.raises(ConfigError, match="data.stage_dir"):
        validate(config_of(wrong))
