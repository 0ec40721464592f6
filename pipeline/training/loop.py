"""The training loop: steps, and on their beat logs, evaluations and checkpoints; ranks agree when to stop."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from model.batch import Batch
from pipeline.cluster.heartbeats import EVALUATION, SAVING, SET_UP, STEP
from pipeline.distributed.endings import EXIT_DONE, EXIT_MEND, EXIT_REQUEUE
from pipeline.recording.progress import Progress
from pipeline.reporting.page import report_or_warn
from pipeline.tasks.evaluation import Run, evaluate
from pipeline.training import bad_steps
from pipeline.training.meter import StepMeter
from pipeline.training.session import Session


def train(s: Session) -> int:
    """Train to the last step; returns the exit code. Every rank runs the same beats."""
    total = s.config.train.steps
    records = s.records
    progress = Progress(total, s.state.step, enabled=s.ranks.place.is_main)
    try:
        code = _steps(s, progress) if _evaluate_what_is_due(s) else EXIT_REQUEUE
        progress.close()
        if code == EXIT_DONE and s.state.step < total:
            _say_early_stop(s)
        if code == EXIT_DONE and s.state.step and not _evaluate(s):
            code = EXIT_REQUEUE
        if code == EXIT_REQUEUE:
            s.reason = f"told to stop by {s.ranks.stop.signal_name or 'a signal to another rank'}"
        if code in (EXIT_DONE, EXIT_REQUEUE):
            _save(s, reason="end")
        was_saved = _wait_for_save(s)
        if not was_saved and code == EXIT_DONE:
            s.reason, code = f"the checkpoint of step {s.state.step} was not written", EXIT_MEND
    finally:
        progress.close()
        records.writer.close()
        records.sample_keys.close()
    if s.config.tracking.report and s.ranks.place.is_main:
        report_or_warn(records.output, sys.stdout)
    if code == EXIT_REQUEUE:
        saved = f"saved step {s.state.step}" if was_saved else f"step {s.state.step} is not saved (see above)"
        s.ranks.say(f"{saved}; the same command goes on")
    return code


def _steps(s: Session, progress: Progress) -> int:
    """All steps from the state's on, up to the last or to a reason to stop."""
    settings, state, records = s.config.train, s.state, s.records
    meter = StepMeter(s.engine.term_weights, s.ranks.agreement, s.engine.device, s.engine.precision)
    batches, first = s.batches.start(state.step, state.passed_by), True
    while state.step < settings.steps and not _out_of_patience(s):
        if state.step in state.passed_by:  # without a batch and a step, position and schedule advance
            _advance(s)
            continue
        phase = SET_UP if first else STEP  # the first step may compile
        first = False
        s.pulse.move(phase, "reads its data", state.step + 1)
        micro_batches, waited = _collect(batches, s.engine.accumulation)
        s.pulse.move(phase, "computes")
        records.sample_keys.write(state.step + 1, micro_batches)
        result = s.engine.step(state.step, micro_batches, s.guard, partial(_votes, s, micro_batches))
        told_to_stop, unusable, saving_ranks, minutes_over = result.votes
        s.pulse.move(STEP, "goes on after a step")
        _advance(s)
        meter.add(result, micro_batches, waited, sum(s.engine.objective.flops(batch) for batch in micro_batches))
        records.unusable.add_total(int(unusable))
        records.saver.advance(saving_ranks)
        if not result.taken:
            bad_steps.record(s, result, micro_batches, partial(_save, s, reason="incident"))
        if result.bad is not None and s.guard.over_quota:
            s.pulse.move(SET_UP, "goes back to a checkpoint")
            if not bad_steps.go_on(s):
                return EXIT_MEND
            _note_logged(s)
            batches = s.batches.start(state.step, state.passed_by)
            meter.restart()
            continue

        last = state.step == settings.steps
        saving = _on_beat(state.step, settings.save_every) or minutes_over or last or told_to_stop
        evaluating = _on_beat(state.step, settings.eval_every) and not last
        too_many = records.unusable.too_many(state.samples_seen)
        logging = _on_beat(state.step, settings.log_every) or saving or evaluating or too_many
        if logging:
            finite = s.guard is not None or meter.is_finite()
            _log(s, meter, progress)
            if not finite:
                return _explain(s, f"the loss is not finite at step {state.step}, and guard.enabled is false")
        else:
            progress.update(state.step)
        if too_many:
            _save(s, reason="unusable")
            return _explain(s, records.unusable.verdict())
        if told_to_stop:
            return EXIT_REQUEUE
        if saving and not last:
            _save(s, reason="minutes" if minutes_over else "beat")
        if evaluating and not _evaluate(s):
            return EXIT_REQUEUE
        if (saving or evaluating) and _told_to_stop(s) and not last:  # meanwhile: before another step has to be saved
            return EXIT_REQUEUE
        if logging:
            meter.restart()
    return EXIT_DONE


def _told_to_stop(s: Session) -> bool:
    return s.ranks.agreement.total([s.ranks.stop.requested])[0] > 0


def _advance(s: Session) -> None:
    """One step further in the sample order."""
    s.state.step += 1
    s.state.samples_seen += s.config.optim.batch_size
    if s.stager is not None:
        s.stager.follow(s.state.step)


def _collect(batches: Iterator[Batch], accumulation: int) -> tuple[list[Batch], float]:
    """This rank's micro-batches of the next step, and how long they were waited for."""
    began = time.perf_counter()
    micro_batches = [next(batches) for _ in range(accumulation)]
    return micro_batches, time.perf_counter() - began


def _votes(s: Session, micro_batches: list[Batch]) -> list[float]:
    """What this rank adds to the sums that all ranks learn of once a step."""
    problems = [problem for batch in micro_batches for problem in batch.problems]
    return [s.ranks.stop.requested, s.records.unusable.note(s.state.step + 1, problems), *s.records.saver.votes()]


def _log(s: Session, meter: StepMeter, progress: Progress) -> None:
    _name_unusable(s)
    values = meter.read(s.engine)
    values["samples_seen"] = s.state.samples_seen
    unusable = s.records.unusable
    values["bad_samples"], values["bad_shards"] = sum(unusable.counts.values()), len(unusable.shards)
    values |= {f"bad_samples/{reason}": number for reason, number in unusable.counts.items()}
    s.records.writer.log(s.state.step, values)
    shown = {"loss": values["loss"], "samples/s": values["samples_per_second"]}
    progress.update(s.state.step, shown | {"data wait": f"{values['data_wait_share']:.0%}"})


def _evaluate_what_is_due(s: Session) -> bool:
    """The evaluation before the first step, or the one that a killed run owed after the step it continues from."""
    step = s.state.step
    due = step == 0 or (_on_beat(step, s.config.train.eval_every) and step < s.config.train.steps)
    return not due or _evaluate(s)


def _evaluate(s: Session) -> bool:
    """Evaluate and log, once a step; False when told to stop meanwhile. Nothing held out counts as done."""
    passes, agreement = s.evaluation.passes, s.ranks.agreement
    if not passes or _note_logged(s):
        return True
    limit = s.config.train.save_before_eval_seconds
    if s.state.step and 0 < limit < s.state.eval_seconds:
        _save(s, reason="before evaluation")
        _wait_for_save(s)
    began = time.perf_counter()
    s.pulse.move(EVALUATION, "evaluates")
    with s.engine.scoring() as run:
        folder = s.records.output / "evaluations" / f"held_out-step_{s.state.step:08d}"
        values = evaluate(_counted(run, s), passes, agreement, s.ranks.stop, folder)
    s.pulse.move(STEP, "goes on after an evaluation")
    if values is None:
        return False
    s.state.eval_seconds = agreement.largest(time.perf_counter() - began)
    _note_best(s, values)
    s.records.writer.log(s.state.step, values | {"seconds": s.state.eval_seconds}, kind="eval")
    headline = [score.name for score in s.evaluation.scores[:2]]
    names = [*headline, *(f"{one.name}{name}" for one in passes if one.name for name in headline)]
    shown = [f"{name} {values[name]:.4f}" for name in names if name in values]
    s.ranks.say(f"held out after step {s.state.step}: {', '.join(shown)}")
    return True


def _counted(run: Run, s: Session) -> Run:
    """``run`` as it is, every call of which is a step forward."""

    def counted(function: Callable[[Any, Batch], Any], batch: Batch) -> Any:
        s.pulse.move(EVALUATION, "evaluates")
        return run(function, batch)

    return counted


def _note_logged(s: Session) -> bool:
    """Whether this step's evaluation is in the log; what follows from it may be missing in the checkpoint of the step,
    which can be written before the evaluation."""
    values = s.ranks.agreement.gather(s.records.writer.record(s.state.step, "eval"))[0]
    if values is not None:
        _note_best(s, values)
    return values is not None


def _note_best(s: Session, values: dict[str, Any]) -> None:
    """Save what scores better than everything before, so that retention can keep it; count what does not."""
    metric, step = s.config.train.keep_best, s.state.step
    if metric is None or metric not in values or not step:
        return
    score = next(score for score in s.evaluation.scores if score.name == metric)
    best = _best(s)
    if score.improves(values[metric], best["value"] if best else None):
        s.state.best, s.state.not_better = {"metric": metric, "value": values[metric], "step": step}, []
        _save(s, reason="best")
        s.records.saver.note_best(s.state.best)
    else:
        s.state.not_better = sorted({*s.state.not_better, step})


def _best(s: Session) -> dict[str, Any] | None:
    """The best evaluation so far, None if it was judged by another value than now."""
    best = s.state.best
    return best if best and best["metric"] == s.config.train.keep_best else None


def _out_of_patience(s: Session) -> bool:
    """Whether train.patience evaluations in a row were not better than the best."""
    patience, best = s.config.train.patience, _best(s)
    if not patience or (s.state.best and not best):
        return False
    return sum(step > (best["step"] if best else 0) for step in s.state.not_better) >= patience


def _say_early_stop(s: Session) -> None:
    """Say it, and log it once: the run ends here at every further start with the same patience."""
    train, best, step = s.config.train, _best(s), s.state.step
    before = f"better than {best['value']:.4f} of step {best['step']}" if best else "a finite number"
    reason = f"{train.keep_best} was not {before} in {train.patience} evaluations (train.patience)"
    s.ranks.say(f"ends after step {step} of {train.steps}: {reason}")
    if not s.ranks.agreement.gather(s.records.writer.record(step, "early_stop"))[0]:
        s.records.writer.log(step, {"reason": reason}, kind="early_stop")


def _name_unusable(s: Session) -> None:
    unusable = s.records.unusable
    unusable.name()
    s.state.unusable, s.state.unusable_shards = dict(unusable.counts), copy.deepcopy(unusable.shards)


def _save(s: Session, reason: str) -> bool:
    """Begin to save the run, unless this step is saved already; False, with an alarm, when that is impossible.

    ``Saver.wait`` completes it; otherwise it completes behind the next steps.
    """
    s.pulse.move(SAVING, "saves")
    _name_unusable(s)
    s.state.skipped_steps = s.engine.skipped_steps
    s.state.guard = s.guard.state() if s.guard is not None else s.state.guard
    begun = s.records.saver.save(s.state)
    s.pulse.move(STEP, "goes on after a save")
    return begun


def _wait_for_save(s: Session) -> bool:
    """Wait for a save in flight; whether the last one succeeded."""
    s.pulse.move(SAVING, "waits for a save")
    succeeded = s.records.saver.wait()
    s.pulse.move(STEP, "goes on after a save")
    return succeeded


def _on_beat(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _explain(s: Session, reason: str) -> int:
    s.ranks.say(f"error: {reason}", error=True)
    s.reason = reason
    return EXIT_MEND
