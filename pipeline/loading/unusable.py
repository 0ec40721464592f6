"""Counts unusable samples by reason, names each of them or its shard once, and tells when the budget is spent."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.manifest import write_atomically
from pipeline.config.options import DataConfig
from pipeline.data.open_shards import SHARD_REASONS
from pipeline.distributed.ranks import Agreement
from pipeline.recording.step_lines import StepLines, cut_back

FILE_NAME = "unusable.jsonl"
SHARDS_NAME = "unusable_shards.json"
NUM_SHOWN = 20


class UnusableSamples:
    """The unusable samples of a run over all ranks.

    ``counts`` (samples by reason) and ``shards`` (name -> reason, samples it cost so far, step of the first) survive in
    checkpoints. RUN/unusable.jsonl names each sample that is bad by itself, RUN/unusable_shards.json each bad shard.
    """

    def __init__(
        self,
        run: Path,
        data: DataConfig,
        agreement: Agreement,
        is_main: bool,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._run, self._data, self._agreement, self._is_main = run, data, agreement, is_main
        self._recent: list[str] = []
        self._lines = StepLines(run / FILE_NAME)
        self._alarmed = False
        self._begin(counts or {}, {})

    def _begin(self, counts: Mapping[str, int], shards: Mapping[str, dict[str, Any]]) -> None:
        self.counts: Counter[str] = Counter(counts)
        self.shards: dict[str, dict[str, Any]] = copy.deepcopy(dict(shards))
        self._total = sum(self.counts.values())
        self._unnamed: list[tuple[int, str, str]] = []  # (step, key, reason) of this rank since the last naming

    def return_to(self, step: int, counts: Mapping[str, int], shards: Mapping[str, dict[str, Any]]) -> None:
        """Return to the counts of ``step``, to which the run has gone back; every rank must call it."""
        self._begin(counts, shards)
        if self._is_main:
            self._lines.close()
            cut_back(self._run / FILE_NAME, step)
            self._lines = StepLines(self._run / FILE_NAME)
            if self.shards or (self._run / SHARDS_NAME).exists():
                self._write_shards()

    def note(self, step: int, problems: Iterable[tuple[str, str]]) -> int:
        """Remember this rank's problems of a step; returns how many there were."""
        before = len(self._unnamed)
        self._unnamed += [(step, key, reason) for key, reason in problems]
        return len(self._unnamed) - before

    def add_total(self, number: int) -> None:
        """Add ``number`` unusable samples, already summed over all ranks."""
        self._total += number

    def too_many(self, samples_seen: int) -> bool:
        """Whether the budget of the configuration is spent; equal on every rank."""
        return self._total > self._data.bad_sample_budget + self._data.bad_sample_share * samples_seen

    def name(self) -> None:
        """Gather, count and record the samples noted since the last call; every rank must call it."""
        if self._agreement.total([len(self._unnamed)])[0] == 0:
            return
        rows = sorted(row for rank in self._agreement.gather(self._unnamed) for row in rank)
        self._unnamed = []
        self.counts.update(reason for _, _, reason in rows)
        samples = [row for row in rows if row[2] not in SHARD_REASONS]
        for step, key, reason in rows:
            if reason in SHARD_REASONS:
                self._charge(key.partition("#")[0], step, reason)
        self._recent = (self._recent + [f"{key} ({reason})" for _, key, reason in samples])[-NUM_SHOWN:]
        if self._is_main:
            for sample_step, key, reason in samples:
                self._lines.write({"step": sample_step, "key": key, "reason": reason})
            if len(samples) < len(rows):
                self._write_shards()

    def verdict(self) -> str:
        """The error line of a run whose budget is spent."""
        reasons = ", ".join(f"{number} x {reason}" for reason, number in self.counts.most_common())
        worst = sorted(self.shards.items(), key=lambda item: -item[1]["samples"])[:NUM_SHOWN]
        named = [f"{name} ({found['reason']}, {found['samples']} samples)" for name, found in worst]
        parts = [f"shards {', '.join(named)}"] if named else []
        parts += [f"the last samples are {', '.join(self._recent[-5:])}"] if self._recent else []
        return (
            f"too many unusable samples: {reasons}; {'; '.join(parts)}; all are listed in {self._run / FILE_NAME} "
            f"and {SHARDS_NAME}; repair them (python -m data_prep verify) or raise data.bad_sample_budget"
        )

    def _charge(self, shard: str, step: int, reason: str) -> None:
        if shard not in self.shards:
            self.shards[shard] = {"reason": reason, "samples": 0, "since_step": step}
            if self._is_main:
                print(f"warning: {reason} {shard}, since step {step}; its samples are skipped", file=sys.stderr)
        self.shards[shard]["samples"] += 1

    def _write_shards(self) -> None:
        try:
            write_atomically(self._run / SHARDS_NAME, json.dumps(self.shards, indent=1) + "\n")
            self._alarmed = False
        except OSError as error:  # a disk costs the list, not the run
            if not self._alarmed:
                print(f"ALARM: {SHARDS_NAME} was not written: {error}; the run goes on", file=sys.stderr, flush=True)
            self._alarmed = True
