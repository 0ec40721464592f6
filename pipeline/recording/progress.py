"""How far a run is, for who watches it: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """A tqdm bar with ETA on a terminal, a plain line every so often elsewhere (job logs, pipes)."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        unit: str = "step",
        enabled: bool = True,
        stream: TextIO | None = None,
        interval_seconds: float = 15.0,
    ) -> None:
        self._total, self._start, self._unit, self._enabled = total, start, unit, enabled
        self._stream = stream or sys.stderr
        self._interval_seconds = interval_seconds
        self._shown = time.monotonic()
        self._bar = None
        self._step, self._postfix = start, ""
        self._line_step: int | None = None
        self._measured_from: tuple[int, float] | None = None  # the first step and when it was done: it may compile
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, unit=unit, file=self._stream, dynamic_ncols=True, smoothing=0.1
            )

    def update(self, step: int, postfix: Mapping[str, Any] | None = None) -> None:
        """Says that ``step`` is done; ``postfix`` are a few numbers shown behind it."""
        self._step = step
        if not self._enabled:
            return
        if self._measured_from is None:
            self._measure_from(step)
        if postfix is not None:
            shown = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in postfix.items()}
            self._postfix = ", ".join(f"{name} {value}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._shown >= self._interval_seconds:
            self._write_line()

    def close(self) -> None:
        """Ends the display; the last state stays visible."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._step > self._start and self._line_step != self._step:
            self._write_line()
        self._enabled = False

    def _measure_from(self, step: int) -> None:
        """Leave what was before out of the rate: set-up, an evaluation, the first step."""
        self._measured_from = step, time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.initial = self._bar.last_print_n = step
            self._bar.start_t = self._bar.last_print_t = self._bar._time()

    def _write_line(self) -> None:
        self._shown, self._line_step = time.monotonic(), self._step
        parts = [f"{self._unit} {self._step}/{self._total}"]
        first, since = self._measured_from or (self._step, self._shown)
        if (done := self._step - first) > 0:
            rate = done / max(self._shown - since, 1e-9)
            parts.append(f"{rate:.2f} {self._unit}s/s")
            if self._step < self._total:
                parts.append("ETA " + tqdm.format_interval(int((self._total - self._step) / rate)))
        elif self._step < self._total:
            parts.append("ETA: measuring")
        if self._postfix:
            parts.append(self._postfix)
        self._stream.write(" | ".join(parts) + "\n")
        self._stream.flush()
