"""Counts unusable samples by reason, names them in RUN/unusable.jsonl, and says when they are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.ranks import Agreement

FILE_NAME = "unusable.jsonl"
NUM_SHOWN = 20


class UnusableSamples:
    """The unusable samples of a run over all ranks. ``counts`` survives in checkpoints, the names in the file."""

    def __init__(
        self, run: Path, data: DataConfig, agreement: Agreement, is_main: bool, counts: Mapping[str, int] | None = None
    ) -> None:
        self.counts: Counter[str] = Counter(counts or {})
        self._path, self._data, self._agreement, self._is_main = run / FILE_NAME, data, agreement, is_main
        self._unnamed: list[tuple[int, str, str]] = []  # (step, key, reason) of this rank since the last naming
        self._total = sum(self.counts.values())
        self._recent: list[str] = []

    def note(self, step: int, problems: Iterable[tuple[str, str]]) -> int:
        """Remember this rank's problems of a step; returns how many there were."""
        before = len(self._unnamed)
        self._unnamed += [(step, key, reason) for key, reason in problems]
        return len(self._unnamed) - before

    def add_total(self, number: int) -> None:
        """``number`` more over all ranks, as the ranks agreed on."""
        self._total += number

    def too_many(self, samples_seen: int) -> bool:
        """Whether the budget of the configuration is spent; equal on every rank."""
        return self._total > self._data.bad_sample_budget + self._data.bad_sample_share * samples_seen

    def name(self) -> None:
        """Gather, count and write down what was noted since; every rank must call it."""
        if self._agreement.total([len(self._unnamed)])[0] == 0:
            return
        rows = sorted(row for rank in self._agreement.gather(self._unnamed) for row in rank)
        self._unnamed = []
        self.counts.update(reason for _, _, reason in rows)
        self._recent = (self._recent + [f"{key} ({reason})" for _, key, reason in rows])[-NUM_SHOWN:]
        if self._is_main:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(dict(step=s, key=k, reason=r)) + "\n" for s, k, r in rows)

    def verdict(self) -> str:
        """The one line that ends a run whose budget is spent."""
        reasons = ", ".join(f"{number} x {reason}" for reason, number in self.counts.most_common())
        return (
            f"too many unusable samples: {reasons}; the last are {', '.join(self._recent[-5:])}; all stand in "
            f"{self._path}; mend them (python -m data_prep verify) or raise data.bad_sample_budget"
        )
