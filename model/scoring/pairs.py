"""Scores of every image with every caption: what either side gives is computed once, per pair only what reads both.

Once a caption: the bottom half, and of the first top layer what does not see the image. Once an image: the tower, and
the keys and values of its tokens in every top layer. Per pair: the top layers and the CLS query. States of a block's
captions that read the same words at the same places are equal and are computed once: captions share their beginnings.

A tile is one image with one block of captions. Its shapes follow from the captions alone, so a score does not depend on
ranks or batches. Legend: M captions of a block, S streams, T positions, U shared states, D width, H heads, C channels
of a head, P image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention, merge_heads, split_heads, text_attention
from model.batch import Planner, Row, TextPlan
from model.flm import with_states
from model.towers import encode_images

BLOCK_CAPTIONS = 256

Head = Callable[[Tensor], Tensor]  # CLS features [M, D] -> scores [M]


@dataclass(frozen=True)
class Captions:
    """The captions of a split, ready to be held against images; ``place`` int64 [all M] sorts the blocks' scores."""

    blocks: list[_Block]
    place: Tensor


@torch.no_grad()
def encode_captions(net: nn.Module, planner: Planner, captions: Sequence[list[int]]) -> Captions:
    """What captions, lists of token ids from `<s>` to `</s>`, are without an image; ``net`` in evaluation mode.

    ``planner`` says which states of a row of role "read" are computed, and which of them is its CLS feature.

    Raises:
        ValueError: no captions.
    """
    if not captions:
        raise ValueError("no captions to score")
    order = sorted(range(len(captions)), key=lambda number: (len(captions[number]), captions[number]))
    starts = range(0, len(order), BLOCK_CAPTIONS)
    chosen = [[captions[number] for number in order[start : start + BLOCK_CAPTIONS]] for start in starts]
    device = net.text_projection.bias.device
    blocks = [_encode_block(net, planner, block, device) for block in chosen]
    return Captions(blocks, torch.tensor(order, device=device).argsort())


@torch.no_grad()
def encode_image(net: nn.Module, pixels: Tensor) -> list[tuple[Tensor, ...]]:
    """Keys and values [1, H, P, C] of an image, uint8 [3, S, S], in every top layer."""
    tokens = encode_images(net, pixels[None, None])
    attentions = [layer.cross_attention for layer in net.top]
    both = [split_heads(attention.key_value(tokens), attention.num_heads, 2) for attention in attentions]
    return [tuple(part.contiguous() for part in parts) for parts in both]


@torch.no_grad()
def score_captions(net: nn.Module, head: Head, captions: Captions, image: list[tuple[Tensor, ...]]) -> Tensor:
    """Scores fp32 [all M] of all captions, in their order, with the ``image`` of :func:`encode_image`."""
    return torch.cat([head(_fuse(net, block, image)).float() for block in captions.blocks])[captions.place]


@dataclass(frozen=True)
class _Block:
    """Captions that are scored together.

    ``states`` [U, D] are behind the first top layer's self-attention. ``queries`` [M, D] are the CLS queries after the
    bottom half, None in a network without reconstructor; ``of_caption`` int64 [M, S*T] numbers the states that each
    reads, where ``is_state`` bool [M, 1, S*T], and ``beside`` int64 [2, M] those that are added to it, None in a
    network without boundary states. ``read`` int64 [M] numbers the states that are CLS features otherwise.
    """

    states: Tensor
    attend: Attention
    attend_last: Attention
    read: Tensor
    queries: Tensor | None
    of_caption: Tensor
    is_state: Tensor
    beside: Tensor | None


class _Shared:
    """A :class:`model.attention.Packing` of states that stand in several cells of the grid; ``pack`` reads one each."""

    def __init__(self, state_of_cell: Tensor, cells: Tensor, num_positions: int) -> None:
        self._state_of_cell, self._cells, self._num_positions = state_of_cell, cells, num_positions

    def pad(self, packed: Tensor) -> Tensor:
        """[U, ...] -> [S*M, T, ...]; padding holds any state."""
        return packed.index_select(0, self._state_of_cell).unflatten(0, (-1, self._num_positions))

    def pack(self, grid: Tensor) -> Tensor:
        """[S*M, T, ...] -> [cells, ...]."""
        return grid.flatten(0, 1).index_select(0, self._cells)


def _encode_block(net: nn.Module, planner: Planner, captions: list[list[int]], device: torch.device) -> _Block:
    batch = planner(torch.zeros((1, 1, 3, 1, 1), dtype=torch.uint8), [Row(ids, 0, 0, "read") for ids in captions])
    plan, term = batch.plan, batch.terms["read"]
    (num_rows, num_positions), mask_SMTT = plan.text.shape, net.stream_masks(plan)
    grid = num_rows * num_positions
    cells = torch.cat([plan.l2r_index, plan.r2l_index + grid])
    first, state = _equal_states(plan, mask_SMTT, cells)
    state_of_cell = torch.zeros(len(mask_SMTT) * grid, dtype=torch.int64).index_copy_(0, cells, state)
    has_queries = len(plan.query_index) > 0
    read_cells = plan.query_index if has_queries else plan.l2r_index[term.position]
    longest = int(plan.lengths.max())
    row_start = torch.arange(num_rows) * num_positions
    know_all = torch.stack([row_start + plan.lengths - 1, grid + row_start])  # as model.flm's CLS queries have them
    of_caption = state_of_cell.view(-1, num_rows, num_positions)[:, :, :longest].transpose(0, 1)
    is_state = (torch.arange(longest) < plan.lengths[:, None])[:, None].expand_as(of_caption)

    move = lambda tensor: tensor.to(device)  # noqa: E731
    state_of_cell, mask = move(state_of_cell), move(mask_SMTT.flatten(0, 1))
    shared = _Shared(state_of_cell, move(cells[first]), num_positions)
    last = _Shared(state_of_cell, move(read_cells), num_positions)
    block = _Block(
        states=torch.empty(0),
        attend=text_attention(shared, shared, mask, num_rows, 0.0),
        attend_last=text_attention(last, shared, mask, num_rows, 0.0),
        read=state_of_cell[move(read_cells)],
        queries=None,
        of_caption=move(of_caption.flatten(1)),
        is_state=move(is_state.flatten(1)[:, None]),
        beside=state_of_cell[move(know_all)] if has_queries and net.boundary_states else None,
    )
    words, kept = plan.text.flatten()[cells[first] % grid], cells[first]
    return _bottom_half(net, block, move(words), move(kept % num_positions), move(kept >= grid), has_queries)


def _equal_states(plan: TextPlan, mask_SMTT: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """States are equal where the same stream reads the same words at the same places under the same prefix.

    What a state sees sees nothing else, in every mask of :mod:`model.masks`, so its own row of the mask tells all that
    it depends on.

    Returns:
        int64 [U] one of ``cells`` for each state, by its number; int64 [cells] the state in each.
    """
    num_rows, num_positions = plan.text.shape
    stream, row, position = cells // plan.text.numel(), cells // num_positions % num_rows, cells % num_positions
    visible = torch.where(mask_SMTT[stream, row, position], plan.text[row], -1)
    described = torch.cat([torch.stack([stream, plan.prefix[row], position], 1), visible], 1)
    _, first, state = np.unique(described.numpy(), axis=0, return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(state.reshape(-1))


def _bottom_half(
    net: nn.Module, block: _Block, words: Tensor, positions: Tensor, is_r2l: Tensor, has_queries: bool
) -> _Block:
    """The block with its states (words int64 [U] at ``positions``) and queries, up to where the image comes in."""
    states, queries = net.embedding(words, positions), None
    if has_queries:
        bos = torch.full_like(block.read, net.vocabulary.bos_id)
        queries = net.embedding(bos, torch.zeros_like(bos))
    for number, layer in enumerate(net.bottom):
        states = layer(states, block.attend)
        queries = _reconstruct(net, "bottom", number, block, queries, states)
    states = net.text_projection(states)
    if has_queries:
        l2r_type, (r2l_type, query_type) = net.type_embedding.weight[0], net.stream_embedding.weight
        states = states + torch.where(is_r2l[:, None], r2l_type, l2r_type)
        queries = net.text_projection(queries) + query_type
    else:
        states = states + net.type_embedding.weight[0]
    top = net.top[0]
    return _replaced(block, states=top.residual(top.attention(states, block.attend), states), queries=queries)


def _replaced(block: _Block, **changes: Tensor | None) -> _Block:
    return _Block(**{**vars(block), **changes})


def _fuse(net: nn.Module, block: _Block, image: list[tuple[Tensor, ...]]) -> Tensor:
    """CLS features [M, D] of a block's captions with an image, given by its keys and values in every top layer."""
    states, queries = block.states, block.queries
    for number, (layer, (key, value)) in enumerate(zip(net.top, image, strict=True)):
        only_read = queries is None and number == len(net.top) - 1  # the last layer's other states have no reader
        if number:
            attend = block.attend_last if only_read else block.attend
            own = states[block.read] if only_read else states
            states = layer.residual(layer.attention(states, attend), own)
        elif only_read:
            states = states[block.read]
        attention = layer.cross_attention
        (query,) = split_heads(attention.query(states)[None], attention.num_heads)
        mixed = merge_heads(F.scaled_dot_product_attention(query, key, value))[0]
        states = layer.ffn(layer.cross_residual(attention.out(mixed), states))
        queries = _reconstruct(net, "top", number, block, queries, states)
    return states if queries is None else with_states(queries, states, block.beside)


def _reconstruct(
    net: nn.Module, half: str, number: int, block: _Block, queries: Tensor | None, states: Tensor
) -> Tensor | None:
    """The CLS queries behind the reconstructor layer that reads text layer ``number``, if there is one."""
    if queries is None:
        return None
    layers = getattr(net, f"reconstructor_{half}")
    which = number - len(getattr(net, half)) + len(layers)
    if which < 0:
        return queries
    layer = layers[which]
    if which == 0:
        queries = with_states(queries, states, block.beside)
    mixed = _attend_once(layer.cross_attention, queries, states[block.of_caption], block.is_state)
    return layer.ffn(layer.cross_residual(mixed, queries))


def _attend_once(attention: nn.Module, query_MD: Tensor, states_MKD: Tensor, mask_M1K: Tensor) -> Tensor:
    """``CrossAttention`` of one query a caption, [M, D], to its K = S*T states.

    (W_q q) (W_k x + b_k) = (W_k' W_q q) x + a number that softmax cancels, and the weights of W_v x + b_v sum to 1: the
    projections are applied to one query and one mean a head, instead of to all states.
    """
    num_heads = attention.num_heads
    key_HCD, value_HCD = attention.key_value.weight.unflatten(0, (2, num_heads, -1))
    query_HMC = attention.query(query_MD).unflatten(1, (num_heads, -1)).transpose(0, 1) * key_HCD.shape[1] ** -0.5
    scores_MHK = (query_HMC @ key_HCD).transpose(0, 1) @ states_MKD.transpose(1, 2)
    weights_MHK = scores_MHK.masked_fill(~mask_M1K, float("-inf")).softmax(2)
    mean_HMD = (weights_MHK @ states_MKD).transpose(0, 1)
    mixed_MD = (mean_HMD @ value_HCD.transpose(1, 2)).transpose(0, 1).flatten(1)
    return attention.out(mixed_MD + attention.key_value.bias.chunk(2)[1])
