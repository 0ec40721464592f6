"""The run state that a checkpoint holds besides tensors, and the protocol of an engine that gives and takes tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pipeline.checkpoint.files import Piece

Ranges = Sequence[tuple[str, int, int]]  # (name, first element, end) of flattened tensors
ReadRanges = Callable[[str, Ranges], list[Tensor]]  # (kind, ranges) -> their elements, on the host


@dataclass
class RunState:
    """Everything besides tensors that a resume needs; random draws are functions of seed and position."""

    step: int = 0  # optimizer steps done
    samples_seen: int = 0  # position in the global sample order
    optimizer_steps: int = 0  # steps Adam has taken
    skipped_steps: int = 0
    loss_scale: dict[str, float] | None = None
    unusable: dict[str, int] = field(default_factory=dict)  # samples by reason
    unusable_shards: dict[str, dict[str, Any]] = field(default_factory=dict)  # name: reason, samples, since_step
    topology: dict[str, Any] = field(default_factory=dict)  # ranks, ZeRO stage and precision that wrote it
    settings: dict[str, Any] = field(default_factory=dict)  # settings that a resume may change, by option
    fingerprint: dict[str, Any] = field(default_factory=dict)  # settings and data that a resume must share
    data_changes: list[dict[str, Any]] = field(default_factory=list)  # allowed changes of data, each with its step
    frozen: dict[str, Any] | None = None  # weights that are not in the files: their source, names and SHA-256
    best: dict[str, Any] | None = None  # best held-out value so far: metric, value, step
    not_better: list[int] = field(default_factory=list)  # steps of the evaluations after the best
    guard: dict[str, Any] = field(default_factory=dict)  # Guard.state()
    passed_by: list[int] = field(default_factory=list)  # steps whose batch is skipped
    eval_seconds: float = 0.0  # duration of the last evaluation


class TrainingState(Protocol):
    """Weights, moments and counters of an engine, whatever divides them over ranks (``engine/engine.py`` has them).

    Every rank must make every call.
    """

    frozen: dict[str, Any] | None
    loss_scale: dict[str, float] | None
    skipped_steps: int

    @property
    def optimizer_steps(self) -> int: ...

    def shapes(self, kind: str, has_moments: bool) -> dict[str, tuple[int, ...]]: ...

    def pieces(self, owned: Container[str]) -> Iterator[Piece]: ...

    def load_named_state(self, read: ReadRanges, optimizer_steps: int) -> None: ...
