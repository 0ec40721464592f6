"""The FLM network: two text streams over one image, and a reconstructor that reads both (specification section 2).

Legend: B images, R text rows, T padded length, N1 and N2 states of the l2r and r2l stream, Q queries, P image tokens,
D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import masks
from model.attention import Attention, Packing, image_attention, text_attention
from model.batch import Batch, TextPlan
from model.config import ModelConfig, Vocabulary
from model.dropout import dropout
from model.layers import ReconstructorLayer
from model.learning_rate_groups import declare_group
from model.recomputing import run
from model.towers import add_towers, encode_images, reset_parameters


class Features(NamedTuple):
    """Outputs of the network: ``l2r`` [N1, D] and ``r2l`` [N2, D] in the order of their index, ``queries`` [Q, D].

    What was before text met image: ``bottom`` [N1+N2, D], all states behind the bottom half in the order of
    :func:`model.text_states.packed_index`, and ``images`` [B*I, P, D], the projected tokens.
    """

    l2r: Tensor
    r2l: Tensor
    queries: Tensor
    bottom: Tensor
    images: Tensor


class FLM(nn.Module):
    """Encodes captions in both directions in one pass and reconstructs freely hidden targets from the states."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, num_images: int = 1) -> None:
        """``config`` with resolved vision sizes; ``num_images`` of a sample.

        Raises:
            ValueError: sizes that do not fit each other.
        """
        super().__init__()
        text = config.text
        num_bottom, num_top = _reconstructor_depth(config)
        self.released = config.behaviour == "released"
        self.boundary_states = config.reconstructor.boundary_states
        self.vocabulary = vocabulary
        self.dropout = text.dropout
        add_towers(self, config, vocabulary, num_images)
        self.stream_embedding = nn.Embedding(2, text.width)  # r2l text, reconstruction queries
        self.reconstructor_bottom = nn.ModuleList(ReconstructorLayer(text) for _ in range(num_bottom))
        self.reconstructor_top = nn.ModuleList(ReconstructorLayer(text) for _ in range(num_top))
        declare_group("rest", self.stream_embedding)
        declare_group("cross", self.reconstructor_bottom, self.reconstructor_top)
        # The released reconstructor keeps PyTorch's initialisation (specification section 2.8).
        reset_parameters(self, keep=("reconstructor",) if self.released else ())

    def forward(self, batch: Batch) -> Features:
        """Runs a whole plan."""
        return self.fuse(batch.plan, self.encode(batch.images))

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, I, 3, S, S] -> projected tokens [B*I, P, D]."""
        return encode_images(self, images)

    def fuse(self, plan: TextPlan, images: Tensor) -> Features:
        """The text side, given projected tokens [B*I, P, D] of all images."""
        streams = _Streams(plan)
        attend_text, attend_states, attend_images = self._attentions(plan, streams, *images.shape[:2])
        tokens = images.flatten(0, 1)
        states, queries = self._embed(plan, streams).split([len(streams.index), len(plan.query_index)])
        recompute = self.recompute and self.training
        beside = _beside_spans(plan, streams.index, streams.is_r2l) if self.boundary_states else None
        skip = len(self.bottom) - len(self.reconstructor_bottom)
        for number, layer in enumerate(self.bottom):
            states = run(layer, states, attend_text, recompute=recompute)
            if number >= skip:
                queries = with_states(queries, states, beside if number == skip else None)
                reader = self.reconstructor_bottom[number - skip]
                queries = run(reader, queries, states, attend_states, recompute=recompute)

        l2r_type, r2l_type = self.type_embedding.weight[0], self.stream_embedding.weight[0]
        bottom = states
        states = self.text_projection(states) + torch.where(streams.is_r2l[:, None], r2l_type, l2r_type)
        queries = self.text_projection(queries) + self.stream_embedding.weight[1]
        skip = len(self.top) - len(self.reconstructor_top)
        for number, layer in enumerate(self.top):
            states = run(layer, states, attend_text, tokens, attend_images, recompute=recompute)
            if number >= skip:
                queries = with_states(queries, states, beside if number == skip else None)
                reader = self.reconstructor_top[number - skip]
                queries = run(reader, queries, states, attend_states, recompute=recompute)
        return Features(*streams.split(states), with_states(queries, states, beside), bottom, images)

    def stream_masks(self, plan: TextPlan) -> Tensor:
        """Which states see each other, bool [2, R, T, T]: l2r, r2l."""
        of_streams = masks.released_streams if self.released else masks.causal_streams
        return of_streams(plan.lengths, plan.text.shape[1])

    def _attentions(self, plan: TextPlan, streams: _Streams, num_images: int, num_tokens: int) -> tuple[Attention, ...]:
        """From states to states of their stream, from queries to the states of both streams, from states to images."""
        num_rows, num_positions = plan.text.shape
        rate = self.dropout if self.training else 0.0
        own_stream = Packing(streams.index + streams.is_r2l * (num_rows * num_positions), 2 * num_rows, num_positions)
        row_start = (streams.index // num_positions + streams.is_r2l) * num_positions
        side_by_side = Packing(streams.index + row_start, num_rows, 2 * num_positions)
        queries = Packing(plan.query_index, num_rows, num_positions)
        mask = self.stream_masks(plan).flatten(0, 1)
        spans = queries.pad(plan.query_span)
        query_mask = masks.reconstructor(plan.lengths, spans, bos_visible=not self.released)
        return (
            text_attention(own_stream, own_stream, mask, num_rows, rate),
            text_attention(queries, side_by_side, query_mask, num_rows, rate),
            image_attention(side_by_side, plan.image_of_row, plan.num_paired, num_images, num_tokens, rate),
        )

    def _embed(self, plan: TextPlan, streams: _Streams) -> Tensor:
        """Embeddings of both streams' states and the queries [N1+N2+Q, D], by one look-up; dropout drawn for each."""
        num_positions = plan.text.shape[1]
        index = torch.cat([streams.index, plan.query_index])
        position, length = index % num_positions, plan.lengths[index // num_positions]
        position = torch.where(position < length, position, -1)
        words = plan.text.flatten()[streams.index]
        query_words = self._query_words(position[len(words) :], length[len(words) :])
        embedded = self.embedding(torch.cat([words, query_words]), position)
        return dropout(embedded, self.dropout) if self.training else embedded

    def _query_words(self, position: Tensor, length: Tensor) -> Tensor:
        """`<mask>`, `<s>` for the CLS query; the released code gives the last query its true `</s>` (section 2.6)."""
        words = torch.where(position == 0, self.vocabulary.bos_id, self.vocabulary.mask_id)
        if self.released:
            words = torch.where(position == length - 1, self.vocabulary.eos_id, words)
        return words


class _Streams:
    """The order of both streams' packed states: caption by caption, l2r before r2l."""

    def __init__(self, plan: TextPlan) -> None:
        index = torch.cat([plan.l2r_index, plan.r2l_index])
        self._order = (index // plan.text.shape[1]).argsort(stable=True)
        self._num_l2r = len(plan.l2r_index)
        self.index = index[self._order]  # int64 [N1+N2], flat positions row*T+position
        self.is_r2l = self._order >= self._num_l2r  # bool [N1+N2]

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[N1+N2, D] -> l2r [N1, D], r2l [N2, D], each in the order of its index."""
        l2r, r2l = states.index_select(0, self._order.argsort()).tensor_split([self._num_l2r])
        return l2r, r2l


def _beside_spans(plan: TextPlan, index: Tensor, is_r2l: Tensor) -> Tensor:
    """Which packed states stand beside what is hidden from each query, int64 [2, Q]: the last that it reads of the l2r
    stream and the first of the r2l stream; for CLS queries, from which nothing is hidden, those that know all words.

    ``index`` and ``is_r2l`` [N1+N2] are the order of the packed states.
    """
    num_rows, num_positions = plan.text.shape
    place = index.new_full((2, num_rows * num_positions), -1)  # no state: to gather one is an error, and not another's
    place[is_r2l.long(), index] = torch.arange(len(index), device=index.device)
    row_start = plan.query_index // num_positions * num_positions
    lo, hi = plan.query_span.unbind(1)
    return torch.stack([place[0, row_start + lo - 1], place[1, row_start + hi + 1]])


def with_states(queries: Tensor, states: Tensor, beside: Tensor | None) -> Tensor:
    """Queries [Q, D] with the states [N1+N2, D] ``beside`` what is hidden from them added, if that is given."""
    if beside is None:
        return queries
    return queries + states.index_select(0, beside[0]) + states.index_select(0, beside[1])


def _reconstructor_depth(config: ModelConfig) -> tuple[int, int]:
    depths = []
    for half in ("bottom", "top"):
        available = getattr(config.text, f"{half}_layers")
        wanted = getattr(config.reconstructor, f"{half}_layers")
        if wanted is not None and not 0 <= wanted <= available:
            raise ValueError(
                f"model.reconstructor.{half}_layers is {wanted}, expected 0 to model.text.{half}_layers ({available})"
            )
        depths.append(available if wanted is None else wanted)
    return depths[0], depths[1]
