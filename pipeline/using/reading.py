"""Texts as a model reads them about images that are encoded already: their rows, their plans, what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.batch import Batch, Planner, Row
from model.objectives.captioning import Captioning
from model.objectives.classification import Classification
from model.objectives.pretraining import Pretraining
from model.objectives.ranking import Ranking
from pipeline.data.tokenizer import clean_caption
from pipeline.using.trained import Trained


def words_of(trained: Trained, text: str, name: str) -> str:
    """A text as training cleans it; raises ValueError, calling it ``name``, for no text and for one without a word."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected a text (str), found a {type(text).__name__}")
    full_stop = trained.run.config.model.behaviour == "released" and not isinstance(trained.objective, Classification)
    cleaned = clean_caption(text, full_stop)
    if not cleaned:
        raise ValueError(f"{name} is empty; give at least one word")
    return cleaned


def reads_texts(trained: Trained) -> bool:
    """Whether texts go through a text tower of the model."""
    return isinstance(trained.objective, Pretraining | Ranking | Classification | Captioning)


def read(trained: Trained, texts: Sequence[str], num_images: int | None = None) -> Batch:
    """The plan of texts that are read, text i about image i, or all about one where ``num_images`` is 1.

    Of a captioner they are captions to be predicted. The images of the batch have no pixels.
    """
    rows = [
        Row(
            _ids(trained, words_of(trained, text, f"text {number}")),
            0 if num_images == 1 else number,
            0,
            _role(trained),
        )
        for number, text in enumerate(texts)
    ]
    images = torch.zeros((num_images or len(texts), 1, 3, 1, 1), dtype=torch.uint8)
    return _planner(trained)(images, rows).to(trained.device)


@torch.no_grad()
def cls_features(trained: Trained, tokens: Tensor, texts: Sequence[str]) -> Tensor:
    """CLS features [B, D] of each text with its image, of which ``tokens`` [B, 1, P, D] are given."""
    batch = read(trained, texts)
    term = batch.terms["read"]
    output = trained.objective.net.fuse(batch.plan, tokens.flatten(0, 1))
    return getattr(output, term.source).index_select(0, term.position.flatten())


def _role(trained: Trained) -> str:
    return "pair" if isinstance(trained.objective, Captioning) else "read"


def _ids(trained: Trained, text: str) -> list[int]:
    config, tokenizer = trained.run.config, trained.run.tokenizer
    ids = tokenizer.encode(text, config.data.max_text_length)
    if isinstance(trained.objective, Captioning):
        return trained.objective.form.write(ids[1:-1], config.data.max_text_length)
    return ids


def _planner(trained: Trained) -> Planner | Callable:
    objective = trained.objective
    if isinstance(objective, Captioning):
        return objective.planner(0)
    if isinstance(objective, Ranking):
        return objective.reading_planner
    return objective.planner.planner if isinstance(objective, Classification) else objective.planner
