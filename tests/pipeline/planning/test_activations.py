"""Activations of the network without values, against tensors that a real pass on a CPU saves for backward."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from model.batch import Batch, Row
from model.build import build_objective
from model.config import ModelConfig, ReconstructorConfig, TextConfig, VisionConfig, objective_options
from pipeline.planning.activations import Activations, measure
from tests.tiny_flm import VOCABULARY, caption

LENGTHS = [9, 12, 5, 14, 7, 12]


def config(dropout: float = 0.0, recomputes: bool = False, vision_layers: int = 2) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(name=None, image_size=64, patch_size=16, width=64, layers=vision_layers, head_width=16),
        text=TextConfig(
            width=64, heads=2, ffn_width=256, bottom_layers=1, top_layers=1, max_positions=40, dropout=dropout
        ),
        reconstructor=ReconstructorConfig(),
        activation_checkpointing=recomputes,
    )


def built(model: ModelConfig, device: str, name: str = "flm") -> tuple[nn.Module, Batch]:
    with torch.device(device):
        objective = build_objective(model, objective_options(name), VOCABULARY, 24)
    rows = [Row(caption(length, number), number, number) for number, length in enumerate(LENGTHS)]
    images = torch.zeros((len(rows), 1, 3, 64, 64), dtype=torch.uint8, device=device)
    return objective.train(), objective.planner(images, rows)


@cache
def planned(kind: str = "cuda", name: str = "flm", large_bytes: int = 1 << 62, **model) -> Activations:
    objective, batch = built(config(**model), "meta", name)
    return measure(objective, batch, objective.term_weights, kind, large_bytes)


def saved(model: ModelConfig, name: str = "flm") -> int:
    """Bytes of all storages that a real forward pass saves for backward, weights left out."""
    objective, batch = built(model, "cpu", name)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*objective.parameters(), *objective.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = objective(batch)
    assert losses
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("name", ["flm", "mlm", "ar"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_kept_for_backward_is_what_a_real_pass_saves(name: str, dropout: float) -> None:
    found, real = planned("cpu", name, dropout=dropout).kept, saved(config(dropout), name)
    # besides: the images, and of the vocabulary head the room of a weight's gradient and of a chunk of logits
    batch = built(config(), "cpu", name)[1]
    targets = sum(len(term.target) for term in batch.terms.values())
    besides = batch.images.nbytes + 4 * VOCABULARY.size * (64 + targets)
    # Of the 10 % by which the planner may be wrong about a rank, what it counts may take a fifth.
    assert real <= found <= 1.02 * real + besides, (found, real, besides)


def test_recomputing_keeps_the_inputs_of_layers_only() -> None:
    whole, less = planned(), planned(recomputes=True)
    assert less.kept < 0.5 * whole.kept
    assert less.kept <= less.peak < whole.peak
    assert less.operations > whole.operations


def test_a_vision_block_keeps_16_widths_a_token() -> None:
    width, heads, tokens = 64, 4, 17
    one, two = planned().kept, planned(vision_layers=3).kept  # the last is left out
    # its input, after each norm, queries, keys, values, mixed, the first sum, and twice the four times wider hidden
    floats = 16 * width + heads + 2 * 2  # a log-sum-exp a head, mean and deviation of two norms
    assert two - one == 4 * len(LENGTHS) * tokens * floats


def test_a_frozen_tower_keeps_nothing() -> None:
    objective, batch = built(config(), "meta")
    objective.net.vision.requires_grad_(False)
    frozen = measure(objective, batch, objective.term_weights, "cuda")
    one_block = 4 * len(LENGTHS) * 17 * (16 * 64 + 4 + 4)
    assert planned().kept - frozen.kept >= one_block
    gradients = 4 * sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    assert gradients <= frozen.peak_with_gradients <= gradients + frozen.peak


def test_dropout_keeps_a_byte_an_element_on_a_gpu() -> None:
    """Of states and queries: after the embedding, and in each layer after every sublayer."""
    plan = built(config(), "cpu")[1].plan
    states, queries = len(plan.l2r_index) + len(plan.r2l_index), len(plan.query_index)
    elements = 64 * (states * (1 + 2 + 3) + queries * (1 + 2 + 2))
    assert planned(dropout=0.1).kept - planned().kept == elements


def test_small_and_large_storages_are_counted_apart() -> None:
    all_small, all_large = planned(), planned(large_bytes=0)
    assert (all_small.small_peak, all_small.large_peak) == (all_small.peak, 0)
    assert (all_large.small_peak, all_large.large_peak) == (0, all_large.peak)


def test_half_precision_keeps_between_half_and_all() -> None:
    objective, batch = built(config(), "meta")
    in_bf16 = measure(objective.bfloat16(), batch, objective.term_weights, "cuda")
    assert 0.5 * planned().kept <= in_bf16.kept < 0.6 * planned().kept
