"""The chunked vocabulary loss against PyTorch's own cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.heads import KEPT_SHARE, ChunkedCrossEntropy, LanguageModelHead


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 100])
def test_chunked_cross_entropy_equals_the_plain_one(chunk_size: int):
    """Losses, correctness and every gradient, with chunks that do and do not divide the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(32, 8, generator=generator).double() * 2, torch.randn(32, generator=generator).double()
    labels, scale = torch.randint(0, 32, (13,), generator=generator), torch.rand(13, generator=generator)
    results = []
    for chunked in (False, True):
        leaves = [tensor.float().clone().requires_grad_() for tensor in (hidden, weight, bias)]
        if chunked:
            losses, correct = ChunkedCrossEntropy.apply(*leaves, labels, chunk_size)
            expected = F.linear(*leaves).argmax(1) == labels
            assert torch.equal(correct, expected)
        else:
            losses = F.cross_entropy(F.linear(*leaves), labels, reduction="none")
        (losses * scale).sum().backward()
        results.append([losses.detach(), *(leaf.grad for leaf in leaves)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-6)


def test_no_targets_no_loss_no_nan():
    head = LanguageModelHead(8, 20)
    losses, correct = head(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == correct.shape == (0,)
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None)


def test_bf16_losses_are_computed_in_fp32():
    head = LanguageModelHead(16, 50, chunk_size=16)
    features, labels = torch.randn(9, 16), torch.randint(0, 50, (9,))
    exact, _ = head(features, labels)
    low, _ = head.bfloat16()(features.bfloat16(), labels)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.03, atol=0.03)


def test_memory_of_logits_is_bounded():
    """The largest tensor made on the way is [targets x chunk], and few of them stay until backward."""
    largest = kept = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    head = LanguageModelHead(4, 5000, chunk_size=128)
    features = torch.randn(200, 4, requires_grad=True)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() if tensor.shape == (200, 128) else 0
        return tensor

    with Watch(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head(features, torch.randint(0, 5000, (200,)))[0].sum().backward()
    assert largest <= 200 * 128
    assert 0 < kept <= KEPT_SHARE * 200 * 5000
    kept = 0
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head(features, torch.randint(0, 5000, (200,)))
    assert kept == 0
