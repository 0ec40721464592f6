"""FLM laid out as the public release runs it: the plain reference that step cost is compared with.

Three passes (l2r, r2l, reconstructor) over captions padded to full length, image keys and values computed for each
stream, attention written out with additive masks, vocabulary logits at every position. It borrows the parameters of a
``released`` objective, so both compute the same loss, and runs them by PyTorch's own operations: of our code it runs
the vision tower alone, which is the unit of the benchmark.

Legend: B samples, L padded length, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import PAD_POSITION

HIDDEN = -10000.0


class ReleasedLayout(nn.Module):
    """Total released loss of a padded batch, in the release's layout."""

    def __init__(self, objective: nn.Module) -> None:
        """``objective``: the flm objective with ``model.behaviour`` released and corruption rate 0."""
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """images uint8 [B, 3, S, S], text int64 [B, L] padded to full length, lengths int64 [B] -> scalar loss."""
        return self._loss(*self.states(images, text, lengths), text)

    def states(self, images: Tensor, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [B, L, D] of the reconstructor (row 0 is the CLS query), the l2r and the r2l stream."""
        net, vocabulary = self.objective.net, self.objective.net.vocabulary
        num_positions = text.shape[1]
        position = torch.arange(num_positions, device=text.device)
        real = position < lengths[:, None]
        l2r_mask, r2l_mask, query_mask = self._masks(position, real, lengths)
        embed_position = torch.where(real, position, -1)
        query_text = torch.where(real, vocabulary.mask_id, vocabulary.bos_id)
        query_text[:, 0] = vocabulary.bos_id
        query_text.scatter_(1, lengths[:, None] - 1, vocabulary.eos_id)
        l2r, r2l, query = (self._drop(self._embed(ids, embed_position)) for ids in (text, text, query_text))
        image = net.image_projection(net.vision(images)) + net.type_embedding.weight[1]
        for layer, reader in zip(net.bottom, net.reconstructor_bottom, strict=True):
            l2r, r2l = self._text_layer(layer, l2r, l2r_mask), self._text_layer(layer, r2l, r2l_mask)
            query = self._read(reader, query, torch.cat([l2r, r2l], 1), query_mask)
        l2r = net.text_projection(l2r) + net.type_embedding.weight[0]
        r2l = net.text_projection(r2l) + net.stream_embedding.weight[0]
        query = net.text_projection(query) + net.stream_embedding.weight[1]
        for layer, reader in zip(net.top, net.reconstructor_top, strict=True):
            l2r = self._text_layer(layer, l2r, l2r_mask, image)
            r2l = self._text_layer(layer, r2l, r2l_mask, image)
            query = self._read(reader, query, torch.cat([l2r, r2l], 1), query_mask)
        return query, l2r, r2l

    def _embed(self, ids: Tensor, position: Tensor) -> Tensor:
        """ids and positions int64 [B, L], -1 for padding -> [B, L, D]."""
        table = self.objective.net.embedding
        words = F.embedding(ids, table.word.weight, table.word.padding_idx)
        return table.norm(words + table.position(position + PAD_POSITION + 1) + table.token_type)

    def _masks(self, position: Tensor, real: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Additive masks [B, 1, L, L], [B, 1, L, L], [B, 1, L, 2L] by the rules of specification section 3."""
        i, j, n = position[:, None], position[None, :], lengths[:, None, None]
        word = real[:, None] & (j >= 1)
        first = (i == 0) & real[:, None]
        l2r = first | ((i >= 1) & (j <= i) & word)
        r2l = first | ((i >= 1) & word & ((j >= i) | (i >= n)))
        left = first | ((i >= 1) & (j < i) & word)
        right = first | ((i >= 1) & (j > i) & word)
        masks = (l2r, r2l, torch.cat([left, right], 2))
        return tuple(torch.where(mask, 0.0, HIDDEN)[:, None] for mask in masks)

    def _text_layer(self, layer: nn.Module, states: Tensor, mask: Tensor, image: Tensor | None = None) -> Tensor:
        query, key, value = layer.attention.qkv(states).chunk(3, -1)
        mixed = self._attention(query, key, value, mask, layer.attention.num_heads)
        states = self._add(layer.residual, layer.attention.out(mixed), states)
        if image is not None:
            attention = layer.cross_attention
            key, value = attention.key_value(image).chunk(2, -1)
            mixed = self._attention(attention.query(states), key, value, None, attention.num_heads)
            states = self._add(layer.cross_residual, attention.out(mixed), states)
        return self._feed_forward(layer.ffn, states)

    def _read(self, layer: nn.Module, query: Tensor, streams: Tensor, mask: Tensor) -> Tensor:
        attention = layer.cross_attention
        key, value = attention.key_value(streams).chunk(2, -1)
        mixed = self._attention(attention.query(query), key, value, mask, attention.num_heads)
        return self._feed_forward(layer.ffn, self._add(layer.cross_residual, attention.out(mixed), query))

    def _feed_forward(self, ffn: nn.Module, states: Tensor) -> Tensor:
        return self._add(ffn.residual, ffn.down(F.gelu(ffn.up(states))), states)

    def _add(self, residual: nn.Module, update: Tensor, states: Tensor) -> Tensor:
        return residual.norm(self._drop(update) + states)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
        query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores + mask
        return (self._drop(scores.softmax(-1)) @ value).transpose(1, 2).flatten(2)

    def _drop(self, states: Tensor) -> Tensor:
        return F.dropout(states, self.objective.net.dropout, self.training)

    def _loss(self, query: Tensor, l2r: Tensor, r2l: Tensor, text: Tensor) -> Tensor:
        """Mean of the three cross entropies; logits at all L-1, L-1 and L-1 positions, pads ignored afterwards."""
        head, pad_id = self.objective.lm_head, self.objective.net.vocabulary.pad_id
        total = 0.0
        for states, labels in ((query[:, 1:], text[:, 1:]), (l2r[:, 1:-1], text[:, 2:]), (r2l[:, 2:], text[:, 1:-1])):
            hidden = head.norm(F.gelu(head.transform(states)))
            logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1)
            total = total + F.cross_entropy(logits, labels.flatten(), ignore_index=pad_id)
        return total / 3
