"""Where the language model of EVLGen attended in an image as it predicted the words of a text.

Legend: T tokens of the text, Q tokens that the connector leaves of an image, H heads, L places of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.connectors.regroup import PixelShuffle, Pooling
from model.evlgen import EVLGen
from model.merge_maps import patch_groups
from model.vision.tower import Grid


@torch.no_grad()
def language_attention(net: EVLGen, batch: Batch) -> Tensor:
    """The share of each image token in what the state before each token of a text attended to, fp32 [T, Q].

    Mean over heads and layers. ``batch`` holds one text about one image or clip; ``net`` is in evaluation mode and is
    run once, by transformers' attention that tells its weights ("eager").

    Raises:
        ValueError: the layers of the language model do not tell them.
    """
    with _weights_of(net.language.llm) as recorded:
        net(batch)
    if not recorded:
        raise ValueError(f"a {net.language.llm.config.model_type} does not tell its attention weights")
    first, length = len(net.before), int(batch.plan.lengths[0])
    weights_LL = torch.stack([one[0].float().mean(0) for one in recorded]).mean(0)
    start = len(weights_LL) - batch.plan.text.shape[1]
    return weights_LL[start - 1 : start - 1 + length, first:start]


@torch.no_grad()
def token_areas(net: EVLGen, images: Tensor, grid: Grid) -> Tensor:
    """Of which patches each token of an image is made, and to what share, fp32 [Q, cells of the grid].

    ``images``: one sample, uint8 [1, I, 3, S, S]. A row adds up to 1, or less where the class token is part of it.

    Raises:
        ValueError: tokens are no patches, as queries asked for them.
    """
    connector, cells = net.connector, grid.height * grid.width
    if isinstance(connector.regroup, Pooling | PixelShuffle):
        each = torch.eye(cells, device=images.device)[:, :, None]  # as many images as cells, with one of them each
        found = connector.regroup(torch.cat([each.new_zeros(cells, grid.leading, 1), each], 1)).sum(2).T
        return found / found.sum(1, keepdim=True)
    if not connector.merges:
        raise ValueError(
            f"no map of the words over the image: the queries of model.connector.name {connector.config.name} stand for"
            " no patches"
        )
    groups, num_tokens = patch_groups(net, images, Grid(1, net.vision.num_tokens, 0))[-1]
    members = torch.nn.functional.one_hot(groups, num_tokens).T.float()
    if connector.regroup is not None:  # which puts what is left in the order of the image
        places = torch.arange(len(groups), device=groups.device, dtype=torch.float32)
        members = members[((members @ places) / members.sum(1)).argsort(stable=True)]
    return (members / members.sum(1, keepdim=True))[:, grid.leading :]


@contextmanager
def _weights_of(llm: nn.Module) -> Iterator[list[Tensor]]:
    """The attention weights [1, H, L, L] of each layer of a language model of transformers that runs inside."""
    recorded: list[Tensor] = []

    def record(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            recorded.append(output[1])

    hooks = [one.register_forward_hook(record) for one in llm.modules() if type(one).__name__.endswith("Attention")]
    before = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield recorded
    finally:
        llm.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
