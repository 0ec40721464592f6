"""Features of images and texts, where words looked in an image, which of its patches became one token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.attention_maps import on_grid, word_attention
from model.batch import Row
from model.evlgen import EVLGen
from model.language_attention import language_attention, token_areas
from model.merge_maps import patch_groups
from model.objectives.captioning import Captioning
from model.objectives.evlgen import ImageToText
from model.text_states import mean_text_states
from model.vision.tower import Grid, grid_of
from pipeline.using.reading import cls_features, read, reads_texts, words_of
from pipeline.using.trained import Trained


@torch.no_grad()
def features_of(trained: Trained, pixels: Tensor | None, texts: Sequence[str]) -> dict[str, Tensor]:
    """fp32 on the host, of pixels uint8 [B, I, 3, S, S] "tokens" [B, P, W] and "image" [B, W], of texts "text" [B, D],
    of both "pair" [B, D] where the model has CLS features. Of a model that contrasts both also "image_embedding" and
    "text_embedding" [B, E]. Raises ValueError for texts without a text tower."""
    head = getattr(trained.objective, "itc_head", None)
    encoded = None
    found: dict[str, Tensor] = {}
    if pixels is not None:
        tokens = trained.tower_tokens(pixels).float()
        found |= {"tokens": tokens, "image": tokens.mean(1)}
        if head is not None:
            encoded = trained.encode(pixels)
            found["image_embedding"] = head.embed_images(encoded.mean((1, 2), dtype=torch.float32).to(encoded.dtype))
    if len(texts):
        if not reads_texts(trained):
            raise ValueError(
                f"a model of objective {trained.run.config.objective.name} has no text tower, which reads texts by"
                " themselves; leave texts out, or use a model of flm, mlm, ar or prefixlm"
            )
        found["text"] = mean_text_states(trained.objective.net, read(trained, texts, num_images=1).plan)
        if head is not None:
            found["text_embedding"] = head.embed_texts(found["text"].to(head.text_projection.weight.dtype))
    has_cls = not isinstance(trained.objective, Captioning) and trained.num_images == 1
    if pixels is not None and len(texts) and has_cls:
        features = cls_features(trained, trained.encode(pixels) if encoded is None else encoded, texts)
        found["pair"] = trained.objective.net.pooler(features).float()
    return {name: value.cpu() for name, value in found.items()}


def no_features(trained: Trained) -> dict[str, np.ndarray]:
    """Those of no images."""
    tower = trained.objective.net.vision
    num_tokens = trained.num_images * tower.num_tokens
    shapes = {"tokens": (0, num_tokens, tower.width), "image": (0, tower.width)}
    head = getattr(trained.objective, "itc_head", None)
    if head is not None:
        shapes["image_embedding"] = (0, head.image_projection.out_features)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def attention_of(trained: Trained, pixels: Tensor, text: str) -> tuple[list[str], np.ndarray]:
    """The words of a text and where each looked in its image, fp32 [words, rows, columns], the mean over heads, layers
    that read the image and its tokens; of a model that writes, where it looked to write the word."""
    if trained.num_images > 1 or not (reads_texts(trained) or isinstance(trained.objective, ImageToText)):
        why = f"judges {trained.num_images} images together" if trained.num_images > 1 else "is of objective"
        why += "" if trained.num_images > 1 else f" {trained.run.config.objective.name}"
        raise ValueError(f"no attention of words over an image: this model {why}; use one that reads a single image")
    grid, pixels = _grid(trained), pixels.to(trained.device)
    places, ids, maps = (_of_tower if reads_texts(trained) else _of_language_model)(trained, pixels, text, grid)
    maps, tokenizer = maps.cpu(), trained.run.tokenizer
    words, found = [], []
    for of_word in _by_word(places, ids, tokenizer.vocabulary.word_starts):
        word = tokenizer.decode([ids[place] for place in of_word])
        looked = [maps[place] for place in of_word if maps[place].any()]
        if word and looked:
            words.append(word)
            found.append(torch.stack(looked).mean(0))
    return words, torch.stack(found).numpy() if found else np.zeros((0, grid.height, grid.width), np.float32)


Looked = tuple[list[int], list[int], Tensor]  # places of the words' tokens, ids of all, maps fp32 [T, rows, columns]


def _of_tower(trained: Trained, pixels: Tensor, text: str, grid: Grid) -> Looked:
    batch = read(trained, [text])
    batch.images = pixels
    maps = on_grid(word_attention(trained.objective.net, batch)[0].float(), grid)
    if isinstance(trained.objective, Captioning):  # a word is predicted from the state before it
        maps = torch.cat([torch.zeros_like(maps[:1]), maps[:-1]])
    ids, vocabulary = batch.plan.text[0, : int(batch.plan.lengths[0])].tolist(), trained.run.tokenizer.vocabulary
    hidden = {*vocabulary.special_ids}
    return [place for place, one in enumerate(ids) if one not in hidden and one < vocabulary.size], ids, maps


def _of_language_model(trained: Trained, pixels: Tensor, text: str, grid: Grid) -> Looked:
    """By the patches that each token of the image is made of."""
    objective, config = trained.objective, trained.run.config
    form, length = objective.net.form, config.data.max_text_length
    words = trained.run.tokenizer.encode(words_of(trained, text, "text"), length + 2)[1:-1]
    words = words[: length - len(form.begin) - len(form.end)]
    row = Row([*form.begin, *words, *form.end], 0, 0, "pair")
    areas = token_areas(objective.net, pixels, grid)
    batch = objective.planner(torch.zeros(1, 1, 3, 1, 1, dtype=torch.uint8), [row]).to(trained.device)
    batch.images = pixels
    maps = (language_attention(objective.net, batch) @ areas).unflatten(1, (grid.height, grid.width))
    first = len(form.begin)
    return list(range(first, first + len(words))), row.token_ids, maps


def merges_of(trained: Trained, pixels: Tensor) -> np.ndarray:
    """int64 [rows, columns]: in which token each patch of the image, uint8 [1, I, 3, S, S], ended."""
    net = trained.objective.net
    if not isinstance(net, EVLGen) or not net.connector.merges:
        raise ValueError(
            "this model merges no patches; use one of objective evlgen with model.connector.name tomeformer or tome"
        )
    grid = _grid(trained)
    cells, _ = patch_groups(net, pixels.to(trained.device), grid)[-1]
    return cells.view(grid.height, grid.width).cpu().numpy()


def _grid(trained: Trained) -> Grid:
    grid = grid_of(trained.objective.net.vision)
    if grid is None:
        name = trained.run.config.model.vision.name
        raise ValueError(f"where the tokens of the vision tower {name} stand in the image is not known: no map of it")
    return grid


def _by_word(places: Sequence[int], ids: Sequence[int], starts: bytes) -> list[list[int]]:
    """Places of the tokens of each word; every token by itself where nothing marks words."""
    found: list[list[int]] = []
    for place in places:
        if found and starts and not starts[ids[place]]:
            found[-1].append(place)
        else:
            found.append([place])
    return found
