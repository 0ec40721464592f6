"""A file that is replaced is the old one or the whole new one, whatever happens meanwhile."""

import errno
import os
import signal

import pytest

from data_prep.manifest import sync_directory, write_atomically


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path, moment):
    """Invariant 6."""
    path = tmp_path / "note.json"
    write_atomically(path, "old")
    child = os.fork()
    if child == 0:
        setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write_atomically(path, "new" * 10_000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_full_disk_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "note.json"
    write_atomically(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_written_atomically_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "one", "h\u00e9")
        (tmp_path / "other").write_text("h\u00e9", encoding="utf-8")
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_file_system_that_cannot_flush_folders_is_no_failure(tmp_path, monkeypatch):
    def refuse(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_directory(tmp_path)
