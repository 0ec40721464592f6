"""Which objective learns fastest? Trains rows of configurations under one budget and measures what each has learnt.

    python -m benchmarks.speedrun --data DIR... --output OUT (--budget-minutes M | --budget-tflop F | --steps N)

Each row and seed is a real training (pipeline/train.py) whose learning rate has its whole schedule within the budget;
probes run on its checkpoints, off the clock. OUT gets table.md, curves.svg, scores.svg and results.json. The same
command again goes on where it was. Exit codes: 0 done, 1 a training failed, 2 a mistake in the command, 75 or 130 told
to stop.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.probes import __main__ as probes
from benchmarks.speedrun import finetuning
from benchmarks.speedrun.curves import Run, read_run
from benchmarks.speedrun.display import Display
from benchmarks.speedrun.jobs import ROOT, Job, Stopped, run_jobs
from benchmarks.speedrun.joining import IDENTITY, SOURCES, join
from benchmarks.speedrun.options import parse, probe_words, shared_words, shown, without_folders
from benchmarks.speedrun.plan import (
    ROUNDS,
    accept_command,
    calibration_order,
    cost_of,
    costs_from,
    costs_to,
    hours_of_training,
    identity,
    packed,
    read_json,
    steps_within,
    too_few_steps,
    write_json,
)
from benchmarks.speedrun.report import FILES, Findings, write_report
from benchmarks.speedrun.rows import Row, as_arguments, check_models, load_rows, target_rows, with_packaged_weights
from pipeline.checkpoint.files import published, remove
from pipeline.config.options import ConfigError, fail, weighted_paths
from pipeline.config.recipes import find_recipe
from pipeline.data.shard_reader import open_corpora
from pipeline.data.tokenizer import tokenizer_of
from pipeline.distributed.host_cores import usable_cores
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.run_lock import lock_run
from pipeline.loading.open_data import open_held_out
from pipeline.recording.environment import describe_environment
from pipeline.recording.run_log import LOG_NAME, read_log

EXIT_DONE, EXIT_FAILED = 0, 1
_OF_THE_REPORT = ("command", "git_revision", "git_changed")  # of an environment: said of the trainings instead
NEIGHBOURS = "neighbours.json"
DONE = "done.json"  # in a run folder: trained to the end and probed
ALWAYS = {  # of every training
    "train.eval_every": 0,
    "train.save_minutes": 0,
    "train.save_before_eval_seconds": 0,
    "train.async_save": False,  # a save behind training would slow the steps that are timed
    "tracking.tensorboard": False,
    "tracking.wandb": False,
    "tracking.report": False,
}
CALIBRATION = {"data.eval_split": None, "train.save_every": 0, "train.keep_last": 1, "train.seed": 0}
CALIBRATION_LINES = 8


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv, __doc__)
    try:
        speedrun = Speedrun(arguments)
        if arguments.report_only:
            return speedrun.report([])
        return speedrun.run()
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on from here", file=sys.stderr, flush=True)
        return stopped.exit_code
    except ValueError as error:
        return fail(error)


class Speedrun:
    """One command in its folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises ValueError for whatever can be seen to be wrong before anything is started."""
        self.arguments, self.output = arguments, arguments.output
        self.budget = arguments.budget
        self.rows = load_rows(arguments.rows, shared_words(arguments), arguments.only)
        self.target_rows = target_rows(self.rows, arguments.target)
        data = self.rows[0].config.data
        ready = with_packaged_weights(self.rows)
        tokenizer = tokenizer_of(ready[0].config)
        check_models(ready, tokenizer.vocabulary)
        for row in self.rows:
            finetuning.check(arguments.finetune, row.config)
        corpora = open_corpora([path for path, _ in weighted_paths(data)], data.train_split)
        held_out = open_held_out(self.rows[0].config)
        if not held_out:
            raise ValueError(
                f"no split {data.eval_split!r} in {', '.join(data.paths)}; the probes need held-out images: prepare it"
            )
        self.corpora = {f"{c.name}/{c.manifest.split}": [len(c), c.fingerprint] for c in [*corpora, *held_out]}
        self.several_captions = all(len(corpus) >= 2 * corpus.manifest.samples for corpus in held_out)
        self.tokenizer = tokenizer.fingerprint
        note = self.output / "speedrun.json"
        if arguments.report_only and not note.is_file():
            raise ValueError(f"{self.output}: found no speedrun to report on; leave --report-only out to begin one")
        self.lock = None if arguments.report_only else lock_run(self.output, wait_seconds=1)
        self.identity = identity(self.rows, self._fixed())
        self.joined = join(arguments.join, self.identity, arguments.seeds, arguments.clock)
        accept_command(note, self.identity, arguments.seeds)
        self.costs = self.joined.costs | costs_from(read_json(self.output / "calibration.json"))
        self._check_steps_of_joined()

    def run(self) -> int:
        """Calibrate, train and probe what is not done yet, report."""
        stop = StopRequest().listen()
        self._say_how_long()
        failures = [] if self.budget.kind == "steps" else self.calibrate(stop)
        if failures:
            return self.report(failures)
        steps = {row.name: self.steps(row) for row in self.rows}
        every = [(row, seed) for seed in self.arguments.seeds for row in self.rows]
        due = [(row, seed) for row, seed in every if not self.is_done(row, seed)]
        for row in self.rows:
            print(f"{row.name}: {steps[row.name]} steps{self._expected(row)}", flush=True)
            if line := too_few_steps(row.name, steps[row.name]):
                print(line, file=sys.stderr, flush=True)
        print(f"{len(every)} trainings, {len(every) - len(due)} of them done", flush=True)
        jobs = [self.training(row, seed) for row, seed in due]
        failures = self._run(jobs, stop, done=len(every) - len(due))
        return self.report(failures + self.ask_neighbours(stop))

    def _say_how_long(self) -> None:
        """What the whole command takes, before anything is started."""
        arguments, rows, seeds = self.arguments, len(self.rows), len(self.arguments.seeds)
        hours = hours_of_training(self.budget, self.rows, seeds, arguments.jobs)
        how = f"{rows} rows x {seeds} seeds, {arguments.jobs} at a time"
        told = f"about {hours:.1f} hours of training" if hours is not None else f"{self.budget} of training for each"
        print(f"{told} ({how}), besides calibration and probes; --only ROW... and --seeds make it less", flush=True)

    def calibrate(self, stop: StopRequest) -> list[str]:
        """Measure what each row costs, unless that is known; rows of equal options share it. Returns what failed."""
        distinct = {repr(sorted(row.options.items())): row for row in reversed(self.rows)}
        due = [row for row in reversed(distinct.values()) if row.name not in self.costs]
        rounds = range(ROUNDS if self.budget.kind == "minutes" else 1)
        if due:
            print(f"calibration: {len(due)} rows, {len(rounds)} rounds of {self.arguments.calibration_steps} steps")
        jobs = []
        for number in rounds:
            jobs += [job for row in calibration_order(due, number) for job in self.calibration(row, number)]
        failures = self._run(jobs, stop)
        if failures:
            return failures
        for row in due:
            folders = [self.calibration_folder(row, number) for number in rounds]
            self.costs[row.name] = cost_of([read_log(folder / LOG_NAME) for folder in folders])
        for row in self.rows:
            self.costs[row.name] = self.costs[distinct[repr(sorted(row.options.items()))].name]
        write_json(self.output / "calibration.json", costs_to(self.costs))
        return []

    def ask_neighbours(self, stop: StopRequest) -> list[str]:
        """Score captions that need no language model, once, where a frozen tower says which images are alike."""
        finished = [self.run_folder(row, seed) for row in self.rows for seed in self.arguments.seeds]
        finished = [folder for folder in finished if (folder / DONE).is_file()]
        frozen = all(row.config.model.vision.frozen for row in self.rows)
        if not finished or not frozen or not self.several_captions or self.neighbours():
            return []
        words = ["--run", str(finished[0]), "--output", str(self.output / NEIGHBOURS)]
        words += ["--caption-images", str(self.arguments.caption_images)]
        command = [sys.executable, "-m", "benchmarks.probes.neighbours", *words]
        output = (self.output / NEIGHBOURS).with_suffix(".out")
        return self._run([Job(label="captions of neighbours", commands=[command], output=output)], stop)

    def neighbours(self) -> dict[str, float]:
        """The scores of those captions, empty before they are known."""
        return read_json(self.output / NEIGHBOURS) or self.joined.neighbours

    def steps(self, row: Row) -> int:
        return steps_within(self.budget, row, self.costs.get(row.name), self.arguments.evaluations)

    def calibration(self, row: Row, number: int) -> list[Job]:
        """A short training of a row, none if it is done; a round that was cut off is done again from its start."""
        folder, steps = self.calibration_folder(row, number), self.arguments.calibration_steps
        if _last_step(folder) == steps:
            return []
        shutil.rmtree(folder, ignore_errors=True)
        settings = {
            **ALWAYS,
            **CALIBRATION,
            "train.steps": steps,
            "train.log_every": max(1, steps // CALIBRATION_LINES),
        }
        job = Job(
            label=f"calibration of row {row.name}",
            commands=[self._train(row, folder, settings)],
            output=folder.with_suffix(".out"),
            finish=partial(shutil.rmtree, folder / "checkpoints", ignore_errors=True),
        )
        return [job]

    def training(self, row: Row, seed: int) -> Job:
        """A training and the probes on its checkpoints."""
        folder, steps, beat = self.run_folder(row, seed), self.steps(row), self.beat(row)
        settings = {
            **ALWAYS,
            "train.steps": steps,
            "train.seed": seed,
            "train.save_every": beat,
            "train.keep_every": beat,
            "train.keep_last": 1,
        }
        return Job(
            label=f"row {row.name}, seed {seed}",
            commands=[
                self._train(row, folder, settings),
                self._probe(folder),
                *self._finetune(row, folder, seed),
            ],
            output=folder.with_suffix(".out"),
            work=steps * (self.costs[row.name].step_seconds if row.name in self.costs else 1.0),
            begun=lambda: _last_step(folder) / steps,
            finish=partial(self._finish, folder, steps),
        )

    def beat(self, row: Row) -> int:
        """Steps from one probed checkpoint of a training to the next."""
        return self.steps(row) // self.arguments.evaluations

    def report(self, failures: list[str]) -> int:
        """Write what is known by now; returns the exit code."""
        runs = {}
        for row in self.rows:
            seeds = [seed for seed in self.arguments.seeds if self.is_done(row, seed)]
            if seeds:
                runs[row.name] = [self.joined.runs.get((row.name, seed)) or self._read(row, seed) for seed in seeds]
        failures = failures + self._unequal_starts([run for of_row in runs.values() for run in of_row])
        if runs:
            findings = Findings(self.rows, runs, self.costs, self._facts(), failures, self.target_rows)
            print(write_report(self.output, findings))
            print(f"written: {', '.join(str(self.output / name) for name in FILES)}")
        for failure in failures or ([] if runs else ["no training has been finished and probed yet"]):
            print(f"error: {failure}", file=sys.stderr, flush=True)
        return EXIT_FAILED if failures or not runs else EXIT_DONE

    def _read(self, row: Row, seed: int) -> Run:
        folder = self.run_folder(row, seed)
        step_seconds = self.costs[row.name].step_seconds if self.arguments.clock == "calibrated" else None
        run = read_run(folder, row.name, seed, row.config.optim.batch_size, self.beat(row), step_seconds)
        run.last.probes |= finetuning.scores(folder)
        starts = read_json(folder / DONE).get("starting_weights")
        run.starting_weights = starts and {part: start and without_folders(start) for part, start in starts.items()}
        return run

    def _check_steps_of_joined(self) -> None:
        """Raise ConfigError where a training of another folder is not as long as this folder's calibration asks for."""
        for row in self.rows:
            for seed in self.arguments.seeds:
                run = self.joined.runs.get((row.name, seed))
                if run and run.last.step != self.steps(row):
                    raise ConfigError(
                        f"--join: row {row.name}, seed {seed} has {run.last.step} steps, here it would have "
                        f"{self.steps(row)}: {self.output} was calibrated by itself; give another --output"
                    )

    def _unequal_starts(self, runs: Sequence[Run]) -> list[str]:
        """What is wrong where, of runs that asked for the same weights, some got them from a hub and some did not."""
        models = {row.name: row.config.model for row in self.rows}
        starts: dict[str, dict[str, str]] = {}  # asked -> got -> the first run that did
        for run in runs:
            model = models[run.row]
            parts = (model.vision.pretrained, model.text.pretrained, model.language.name, model.connector.pretrained)
            asked = str((model.weights, *parts))
            if run.starting_weights is not None:
                got = starts.setdefault(asked, {})
                got.setdefault(str(run.starting_weights), f"row {run.row}, seed {run.seed}")
        return [
            "the runs did not start from the same weights, so they cannot be compared: "
            + "; ".join(f"{run} from {weights}" for weights, run in got.items())
            for got in starts.values()
            if len(got) > 1
        ]

    def is_done(self, row: Row, seed: int) -> bool:
        return (row.name, seed) in self.joined.runs or (self.run_folder(row, seed) / DONE).is_file()

    def run_folder(self, row: Row, seed: int) -> Path:
        return self.output / "runs" / row.name / f"seed_{seed}"

    def calibration_folder(self, row: Row, number: int) -> Path:
        return self.output / "calibration" / row.name / f"round_{number}"

    def _train(self, row: Row, folder: Path, settings: dict[str, Any]) -> list[str]:
        """The command of a training, under the launcher if it has several ranks."""
        ranks, launcher = self.arguments.ranks, [sys.executable]
        if ranks > 1:
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning"]
            launcher += ["--num_gpus", str(ranks)]
        script = [str(ROOT / "pipeline" / "train.py"), *shared_words(self.arguments), "--output", str(folder)]
        return [*launcher, *script, *row.arguments, *as_arguments(settings)]

    def _probe(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", "benchmarks.probes", "--run", str(folder), *probe_words(self.arguments)]

    def _finetune(self, row: Row, folder: Path, seed: int) -> list[list[str]]:
        return [
            command
            for one in self.arguments.finetune
            for command in finetuning.commands(one, folder, row.config, {**ALWAYS, "train.seed": seed})
        ]

    def _run(self, jobs: list[Job], stop: StopRequest, done: int = 0) -> list[str]:
        threads = max(1, usable_cores() // (self.arguments.jobs * self.arguments.ranks))
        return run_jobs(jobs, self.arguments.jobs, threads, stop, Display(jobs, done))

    def _finish(self, folder: Path, steps: int) -> None:
        """Note that a run is trained and probed; of its checkpoints the last one stays, unless all shall."""
        measured = [record["step"] for record in probes.read_probes(folder)]
        assert measured and measured[-1] == steps, f"{folder}: probed at {measured}, expected the last to be {steps}"
        write_json(folder / DONE, {"steps": steps, "starting_weights": probes.starting_weights(folder)})
        if not self.arguments.keep_checkpoints:
            for path in published(folder)[:-1]:
                remove(path)
            for one in self.arguments.finetune:
                for path in published(folder / finetuning.FOLDER / one.name):
                    remove(path)

    def _expected(self, row: Row) -> str:
        cost = self.costs.get(row.name)
        if cost is None:
            return ""
        minutes = self.steps(row) * cost.step_seconds / 60
        return f", {cost.step_seconds:.3f} s and {cost.gflop_per_sample:.3g} GFLOP/sample each: {minutes:.1f} min"

    def _fixed(self) -> dict[str, Any]:
        """What must stay the same besides the rows."""
        arguments = self.arguments
        named = ("evaluations", "jobs", "ranks", *(f"{name}_images" for name, _, _ in probes.IMAGES))
        fixed = {name: getattr(arguments, name) for name in named}
        if arguments.finetune:
            fixed["finetune"] = list(map(str, arguments.finetune))
        return {"budget": str(self.budget), **fixed, "data": self.corpora, "tokenizer": self.tokenizer}

    def _facts(self) -> dict[str, Any]:
        """What the report says about the command; folders outside the working one by their name only."""
        arguments = self.arguments
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        words = [shown(word) for word in arguments.words]
        machine = {k: v for k, v in describe_environment(device).items() if k not in _OF_THE_REPORT}
        return {
            "command": shlex.join(["python", "-m", "benchmarks.speedrun", *words]),
            "budget": str(self.budget),
            "seeds": arguments.seeds,
            "evaluations": arguments.evaluations,
            "jobs": arguments.jobs,
            "ranks": arguments.ranks,
            "clock": arguments.clock,
            "neighbours": self.neighbours(),
            "finetune": [str(one) for one in arguments.finetune],
            "recipe": find_recipe(arguments.recipe).stem,
            "data": ", ".join(f"{name} ({size} pairs)" for name, (size, _) in self.corpora.items()),
            "machine": machine,
            "revisions": self._revisions(),
            SOURCES: self.joined.sources,
            IDENTITY: packed(self.identity),
        }

    def _revisions(self) -> list[str]:
        """The revisions of the code that the finished trainings ran, which need not be this report's."""
        folders = [self.run_folder(row, seed) for row in self.rows for seed in self.arguments.seeds]
        noted = [read_json(folder / "environment.json") for folder in folders if (folder / DONE).is_file()]
        return sorted(
            {
                (note.get("git_revision") or "unknown")[:12] + (" with changes" if note.get("git_changed") else "")
                for note in noted
            }
        )


def _last_step(folder: Path) -> int:
    return max((record["step"] for record in read_log(folder / LOG_NAME)), default=0)


if __name__ == "__main__":
    sys.exit(main())
