"""The chunked vocabulary loss against PyTorch's own cross entropy."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from model.cpu.kept_memory import KeptMemory
from model.cross_entropy import chunked_cross_entropy
from model.heads import ClassifierHead, LanguageModelHead
from tests.rounding import DOUBLE, rounding


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
            losses, correct = chunked_cross_entropy(*leaves, labels, chunk_size, KeptMemory())
            expected = F.linear(*leaves).argmax(1) == labels
            assert torch.equal(correct, expected)
        else:
            losses = F.cross_entropy(F.linear(*leaves), labels, reduction="none")
        (losses * scale).sum().backward()
        results.append([losses.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = rounding(8, 32, 13)  # logits of 8 products, up to 16 in size; 32 words; gradients over 13 targets
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=16 * tolerance)


def test_no_targets_no_loss_no_nan():
    head = LanguageModelHead(8, 20)
    losses, correct = head(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == correct.shape == (0,)
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None)


def test_bf16_losses_are_computed_in_fp32():
    """Products as bf16 gives them, everything behind them exact to fp32: numbers whose products and sums are exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (9, 16), generator=generator).bfloat16()
    weight = (torch.randint(-4, 5, (50, 16), generator=generator) / 8).bfloat16()
    bias, labels = torch.randn(50, generator=generator).bfloat16(), torch.randint(0, 50, (9,), generator=generator)
    losses, _ = chunked_cross_entropy(hidden, weight, bias, labels, 16, KeptMemory())
    logits = (hidden.double() @ weight.double().T).bfloat16().double() + bias.double()
    exact = F.cross_entropy(logits, labels, reduction="none")
    assert losses.dtype == torch.float32 and exact.max() > 4  # in bf16 it would be off by up to 2**-7
    # A sum of V exponentials, each rounded with its exponent (of up to 32): V + 32 roundings, and the last difference.
    tolerance = (50 + 32 + 2) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 4, 12, 64])
@pytest.mark.parametrize("num_targets", [1, 3, 12, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_waits_for_backward_is_read_before_it_is_written_over(width: int, num_targets: int, dtype: torch.dtype):
    """All exponentials fit into the gradient of the weight, or some, or none; a second backward has none left."""
    generator = torch.Generator().manual_seed(width * num_targets)
    shapes = (num_targets, width), (50, width), (50,)
    tensors = [torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    labels = torch.randint(0, 50, (num_targets,), generator=generator)
    losses, _ = chunked_cross_entropy(*leaves, labels, 8, KeptMemory())
    first, second = (torch.autograd.grad(losses.sum(), leaves, retain_graph=True) for _ in range(2))
    exact = [tensor.detach().float().requires_grad_() for tensor in leaves]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels, reduction="sum"), exact)
    # In bf16 each exponential and each product is rounded once more; the longest sum here has 64 terms.
    share = rounding(64) if dtype != torch.bfloat16 else 4 * torch.finfo(dtype).eps
    tolerance = {"rtol": share, "atol": share}
    for one, again, plain in zip(first, second, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), plain, **tolerance)
        torch.testing.assert_close(again, one, rtol=tolerance["rtol"], atol=tolerance["atol"])


def test_a_frozen_vocabulary_gets_no_gradient():
    head = LanguageModelHead(16, 50, chunk_size=16)
    features, labels = torch.randn(9, 16, requires_grad=True), torch.randint(0, 50, (9,))
    (wanted,) = torch.autograd.grad(head(features, labels)[0].sum(), features)
    head.weight.requires_grad_(False)
    head(features, labels)[0].sum().backward()
    assert head.weight.grad is None
    torch.testing.assert_close(features.grad, wanted)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the storages made within it: of the largest, of all that live now, and of those at most."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in self.given:
            storage = result.untyped_storage()
            self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.largest, self.peak = max(self.largest, storage.nbytes()), max(self.peak, self.held())
        return result

    def held(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.slow
def test_memory_of_logits_is_one_chunk():
    """On the way one chunk of logits and the gradient of the weight, and so until backward."""
    head = LanguageModelHead(4, 5000, chunk_size=128)
    features, labels = torch.randn(200, 4, requires_grad=True), torch.randint(0, 5000, (200,))
    given = (features, labels, *head.parameters())
    num_chunks = -(-5000 // 128)
    chunk, weight_grad, few = 4 * 200 * 128, 4 * 5000 * 4, 4 * 200 * 30
    indices = num_chunks * 200 * (8 + 1 + 4)  # of each chunk: labels within it, which they are, running maxima
    with Watch(given) as watch:
        losses, _ = head(features, labels)
        assert chunk + weight_grad <= watch.held() < chunk + weight_grad + few
        assert watch.peak < chunk + weight_grad + indices + few
        losses.sum().backward()
    assert watch.largest == chunk and watch.peak < chunk + weight_grad + indices + 4 * 5000 + few


def test_scoring_makes_no_gradient():
    """Without grad mode, parameters that would have a gradient or not: one chunk of logits and nothing else."""
    head = LanguageModelHead(4, 5000, chunk_size=128)
    features, labels = torch.randn(200, 4), torch.randint(0, 5000, (200,))
    chunk, rest = 4 * 200 * 128, -(-5000 // 128) * 200 * (8 + 1 + 4) + 4 * 200 * 30
    assert rest < 5000 * 4 * 4 * 2  # a gradient of the weight would be seen
    for scoring in (torch.no_grad, torch.inference_mode):
        with Watch((features, labels, *head.parameters())) as watch, scoring():
            head(features, labels)
        assert watch.largest == chunk and watch.peak < chunk + rest
    with Watch((features, labels, *head.parameters())) as watch:
        head(features, labels)
    assert watch.peak > chunk + 5000 * 4 * 4


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_only_the_single_largest_logit_is_correct(chunk_size: int):
    """Equal logits predict nothing, in one chunk or in several, before the label or behind it."""
    rows = torch.tensor([[0.0] * 8, [2, 1, 2, 0, 0, 0, 0, 0], [0, 0, 3, 0, 0, 0, 0, 3], [0, 0, 3, 2, 0, 0, 0, 2.75]])
    labels = torch.arange(8).repeat_interleave(4)  # every row with every label
    weight, bias = rows.T.contiguous().repeat(1, 2), torch.zeros(8)
    hidden = torch.cat([torch.eye(4), torch.zeros(4, 4)], 1).repeat(8, 1)
    losses, correct = chunked_cross_entropy(hidden, weight, bias, labels, chunk_size, KeptMemory())
    logits = rows.repeat(8, 1)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    assert correct.view(8, 4).nonzero().tolist() == [[2, 3]]
    low = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), bias, labels, chunk_size, KeptMemory())[1]
    assert torch.equal(low, correct)


def test_under_autocast_gradients_are_those_of_a_linear_layer():
    """Forward and backward in bf16 with fp32 parameters, the backward pass within autocast and outside."""
    torch.manual_seed(0)
    head = LanguageModelHead(16, 50, chunk_size=16)
    features, labels = torch.randn(9, 16, requires_grad=True), torch.randint(0, 50, (9,))
    leaves = [features, *head.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = head(features, labels)
        plain = F.cross_entropy(head.logits(features).float(), labels, reduction="none")
        within = torch.autograd.grad(losses.sum(), leaves, retain_graph=True)
    outside, expected = (torch.autograd.grad(each.sum(), leaves) for each in (losses, plain))
    torch.testing.assert_close(losses, plain, rtol=0.02, atol=0.02)
    for ours, again, theirs in zip(outside, within, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)
        torch.testing.assert_close(again, theirs, rtol=0.03, atol=0.03)


def test_a_classifier_is_linear_layer_norm_gelu_linear():
    """By definition and with features so small that the eps of the LayerNorm, 1e-5, shows."""
    torch.manual_seed(0)
    head = ClassifierHead(8, 5, num_images=2).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
        head[0].bias.fill_(0.5)
        features = 1e-3 * torch.randn(3, 16, dtype=torch.float64)
        hidden = features @ head[0].weight.T + head[0].bias
        centred = hidden - hidden.mean(1, keepdim=True)
        assert hidden.shape == (3, 16) and centred.square().mean(1).max() < 1e-4
        hidden = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * head[1].weight + head[1].bias
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        expected = hidden @ head[3].weight.T + head[3].bias
        torch.testing.assert_close(head(features), expected, rtol=DOUBLE, atol=DOUBLE)
    assert [*dict(head.named_parameters())] == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
