"""The one contract between data and model: every field of a batch with its dtype and shape.

A ``Batch`` is what any task fills: images, targets of loss terms, and the names of its samples. A task that reads text
through the packed text tower adds a ``TextPlan``, one that reads it by a language model a ``LanguagePlan``.

Legend: B samples, I images per sample, R text rows, T padded text length, N packed states of a stream, Q queries,
M targets of a term, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Role = Literal["pair", "negative", "placeholder", "read"]
Kind = Literal["token", "class", "soft", "feature", "contrast"]


@dataclass(frozen=True)
class Row:
    """One text of a batch before planning, with the image it is about.

    ``token_ids`` is ``<s> w1 .. wk </s>``; ``image`` the image that the row reads, 0..B*I-1 (sample b holds the images
    b*I .. b*I+I-1; a row of a single sample counts from 0); ``seed`` a 64-bit integer from which every random decision
    about the row is drawn. ``negative`` rows carry somebody else's caption, ``placeholder`` rows stand for an unusable
    sample and have no targets. ``read`` rows hold any text about any image of the batch: it goes in as it is, nothing
    is predicted, and ``Pretraining.features`` returns what was understood. Rows with the same ``sample`` (a key; ""
    says nothing) are about the same sample, none is a negative of another. ``target`` is what a task wants to be
    predicted from the row besides its own tokens: a class, a distribution, an answer's tokens. ``note`` is what a
    prediction about the sample will repeat (its question and answers); nothing computes with it.
    """

    token_ids: list[int]
    image: int
    seed: int
    role: Role = "pair"
    sample: str = ""
    target: Any = None
    note: Any = None


class Term(NamedTuple):
    """Targets of one loss term.

    ``position`` int64 [M] points into the output of the network named ``source``; int64 [M, I] where a target is
    predicted from I states side by side. ``target`` is int64 [M] tokens of
    the vocabulary (kind "token") or classes ("class"), or fp32 [M, C] distributions over classes ("soft"). Kind
    "feature" has no loss: ``target`` int64 [M] is the number of the row that a feature is wanted of. Kind "contrast":
    ``position`` int64 [M] are rows, ``target`` bool [M, B*I] is True where an image is wrong for the row's text.
    """

    source: str
    position: Tensor
    target: Tensor
    kind: Kind = "token"


@dataclass
class TextPlan:
    """Which states of the text towers are computed, and what they see. Index lists are made on the host."""

    text: Tensor  # int64 [R, T], pad_id beyond the length
    lengths: Tensor  # int64 [R], real tokens including <s> and </s>
    image_of_row: Tensor  # int64 [R], 0..B*I-1
    l2r_index: Tensor  # int64 [N1], flat positions r*T+t whose state of the l2r stream is computed
    r2l_index: Tensor  # int64 [N2], the same of the r2l stream
    query_index: Tensor  # int64 [Q], flat positions of the reconstruction queries
    query_span: (
        Tensor  # int64 [Q, 2], hidden (lo, hi): l2r states < lo and r2l states > hi are read; CLS has (length, -1)
    )
    prefix: Tensor  # int64 [R], l2r states before it see each other, the others what is left of them (0: causal)
    num_paired: int = 0  # B*I where rows 0..B*I-1 read the images of their own number, else 0


@dataclass
class LanguagePlan:
    """Texts that a language model reads behind the tokens of images: all texts of an image in one sequence, one after
    another, each of which sees the image and itself. Legend: S sequences, L longest one without the image's tokens."""

    text: Tensor  # int64 [S, L], pad_id beyond the length
    lengths: Tensor  # int64 [S], tokens of all texts of the sequence
    image: Tensor  # int64 [S], 0..B-1
    number: Tensor  # int64 [S, L], of the text in its sequence that a token is of; -1 beyond the length
    place: Tensor  # int64 [S, L], of the token in its text, from 0
    num_tokens: int = 0  # of an image, in training; 0: as many as the connector always gives


@dataclass
class PairPlan:
    """Texts that are contrasted with each other's images (a Q-Former's first stage). Legend: P texts, T longest one."""

    text: Tensor  # int64 [P, T], pad_id beyond the length
    lengths: Tensor  # int64 [P], real tokens including <s> and </s>
    image: Tensor  # int64 [P], 0..B-1
    apart: Tensor  # bool [P, P], True where text and image are a wrong pair: of two samples, of which none is unusable
    draws: Tensor  # fp32 [2, P, P], in (0, 1), by which wrong texts of images, and wrong images of texts, are chosen


@dataclass
class Batch:
    """A micro-batch. All sizes are known on the host, without asking the device."""

    images: Tensor  # uint8 [B, I, 3, H, W]; or features of them that a frozen tower gave before, [B, I, P, W]
    terms: dict[str, Term]
    keys: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    plan: TextPlan | LanguagePlan | PairPlan | None = None
    notes: list[Any] = field(default_factory=list)  # of each sample's first row
    positions: list[int] = field(default_factory=list)  # of the samples in the order of training or evaluation
    stored: torch.dtype | None = None  # images are bytes of features [B, I, P, W] of this dtype, until ``to``

    @property
    def counts(self) -> dict[str, int]:
        """Number of targets per term that has a loss, known on the host."""
        return {name: len(term.target) for name, term in self.terms.items() if term.kind != "feature"}

    def with_images(self, images: Any, function: Callable[[Any], Any]) -> Batch:
        """The batch with other ``images`` and ``function`` applied to all other tensors."""
        terms = {
            name: term._replace(position=function(term.position), target=function(term.target))
            for name, term in self.terms.items()
        }
        plan = self.plan
        if plan is not None:
            plan = type(plan)(*(value if isinstance(value, int) else function(value) for value in vars(plan).values()))
        return replace(self, images=images, terms=terms, plan=plan)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with every tensor on ``device``; images stay uint8, stored features become what they are."""
        move = lambda tensor: tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        images = move(self.images)
        images = images if self.stored is None else images.view(self.stored)
        return replace(self.with_images(images, move), stored=None)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by ``torch.utils.data.DataLoader``)."""
        return self.with_images(self.images.pin_memory(), Tensor.pin_memory)


class Planner(Protocol):
    """Turns images uint8 [B, I, 3, H, W] and rows into a batch, in the loader's workers; the images stay in place."""

    def __call__(self, images: Tensor, rows: list[Row]) -> Batch: ...
