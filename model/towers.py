"""What every network here is made of: a vision tower, a text tower, and what joins them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig, Vocabulary
from model.heads import Pooler
from model.layers import BottomLayer, TextEmbedding, TopLayer, initial_std
from model.learning_rate_groups import declare_group
from model.vision.channel_norm import ChannelNorm
from model.vision.tower import build_tower, tokens_of


def add_towers(net: nn.Module, config: ModelConfig, vocabulary: Vocabulary, num_images: int = 1) -> None:
    """Gives ``net`` its towers under the names that checkpoints and importers know; samples have ``num_images``.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    text = config.text
    if text.width % text.heads:
        raise ValueError(
            f"model.text.width {text.width} is not a multiple of model.text.heads {text.heads}; change either"
        )
    net.vision = build_tower(config.vision)
    net.recompute = net.vision.recompute = config.activation_checkpointing
    net.embedding = TextEmbedding(text, vocabulary.size, vocabulary.pad_id)
    net.bottom = nn.ModuleList(BottomLayer(text) for _ in range(text.bottom_layers))
    net.text_projection = nn.Linear(text.width, text.width)
    net.image_norm = ChannelNorm(net.vision.width) if config.vision.standardise else nn.Identity()
    net.image_projection = nn.Linear(net.vision.width, text.width)
    net.type_embedding = nn.Embedding(1 + num_images, text.width)  # l2r text, image, second image ..
    net.top = nn.ModuleList(TopLayer(text) for _ in range(text.top_layers))
    net.pooler = Pooler(text.width)
    declare_group("rest", net.vision, net.embedding, net.bottom, net.type_embedding)
    declare_group("cross", net.text_projection, net.image_norm, net.image_projection, net.top, net.pooler)


def reset_parameters(net: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """``initial_std`` for all but the vision tower and the modules whose name starts with one of ``keep``."""
    std = initial_std(net.embedding.word.embedding_dim)
    for name, module in net.named_modules():
        if name.startswith(("vision", *keep)):
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    nn.init.normal_(net.embedding.token_type, std=std)


def encode_images(net: nn.Module, images: Tensor) -> Tensor:
    """Projected tokens [B*I, P, D] of images uint8 [B, I, 3, S, S] or features [B, I, P, W]; image i has type 1 + i.

    Raises:
        ValueError: samples have more images than the network was built for.
    """
    num_images, num_types = images.shape[1], net.type_embedding.num_embeddings
    if num_images >= num_types:
        raise ValueError(f"samples have {num_images} images, the network knows {num_types - 1}; build it for as many")
    tokens = tokens_of(net.vision, images).to(net.type_embedding.weight.dtype)
    tokens = net.image_projection(net.image_norm(tokens))
    if num_images == 1:
        return tokens + net.type_embedding.weight[1]
    return (tokens.unflatten(0, (-1, num_images)) + net.type_embedding.weight[1 : 1 + num_images, None]).flatten(0, 1)


@torch.no_grad()
def fit_image_norm(net: nn.Module, images: Tensor) -> None:
    """Fits the norm behind the tower (``VisionConfig.standardise``) to training images, as of :func:`encode_images`."""
    net.image_norm.standardise(tokens_of(net.vision, images))
