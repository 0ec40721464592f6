"""A stand-in objective with the interface of ``Pretraining``, and batches of a fixed synthetic corpus for it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Term, TextPlan

VOCABULARY, WIDTH = 31, 12


class TinyObjective(nn.Module):
    """Predicts each token from the image's mean colour and the token before it; ``rare`` seldom has targets."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.term_weights = {"flm": 0.75, "l2r": 0.25, "rare": 0.5}
        self.image = nn.Linear(3, WIDTH)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.cross = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.odd = nn.Linear(WIDTH, 5)  # 5 divides by no number of ranks
        self.register_buffer("offset", torch.full((3,), 0.25))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {name: losses.sum() for name, (losses, _) in self._losses(batch).items()}

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (losses.sum(), right.float().sum()) for name, (losses, right) in self._losses(batch).items()}

    def parameter_group(self, name: str) -> str:
        return {"head": "head", "odd": "head", "cross": "cross"}.get(name.split(".")[0], "rest")

    def decays(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1

    def _losses(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        dtype = self.image.weight.dtype
        colour = batch.images.float().mean(dim=(1, 3, 4)) / 255 - self.offset
        image = self.image(colour.to(dtype))[batch.plan.image_of_row]
        hidden = self.embedding(batch.plan.text) + image[:, None]
        hidden = hidden + self.cross(self.dropout(torch.tanh(self.norm(hidden))))
        flat = hidden.flatten(0, 1)
        result = {}
        for name, (_, position, label, _) in batch.terms.items():
            layer = self.odd if name == "rare" else self.head
            logits = layer(flat[position]).float()
            result[name] = (F.cross_entropy(logits, label, reduction="none"), logits.argmax(1) == label)
        return result


def tiny_batch(samples: list[int]) -> Batch:
    """The batch of some samples; sample number i decides everything about a sample, its number of targets included."""
    images, tokens, rare = [], [], []
    for index in samples:
        generator = torch.Generator().manual_seed(1000 + index)
        colour = torch.randint(0, 256, (1, 3, 1, 1), generator=generator, dtype=torch.uint8)
        images.append(colour.expand(1, 3, 4, 4))
        length = int(torch.randint(3, 9, (1,), generator=generator))
        start = int(colour.float().mean()) % VOCABULARY
        tokens.append((start + torch.arange(length) * 3) % VOCABULARY)
        rare.append(index % 5 == 0)
    width = 8
    text = torch.zeros(len(samples), width, dtype=torch.int64)
    lengths = torch.tensor([len(ids) for ids in tokens])
    for row, ids in enumerate(tokens):
        text[row, : len(ids)] = ids
    position = torch.arange(width).expand(len(samples), width)
    following = torch.roll(text, -1, 1).flatten()
    predicted = (position < lengths[:, None] - 1).flatten().nonzero().flatten()
    even = predicted[predicted % width % 2 == 0]
    first = torch.arange(len(samples))[torch.tensor(rare)] * width
    kinds = torch.tensor([index // 5 % 5 for index in samples if index % 5 == 0], dtype=torch.int64)
    terms = {
        "flm": Term("states", predicted, following[predicted]),
        "l2r": Term("states", even, following[even]),
        "rare": Term("states", first, kinds, "class"),
    }
    unused = [item.name for item in dataclasses.fields(TextPlan) if item.name.endswith("_index")]
    plan = TextPlan(
        text=text,
        lengths=lengths,
        image_of_row=torch.arange(len(samples)),
        query_span=torch.empty(0, 2, dtype=torch.int64),
        prefix=torch.zeros(len(samples), dtype=torch.int64),
        **{name: torch.empty(0, dtype=torch.int64) for name in unused},
    )
    return Batch(torch.stack(images), terms, keys=[str(index) for index in samples], plan=plan)
