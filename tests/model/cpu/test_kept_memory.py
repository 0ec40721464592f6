"""Memory that is used again: never while somebody holds a tensor on it, and with the gradients of plain PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.cpu.kept_memory import SMALLEST, KeptMemory
from model.heads import LanguageModelHead
from model.layers import WordEmbedding
from tests.rounding import rounding

CPU = torch.device("cpu")
LARGE = torch.Size([SMALLEST // 4 // 64 + 3, 64])  # fp32 entries, just above the smallest size that is kept


def test_memory_comes_again_when_its_last_tensor_has_died() -> None:
    memory = KeptMemory()
    first = memory.empty(LARGE, torch.float32, CPU)
    assert first.shape == LARGE and first.dtype == torch.float32 and first.is_contiguous()
    place, view = first.data_ptr(), first[5:7].T
    del first
    second = memory.empty(LARGE, torch.float32, CPU)
    assert second.data_ptr() != place  # a view is still alive
    del view
    assert memory.empty(LARGE, torch.float32, CPU).data_ptr() == place
    twice = torch.Size([2 * LARGE[0], 64])
    half = memory.empty(twice, torch.bfloat16, CPU)
    assert half.shape == twice and half.dtype == torch.bfloat16 and half.data_ptr() == place


def test_small_tensors_and_other_devices_get_memory_of_their_own() -> None:
    memory = KeptMemory()
    small = memory.empty(torch.Size([4, 4]), torch.float32, CPU)
    assert small.shape == (4, 4) and not memory._free
    assert memory.empty(LARGE, torch.float32, torch.device("meta")).device.type == "meta"


def test_a_copy_of_its_owner_takes_no_memory_along() -> None:
    memory = KeptMemory()
    memory.empty(LARGE, torch.float32, CPU)
    assert memory._free and not copy.deepcopy(memory)._free
    assert len(pickle.dumps(memory)) < 1000


@pytest.mark.parametrize("num_words", [100, LARGE[0]])
def test_gradient_of_the_word_table_is_that_of_nn_embedding(num_words: int) -> None:
    ours = WordEmbedding(num_words, 64, padding_idx=1)
    theirs = nn.Embedding(num_words, 64, padding_idx=1, _weight=ours.weight.detach().clone())
    for seed in range(3):  # the third writes where the first two left their numbers
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, num_words, (50,), generator=generator)
        ids[:3] = torch.tensor([1, 7, 7])
        upstream = torch.randn(50, 64, generator=generator)
        for table in (ours, theirs):
            table.weight.grad = None
            (table(ids) * upstream).sum().backward()
        assert torch.equal(ours(ids), theirs(ids))
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.slow
def test_gradients_of_two_backward_passes_add_up() -> None:
    """The first pass's gradient lives while the second is written, as in gradient accumulation."""
    torch.manual_seed(0)
    table, head = WordEmbedding(LARGE[0], 64, padding_idx=1), LanguageModelHead(64, LARGE[0])
    parts = [torch.randint(2, LARGE[0], (2, 6)) for _ in range(2)]
    for ids, labels in parts:
        head(table(ids), labels)[0].sum().backward()
    got = table.weight.grad, head.weight.grad
    word, weight = (module.weight.detach().clone().requires_grad_() for module in (table, head))
    for ids, labels in parts:
        logits = F.linear(head.hidden(F.embedding(ids, word)), weight, head.bias)
        F.cross_entropy(logits, labels, reduction="sum").backward()
    tolerance = rounding(64, LARGE[0])  # products of the width, exponentials of all words
    for own, expected in zip(got, (word.grad, weight.grad), strict=True):
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


def test_every_step_writes_to_the_same_memory() -> None:
    table, head = WordEmbedding(LARGE[0], 64, padding_idx=1), LanguageModelHead(64, LARGE[0])
    places = set()
    for _ in range(4):
        ids = torch.randint(2, LARGE[0], (6,))
        head(table(ids), ids)[0].sum().backward()
        places.add((table.weight.grad.data_ptr(), head.weight.grad.data_ptr()))
        table.weight.grad = head.weight.grad = None
    assert len(places) == 1
