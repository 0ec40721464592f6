"""The one contract between data and model: every field of a batch with its dtype and shape.

Legend: B samples, I images per sample, R text rows, T padded text length, N packed states of a stream, Q queries,
M targets of a term.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Role = Literal["pair", "negative", "placeholder", "read"]


@dataclass(frozen=True)
class Row:
    """One caption of a batch before planning.

    ``token_ids`` is ``<s> w1 .. wk </s>``; ``image`` the sample (0..B-1) whose image the row reads; ``seed`` a 64-bit
    integer from which every random decision about the row is drawn. ``negative`` rows carry somebody else's caption,
    ``placeholder`` rows stand for an unusable sample and have no targets. ``read`` rows hold any text about any image
    of the batch: it goes in as it is, nothing is predicted, and ``Pretraining.features`` returns what was understood.
    Rows with the same ``sample`` (a key; "" says nothing) are about the same image, none is a negative of another.
    """

    token_ids: list[int]
    image: int
    seed: int
    role: Role = "pair"
    sample: str = ""


class Term(NamedTuple):
    """Targets of one loss term: ``position`` int64 [M] into the term's features, ``label`` int64 [M]."""

    position: Tensor
    label: Tensor


@dataclass
class Batch:
    """A micro-batch. Index lists are made on the host, so their sizes are known without asking the device."""

    images: Tensor  # uint8 [B, I, 3, H, W]
    text: Tensor  # int64 [R, T], pad_id beyond the length
    lengths: Tensor  # int64 [R], real tokens including <s> and </s>
    image_of_row: Tensor  # int64 [R]
    l2r_index: Tensor  # int64 [N1], flat positions r*T+t whose state of the l2r stream is computed
    r2l_index: Tensor  # int64 [N2], the same of the r2l stream
    query_index: Tensor  # int64 [Q], flat positions of the reconstruction queries
    query_span: (
        Tensor  # int64 [Q, 2], hidden (lo, hi): l2r states < lo and r2l states > hi are read; CLS has (length, -1)
    )
    prefix: Tensor  # int64 [R], l2r states before it see each other, the others what is left of them (0: causal)
    terms: dict[str, Term]  # targets of losses; "read": where the CLS feature of a read row stands, and its number
    keys: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)

    @property
    def counts(self) -> dict[str, int]:
        """Number of targets per term, known on the host; rows that are only read have none."""
        return {name: int(term.label.shape[0]) for name, term in self.terms.items() if name != "read"}

    @property
    def num_paired(self) -> int:
        """How many of the first rows read the image of their own number: all B, or none where rows read any image."""
        return 0 if "read" in self.terms else self.images.shape[0]

    def _map(self, function) -> Batch:
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        terms = {name: Term(function(t.position), function(t.label)) for name, t in self.terms.items()}
        return Batch(**tensors, terms=terms, keys=self.keys, problems=self.problems)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with every tensor on ``device``; images stay uint8."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by ``torch.utils.data.DataLoader``)."""
        return self._map(lambda tensor: tensor.pin_memory())


class Planner(Protocol):
    """Turns images and rows into a batch; made by an objective, run in the loader's workers (so it must pickle).

    ``negative_share`` is the share of samples for which the loader adds one row with role ``negative``;
    ``full_stop`` says that captions are normalised to end in "." (the released behaviour).
    """

    negative_share: float
    full_stop: bool

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch: ...
