"""The network of a Q-Former's first stage: queries that read an image, and its text in the same self-attention.

Li et al. 2023, "BLIP-2" (arXiv 2301.12597), section 3.2. Legend: B images, P pairs, Q queries, T text, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import ConnectorConfig, ModelConfig, TextConfig, Vocabulary
from model.connectors.connector import Connector
from model.connectors.queries import TextBeside
from model.layers import PAD_POSITION, TOP_EPS, FeedForward, TextEmbedding, initial_std
from model.learning_rate_groups import declare_group
from model.masks import queries_and_text, queries_and_two_texts
from model.vision.tower import build_tower, grid_of, tokens_of


class Pairs(NamedTuple):
    """Output of the network."""

    queries: Tensor  # [P, Q, D], which saw no text
    first: Tensor  # [P, D], of a text's `<s>`, which saw no image
    words: Tensor  # [P*T, D], the state behind each token of a text, from the image and the tokens up to it
    image: Tensor  # [B, tokens, D], what queries read


class QFormerPairs(nn.Module):
    """A vision tower, the connector of EVLGen without its last layer, and what texts need beside it.

    Names of tower and connector are EVLGen's, so that it starts from a run of this.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        """Raises ValueError for sizes that do not fit each other."""
        super().__init__()
        self.vocabulary = vocabulary
        self.vision = build_tower(config.vision)
        tower = (self.vision.num_tokens, self.vision.width, grid_of(self.vision))
        self.connector = Connector(config.connector, *tower, None)
        self.text = TextSide(config.connector, vocabulary)
        self.recompute = self.vision.recompute = self.connector.body.recompute = config.activation_checkpointing
        declare_group("rest", self.vision)
        declare_group("cross", self.connector, self.text)

    @torch.no_grad()
    def begin_text_as_queries(self) -> None:
        """Text gets the feed-forward layers that queries have: once these are a BERT's, both begin as it."""
        for mine, theirs in zip(self.text.layers, self.connector.body.layers, strict=True):
            mine.load_state_dict(theirs.ffn.state_dict())

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 1, 3, S, S], or features [B, 1, P, W] -> [B, P, W]."""
        trained = any(parameter.requires_grad for parameter in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return tokens_of(self.vision, images).to(self.connector.norm.weight.dtype)

    def forward(self, batch: Batch) -> Pairs:
        """Queries and texts apart, and texts written from queries: all in one pass."""
        plan, connector = batch.plan, self.connector
        image = connector.input(connector.norm(self.features(batch.images)))
        read, written = self.text(plan.text)
        num_queries, num_positions = len(connector.body.queries), plan.text.shape[1]
        mask = queries_and_two_texts(plan.lengths, num_queries, num_positions)
        beside = TextBeside(torch.cat([read, written], dim=1), mask, self.text.layers)
        states = connector.body(image.index_select(0, plan.image), beside)
        queries, read, written = states.split([num_queries, num_positions, num_positions], dim=1)
        return Pairs(queries, read[:, 0], written.flatten(0, 1), image)

    def match(self, pairs: Pairs, batch: Batch, images: Tensor, texts: Tensor) -> Tensor:
        """States of the queries that see a text, [M, Q, D]: text ``texts`` with the image of pair ``images``, int64 [M]
        both."""
        plan, body = batch.plan, self.connector.body
        read, _ = self.text(plan.text.index_select(0, texts))
        mask = queries_and_text(plan.lengths.index_select(0, texts), len(body.queries), plan.text.shape[1])
        tokens = pairs.image.index_select(0, plan.image.index_select(0, images))
        return body(tokens, TextBeside(read, mask, self.text.layers))[:, : len(body.queries)]


class TextSide(nn.Module):
    """Embeddings of text, with a word of its own that begins a text to be written, and its feed-forward layers."""

    def __init__(self, config: ConnectorConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.begin = vocabulary.size  # BLIP-2's [DEC], in the place of `<s>`
        sizes = TextConfig(width=config.width, max_positions=config.max_positions)
        self.embedding = TextEmbedding(sizes, vocabulary.size + 1, vocabulary.pad_id)
        self.layers = nn.ModuleList(
            FeedForward(config.width, config.ffn_width, TOP_EPS, config.dropout) for _ in range(config.layers)
        )
        std = initial_std(config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.embedding.token_type)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [P, T] -> embeddings [P, T, D] of the text as it is read, and as it is written."""
        begin = torch.full_like(text[:, :1], self.begin)
        both = torch.stack([text, torch.cat([begin, text[:, 1:]], dim=1)])
        last = self.embedding.position.num_embeddings - PAD_POSITION - 2  # beyond it there is padding only
        places = torch.arange(text.shape[1], device=text.device).clamp(max=last).expand_as(both)
        read, written = self.embedding(both.flatten(), places.flatten()).unflatten(0, both.shape)
        return read, written
