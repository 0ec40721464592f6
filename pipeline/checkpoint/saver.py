"""Saves checkpoints while training continues: each rank copies its part, a thread writes it, rank 0 publishes.

A save copies tensors at a step boundary and then has two phases. *writing*: a thread of each rank writes, syncs and
hashes what that rank holds. When all threads are done, at a later step boundary, the ranks gather their lists of files.
*publishing*: a thread of rank 0 writes the manifest, renames the folder and removes old checkpoints. At most one save
is in flight.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import secrets
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoint import files as checkpoint_files
from pipeline.checkpoint import retention
from pipeline.checkpoint.files import KINDS, CheckpointError, PartWriter, Piece, checkpoint_path
from pipeline.checkpoint.state import RunState, TrainingState
from pipeline.config.options import TrainConfig
from pipeline.distributed.host_memory import available_bytes
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.distributed.sharing import owners_of

MEMORY_MARGIN = 1.2  # free memory per byte of the copy
HEADER_BYTES = 1 << 20  # headers, manifest and state, beyond the tensors
STREAMED_FILE_BYTES = 1 << 28  # size of files when there is no memory for a copy
SLOW_BYTES_PER_SECOND = 50e6  # of a first save, whose time nobody knows yet
REMEMBERED_SAVES = 20
VISIBLE_SECONDS = 10.0  # how long another rank's file may take to be seen


class OpenedFolder(NamedTuple):
    """What rank 0 found when it opened the folder of a save; every rank gets it."""

    already_saved: bool = False
    token: str = ""  # content of the file "token" in the folder: a rank that reads it sees the same folder
    error: str | None = None


class Saver:
    """The checkpoints of one running run. All methods but ``votes`` must be called by every rank alike."""

    def __init__(
        self,
        run: Path,
        engine: TrainingState,
        settings: TrainConfig,
        place: Place,
        agreement: Agreement,
        saved_step: int | None = None,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """``saved_step`` is the step of a checkpoint already there; ``log(step, values, kind)`` gets every record.

        Raises:
            CheckpointError: the run folder cannot be written, or is not the same folder on every rank.
        """
        self._run, self._engine, self._settings = run, engine, settings
        self._place, self._agreement, self._log = place, agreement, log
        self._saved_step = saved_step
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._task: Future | None = None
        self._cleaning: Future | None = None
        self._phase: str | None = None
        self._state = RunState()
        self._succeeded = True  # the last save
        self._warned_of_memory = False
        self._best: dict[str, Any] | None = None
        self._began = time.monotonic()
        self._stall_seconds = 0.0
        self.durations: deque[float] = deque(maxlen=REMEMBERED_SAVES)  # seconds of the last saves, on rank 0
        self._refuse_unshared_folder()
        if place.is_main:
            checkpoint_files.remove_leftovers(run)

    def save(self, state: RunState) -> bool:
        """Start saving the engine and ``state``; False, with an alarm, when it cannot be started.

        A step that is saved, or being saved, is not saved again. Waits for a save in flight.
        """
        if self._phase is not None and self._state.step == state.step:
            return True
        self.wait()
        self._began = time.monotonic()
        engine = self._engine
        self._state = dataclasses.replace(
            copy.deepcopy(state),  # it is written when training has gone on
            optimizer_steps=engine.optimizer_steps,
            loss_scale=engine.loss_scale,
            frozen=engine.frozen,
        )
        sizes = _sizes(engine)
        opened = self._agreement.gather(self._open_folder(sum(sizes.values())) if self._place.is_main else None)[0]
        if opened.already_saved:
            self._succeeded = True
            return True
        owners = owners_of(sizes, self._place.world_size)
        own = {name for name, owner in owners.items() if owner == self._place.rank}
        share = sum(sizes.values()) // self._place.world_size  # of what ZeRO divides
        report = self._ask_ranks(opened, max(share, sum(sizes[name] for name in own)))
        if self._abandon_after([error for error, *_ in report]):
            return False
        if not self._settings.async_save or self._short_of_memory([room for _, room in report]):
            self._write_now(own)
        else:
            self._task = self._pool.submit(_write_part, self._tmp, self._place.rank, list(engine.pieces(own)))
        self._phase, self._succeeded = "writing", False
        self._stall_seconds = time.monotonic() - self._began
        if not self._settings.async_save:
            return self.wait()
        return True

    def votes(self) -> tuple[bool, bool]:
        """What this rank adds to a step's sums: its thread is still writing; train.save_minutes have passed."""
        minutes = self._settings.save_minutes
        due = self._place.is_main and minutes > 0 and self._phase is None
        return self._busy, due and time.monotonic() - self._began >= 60 * minutes

    def advance(self, num_busy: float) -> None:
        """Start the next phase of the save in flight if no rank is busy; ``num_busy`` is the sum of the first vote."""
        if self._phase is None or num_busy:
            return
        outcomes = self._agreement.gather(self._outcome())
        if self._abandon_after([error for _, error in outcomes]):
            self._phase = None
        elif self._phase == "writing":
            self._phase = "publishing"
            if self._place.is_main:
                files = {name: entry for part, _ in outcomes for name, entry in part.items()}
                self._task = self._pool.submit(self._publish, files)
        else:
            self._phase, self._succeeded, self._saved_step = None, True, self._state.step
            if self._place.is_main:
                self._report(*outcomes[0][0])

    def wait(self) -> bool:
        """Wait for a save in flight; whether the last save succeeded."""
        while self._phase is not None:
            if self._task is not None:
                self._task.exception()  # waits
            self.advance(self._agreement.total([self._busy])[0])
        self._pool.submit(int).result()  # wait for clean-up and retention too
        return self._succeeded

    def expected_seconds(self) -> float:
        """On rank 0: what a save that begins now may take: as long as the longest of late, and longer by as much as
        they differ; twice that where it has to wait for one in flight."""
        if self.durations:
            seconds = 2 * max(self.durations) - min(self.durations)
        else:
            seconds = sum(_sizes(self._engine).values()) / SLOW_BYTES_PER_SECOND
        return seconds if self._phase is None else 2 * seconds

    def best_of(self, state: RunState) -> dict[str, Any] | None:
        """The best held-out value up to ``state``, which may have been measured after its checkpoint was written."""
        found = self._agreement.gather(retention.read_best(self._run) if self._place.is_main else None)[0]
        return found if found and found["step"] <= state.step else state.best

    def note_best(self, best: dict[str, Any]) -> None:
        """Keep the checkpoint of ``best["step"]``, saved already or to be saved now, as the best so far."""
        self._best = best
        if self._place.is_main:
            self._pool.submit(self._retain)

    def rewound(self, step: int) -> None:
        """Remove the checkpoints after ``step``, to which the run has gone back."""
        self.wait()
        if self._place.is_main:
            retention.remove_newer(self._run, step)
        self._saved_step = step
        self._agreement.wait()

    @property
    def _busy(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def _final(self) -> Path:
        return checkpoint_path(self._run, self._state.step)

    @property
    def _tmp(self) -> Path:
        return self._final.with_name(self._final.name + ".tmp")

    def _open_folder(self, num_bytes: int) -> OpenedFolder:
        """On rank 0: create the folder to write ``num_bytes`` of tensors into, with a token in it."""
        if self._saved_step == self._state.step and checkpoint_files.defect(self._final, hashes=False) is None:
            return OpenedFolder(already_saved=True)
        needed = num_bytes + HEADER_BYTES
        if self._cleaning is not None:
            self._cleaning.exception()  # waits
        try:
            shutil.rmtree(self._tmp, ignore_errors=True)
            self._tmp.mkdir(parents=True)
            free = shutil.disk_usage(self._tmp).free
            if free < needed:
                return OpenedFolder(
                    error=f"it needs {_gib(needed)}, {_gib(free)} are free in {self._tmp.parent}; free some space or "
                    "lower train.keep_last"
                )
            token = secrets.token_hex(8)
            (self._tmp / "token").write_text(token)
            return OpenedFolder(token=token)
        except OSError as error:
            return OpenedFolder(error=str(error))

    def _ask_ranks(self, opened: OpenedFolder, own_bytes: int) -> list[tuple[str | None, tuple[str, int, int | None]]]:
        """Of each rank: an error that keeps it from writing, and (host, bytes to copy, bytes of free memory)."""
        error = opened.error
        if error is None and not _sees(self._tmp / "token", opened.token):
            error = f"rank {self._place.rank} on {socket.gethostname()} does not see {self._tmp}"
        return self._agreement.gather((error, (socket.gethostname(), own_bytes, available_bytes())))

    def _abandon_after(self, errors: list[str | None]) -> bool:
        """Give the save up if any rank has an error: raise the alarm, delete the half-written folder, return True."""
        errors = list(dict.fromkeys(error for error in errors if error))
        if not errors:
            return False
        self._succeeded, self._task = False, None
        if self._place.is_main:
            self._cleaning = self._pool.submit(shutil.rmtree, self._tmp, True)
            message = f"checkpoint {self._final.name} was not written: {'; '.join(errors)}"
            self._alarm(f"{message}; the run goes on, older checkpoints stand, the next save tries again")
        return True

    def _report(self, num_bytes: int, left_behind: str | None) -> None:
        seconds = time.monotonic() - self._began
        self.durations.append(seconds)
        stall = self._stall_seconds if self._settings.async_save else seconds
        self._log(
            self._state.step, {"seconds": seconds, "stall_seconds": stall, "gib": num_bytes / 2**30}, kind="checkpoint"
        )
        if left_behind is not None:
            self._alarm(f"checkpoint {self._final.name} stands, but {left_behind}")

    def _alarm(self, message: str) -> None:
        print(f"ALARM: {message}", file=sys.stderr, flush=True)
        self._log(self._state.step, {"message": message}, kind="alarm")

    def _short_of_memory(self, rooms: list[tuple[str, int, int | None]]) -> bool:
        needed: dict[str, int] = {}
        for host, num_bytes, _ in rooms:
            needed[host] = needed.get(host, 0) + num_bytes
        short = [host for host, _, free in rooms if free is not None and free < MEMORY_MARGIN * needed[host]]
        if short and self._place.is_main and not self._warned_of_memory:
            self._warned_of_memory = True
            print(
                f"checkpoints are written while training waits: {short[0]} has less than {MEMORY_MARGIN} x "
                f"{_gib(needed[short[0]])} of memory free for a copy",
                file=sys.stderr,
                flush=True,
            )
        return bool(short)

    def _write_now(self, own: set[str]) -> None:
        """Write this rank's part, with memory for one file at a time."""
        task = self._task = Future()
        writer = PartWriter(self._tmp, self._place.rank, STREAMED_FILE_BYTES)
        try:
            for piece in self._engine.pieces(own):
                writer.add(piece)
            task.set_result(writer.finish())
        except OSError as error:
            task.set_exception(error)

    def _outcome(self) -> tuple[Any, str | None]:
        """(result, error) of this rank's thread; (None, None) when it had nothing to do."""
        task, self._task = self._task, None
        if task is None:
            return None, None
        error = task.exception()
        if error is None:
            return task.result(), None
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        return None, f"rank {self._place.rank}: {kind}{error}"

    def _publish(self, files: Mapping[str, Mapping[str, Any]]) -> tuple[int, str | None]:
        """On rank 0, in its thread: publish the checkpoint, check its file sizes, then remove old ones.

        Returns its bytes, and an error met in removing old ones.
        """
        (self._tmp / "token").unlink()
        checkpoint_files.publish(self._tmp, self._final, dataclasses.asdict(self._state), dict(files))
        reason = checkpoint_files.defect(self._final, hashes=False)
        if reason is not None:
            raise OSError(f"it does not stand as written: {reason}")
        num_bytes = sum(entry["bytes"] for entry in files.values())
        return num_bytes, self._retain()

    def _retain(self) -> str | None:
        """On rank 0, in its thread: record the best if it has a checkpoint, remove old ones; returns an error."""
        try:
            if self._best is not None and checkpoint_path(self._run, self._best["step"]).is_dir():
                retention.write_best(self._run, self._best)
                self._best = None
            retention.retain(self._run, self._settings.keep_last, self._settings.keep_every)
        except OSError as error:
            return f"the best could not be noted, or older ones not removed: {error}"
        return None

    def _refuse_unshared_folder(self) -> None:
        """Raise CheckpointError unless every rank sees the same, writable folder of checkpoints."""
        folder, token, error = self._run / "checkpoints", secrets.token_hex(8), None
        probe = folder / f".shared-{token}"
        if self._place.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.write_text(token)
            except OSError as found:
                error = f"{folder}: cannot be written ({found.strerror}); make it writable or use another --output"
        probe, token, error = self._agreement.gather((probe, token, error))[0]
        seen = error is not None or _sees(probe, token)
        without = [
            place
            for place, ok in self._agreement.gather((f"rank {self._place.rank} on {socket.gethostname()}", seen))
            if not ok
        ]
        if error is not None:
            raise CheckpointError(error)
        if self._place.is_main:
            probe.unlink(missing_ok=True)
        if without:
            raise CheckpointError(
                f"{folder} is not the same folder everywhere: {without[0]} does not see what rank 0 wrote there; "
                "use an --output on a file system that all nodes share"
            )


def _sizes(engine: TrainingState) -> dict[str, int]:
    """Bytes that a checkpoint of the engine holds of each name, everything counted as fp32."""
    sizes: dict[str, int] = {}
    for kind in KINDS:
        for name, shape in engine.shapes(kind, engine.optimizer_steps > 0).items():
            sizes[name] = sizes.get(name, 0) + 4 * math.prod(shape)
    return sizes


def _write_part(folder: Path, rank: int, pieces: list[Piece]) -> dict[str, dict[str, Any]]:
    """In a rank's thread: write the pieces, freeing each once written; returns the manifest's entries of the files."""
    writer = PartWriter(folder, rank)
    pieces.reverse()
    while pieces:
        writer.add(pieces.pop())
    return writer.finish()


def _sees(path: Path, content: str) -> bool:
    """Whether this rank sees a file of another rank, with time for a network file system to show it."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
