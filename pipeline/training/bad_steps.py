"""What the loop does about a bad step: record it, save for its replay, and past the quota go back or stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.batch import Batch
from pipeline.checkpoint import restore
from pipeline.checkpoint.verify import newest_whole
from pipeline.config.options import to_plain
from pipeline.engine.engine import BadStep, StepResult
from pipeline.incidents.guard import Guard
from pipeline.incidents.records import FOLDER, incident_folder, list_incidents, name_checkpoint, write_incident
from pipeline.incidents.rewind import SkippedBatches, decide_rewind, finish_setting_aside, ways_back
from pipeline.recording.environment import device_name
from pipeline.recording.sample_keys import SampleKeys, cut_back_sample_keys
from pipeline.training.session import Session


def record(s: Session, result: StepResult, micro_batches: Sequence[Batch], save: Callable[[], bool]) -> None:
    """Write down a step that was not taken, at once; every rank must call it, after ``state.step`` moved on.

    The weights are still those from before the step, so a checkpoint saved now replays it.
    """
    step, bad = s.state.step - 1, result.bad
    if bad is None:  # DeepSpeed's own doing
        values = {"reason": "DeepSpeed left the step out: a gradient is not finite", "precision": s.engine.precision}
        s.records.writer.log(s.state.step, values, kind="incident")
        if s.engine.precision != "fp16":
            _say(s, f"step {step} skipped: {values['reason']} (guard.enabled is false)")
        return
    wanted = s.guard.wants_checkpoint(step)
    if wanted:
        s.guard.saved_for, s.guard.untouched_since = step, s.state.step
    since = s.guard.untouched_since
    name = None if since is None else f"step_{since:08d}"
    mine = {"keys": [batch.keys for batch in micro_batches], "losses": bad.micro_sums, "seeds": bad.dropout_seeds}
    ranks = s.ranks.agreement.gather(mine)
    if s.ranks.place.is_main:
        try:
            write_incident(s.records.output, step, _content(s, step, result, ranks, name))
        except OSError as error:  # a full disk costs the record, not the run
            _say(s, f"ALARM: the incident of step {step} was not written: {error}")
    values = {"reason": bad.verdict.reason, "loss": bad.loss, "grad_norm": bad.grad_norm, "checkpoint": name}
    s.records.writer.log(s.state.step, values, kind="incident")
    folder = incident_folder(s.records.output, step)
    _say(s, f"step {step} skipped: {bad.verdict.reason}; python -m pipeline.replay {folder}")
    if wanted and not save():
        s.guard.untouched_since = None
        if s.ranks.place.is_main:
            with suppress(OSError):  # the disk that took no checkpoint, told before
                name_checkpoint(s.records.output, name, None)


def go_on(s: Session) -> bool:
    """Past the quota: go back to a checkpoint from before the bad steps, as configured; False when the run must stop.

    After True the session stands at that checkpoint on every rank, its ``batches`` have to be started again.
    """
    settings, recent = s.config.guard, list(s.guard.recent)
    many = f"{len(recent)} bad steps within {settings.window_steps} (guard.max_skips {settings.max_skips})"
    if settings.action == "stop":
        return _stop(s, f"{many}, and guard.action is stop")
    s.records.saver.wait()
    agreement, is_main = s.ranks.agreement, s.ranks.place.is_main
    ways = agreement.gather(_ways_back(s, recent) if is_main else None)[0]
    if isinstance(ways, str):
        return _stop(s, f"{many}, and {ways}")
    path, _ = newest_whole(ways, agreement)
    decided = agreement.gather(_decide(s, recent, path) if is_main else None)[0]
    if isinstance(decided, str):
        return _stop(s, f"{many}, and {decided}")
    remembered, aside = decided
    now = s.state.step
    s.batches.close()
    _stand_at(s, path, remembered.steps)
    skipped = [step for step in remembered.steps if step >= s.state.step]
    values = {"from_step": now, "checkpoint": path.name, "bad_steps": str(recent), "passed_by": str(skipped)}
    s.records.writer.log(s.state.step, values | {"set_aside": ", ".join(aside)}, kind="rewind")
    left = f"; checkpoints set aside: {', '.join(aside)}" if aside else ""
    _say(
        s,
        f"rewind {len(remembered.rewinds)} of {settings.max_rewinds}: {many}; back from step {now} to {path.name}, "
        f"skipping the batches of steps {skipped[0]} to {skipped[-1]} (RUN/passed_by.json){left}",
    )
    return True


def _ways_back(s: Session, recent: list[int]) -> list[Path] | str:
    """On rank 0: checkpoints to go back to, the best first; or why the run must stop."""
    settings = s.config.guard
    try:
        rewinds = len(SkippedBatches.read(s.records.output).rewinds)
        if rewinds >= settings.max_rewinds:
            return f"the run has gone back {rewinds} times (guard.max_rewinds {settings.max_rewinds})"
        return ways_back(s.records.output, recent[0], settings.go_around_before)
    except (OSError, ValueError) as error:
        return f"it cannot go back: {error}"


def _decide(s: Session, recent: list[int], path: Path | None) -> tuple[SkippedBatches, list[str]] | str:
    """On rank 0, given a valid checkpoint: batches to skip, checkpoints moved away; or why the run must stop."""
    if path is None:
        return f"there is no valid checkpoint from before step {recent[0]} to go back to"
    try:
        remembered = decide_rewind(s.records.output, path, recent, s.config.guard.go_around_before, s.state.step)
        return remembered, finish_setting_aside(s.records.output)
    except (OSError, ValueError) as error:
        return f"it cannot go back: {error}"


def _stand_at(s: Session, path: Path, passed_by: list[int]) -> None:
    """Set engine, state, records and loader to a checkpoint, in the middle of the process."""
    loaded, records = restore.load(path, s.engine, s.ranks.agreement), s.records
    kept = {name: getattr(s.state, name) for name in ("topology", "settings", "fingerprint", "data_changes")}
    vars(s.state).update(vars(loaded) | kept)
    s.state.passed_by = passed_by
    s.guard = Guard(s.config.guard, s.state.guard)
    s.records.saver.rewound(s.state.step)
    s.state.best = s.records.saver.best_of(s.state)
    s.records.writer.resume_from(s.state.step)
    records.sample_keys.close()
    s.ranks.agreement.wait()
    if s.ranks.place.is_main:
        cut_back_sample_keys(s.records.output, s.state.step)
    s.ranks.agreement.wait()
    records.sample_keys = SampleKeys(s.records.output, s.ranks.place.rank, s.config.tracking.sample_keys)
    records.unusable.return_to(s.state.step, s.state.unusable, s.state.unusable_shards)


def config_hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _content(
    s: Session, step: int, result: StepResult, ranks: list[dict[str, Any]], checkpoint_name: str | None
) -> dict[str, Any]:
    bad: BadStep = result.bad
    world, accumulation = s.ranks.place.world_size, s.engine.accumulation
    micro_batches = [
        {
            "slot": index * world + rank,
            "micro_batch": index,
            "rank": rank,
            "dropout_seed": ranks[rank]["seeds"][index],
            "losses": ranks[rank]["losses"][index],
            "keys": ranks[rank]["keys"][index],
        }
        for index in range(accumulation)
        for rank in range(world)
    ]
    config = to_plain(s.config)
    return {
        "step": step,
        "reason": bad.verdict.reason,
        "checkpoint": checkpoint_name,
        "loss": bad.loss,
        "terms": bad.terms,
        "counts": result.counts,
        "grad_norm": bad.grad_norm,
        "learning_rate": result.learning_rate,
        "thresholds": bad.verdict.thresholds,
        "statistics": s.guard.state(),
        "topology": {
            "world_size": world,
            "micro_batch_size": s.config.optim.micro_batch_size,
            "accumulation": accumulation,
            "zero_stage": s.engine.stage,
            "precision": s.engine.precision,
        },
        "rng": "torch.manual_seed(dropout_seed) before each forward pass; everything else random about a sample comes "
        "from seed, epoch, corpus and index",
        "first_position": step * s.config.optim.batch_size,
        "modules": bad.modules,
        "modules_are": "gradients of the whole step before clipping, fp32 master weights; norms over finite elements",
        "micro_batches": micro_batches,
        "torch": torch.__version__,
        "device": device_name(s.engine.device),
        "config_hash": config_hash(config),
        "config": config,
    }


def _stop(s: Session, why: str) -> bool:
    """Say why the run ends, with its incidents; False."""
    s.reason = why
    names = ", ".join(path.name for path in list_incidents(s.records.output)[-20:])
    s.ranks.say(f"error: {why}; the run stops. {s.records.output / FOLDER} holds {names}", error=True)
    return False


def _say(s: Session, line: str) -> None:
    s.ranks.say(f"guard: {line}", error=True)
