"""Output heads; the vocabulary head never holds all of its [targets x vocabulary] logits.

Legend: M targets, D width, V vocabulary, C vocabulary chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.text import TOP_EPS, initial_std

KEPT_SHARE = 1 / 3  # of the vocabulary's logits, whose exponentials stay until backward


class LanguageModelHead(nn.Module):
    """Linear, GELU, LayerNorm, then a vocabulary projection with separate bias (specification section 2.7)."""

    def __init__(self, width: int, vocabulary_size: int, chunk_size: int = 4096) -> None:
        """``chunk_size``: vocabulary entries whose logits are held at once."""
        super().__init__()
        self.chunk_size = chunk_size
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=TOP_EPS)
        self.weight = nn.Parameter(torch.empty(vocabulary_size, width))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        for weight in (self.transform.weight, self.weight):
            nn.init.normal_(weight, std=initial_std(width))
        nn.init.zeros_(self.transform.bias)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of each target.

        Args:
            features: [M, D].
            labels: int64 [M].

        Returns:
            fp32 [M] losses with gradient, bool [M] whether the largest logit is the label's.
        """
        return ChunkedCrossEntropy.apply(self.hidden(features), self.weight, self.bias, labels, self.chunk_size)

    def hidden(self, features: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(features)))

    def logits(self, features: Tensor) -> Tensor:
        """[M, D] -> [M, V], for decoding and parity tests."""
        return F.linear(self.hidden(features), self.weight, self.bias)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Linear layer and cross entropy in one, a chunk of the vocabulary at a time.

    Forward keeps a running maximum and sum of exponentials (online log-sum-exp, Milakov & Gimelshein 2018,
    arXiv 1805.02867); backward computes the logits of each chunk again, so that weight and weight gradient are read and
    written once and memory is [M, C] instead of [M, V]. ``KEPT_SHARE`` of the chunks, and at least one, keep their
    exponentials until backward instead: memory for time. Products run in the input's dtype, everything else in fp32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk_size: int):
        maximum = torch.full((hidden.shape[0],), float("-inf"), device=hidden.device)
        total = torch.zeros_like(maximum)
        label_logit = torch.zeros_like(maximum)
        kept: list[Tensor] = []  # exponentials of the first chunks and the maximum they refer to, in turn
        num_kept = max(1, int(KEPT_SHARE * weight.shape[0] / chunk_size)) if any(ctx.needs_input_grad) else 0
        buffer = None
        for start, stop, local, inside in _chunks(weight, labels, chunk_size):
            logits = _logits(hidden, weight[start:stop], bias[start:stop], buffer)
            new_maximum = torch.maximum(maximum, logits.amax(1))
            label_logit = torch.where(inside, logits.gather(1, local)[:, 0], label_logit)
            exponentials = logits.sub_(new_maximum[:, None]).exp_()
            total = total * (maximum - new_maximum).exp() + exponentials.sum(1)
            maximum = new_maximum
            if len(kept) < 2 * num_kept:
                kept += [exponentials, maximum]
            else:
                buffer = exponentials
        log_sum = maximum + total.log()
        ctx.save_for_backward(hidden, weight, bias, labels, log_sum, *kept)
        ctx.chunk_size = chunk_size
        correct = label_logit >= maximum
        ctx.mark_non_differentiable(correct)
        return log_sum - label_logit, correct

    @staticmethod
    def backward(ctx, loss_grad: Tensor, _):
        hidden, weight, bias, labels, log_sum, *kept = ctx.saved_tensors
        hidden_grad = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
        ones = torch.ones_like(log_sum)
        buffer = None
        for number, (start, stop, local, inside) in enumerate(_chunks(weight, labels, ctx.chunk_size)):
            if 2 * number < len(kept):
                exponentials, maximum = kept[2 * number : 2 * number + 2]
                grad = exponentials * ((maximum - log_sum).exp() * loss_grad)[:, None]
            else:
                grad = _logits(hidden, weight[start:stop], bias[start:stop], buffer).sub_(log_sum[:, None]).exp_()
                grad.mul_(loss_grad[:, None])
                buffer = grad
            grad.scatter_add_(1, local, (inside * -loss_grad)[:, None])
            bias_grad[start:stop] = ones @ grad
            low = grad.to(hidden.dtype)
            hidden_grad += low @ weight[start:stop]
            torch.mm(low.T, hidden, out=weight_grad[start:stop])
        return hidden_grad.to(hidden.dtype), weight_grad, bias_grad, None, None


def _chunks(weight: Tensor, labels: Tensor, chunk_size: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each chunk of the vocabulary: its first entry and its end, the labels within it int64 [M, 1] (clamped), and
    which targets have their label in it, bool [M]."""
    for start in range(0, weight.shape[0], chunk_size):
        stop = min(start + chunk_size, weight.shape[0])
        local = (labels - start).clamp(0, stop - start - 1)[:, None]
        yield start, stop, local, (labels >= start) & (labels < stop)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, buffer: Tensor | None) -> Tensor:
    """fp32 logits [M, C], in ``buffer`` (of an earlier chunk, as large or larger) where one is given and fits."""
    if hidden.dtype != torch.float32:
        return F.linear(hidden, weight).float().add_(bias)
    if buffer is None:
        return torch.addmm(bias, hidden, weight.T)
    out = buffer.view(-1)[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
    return torch.addmm(bias, hidden, weight.T, out=out)


class Pooler(nn.Module):
    """Linear and tanh on the CLS query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[M, D] -> [M, D]."""
        return torch.tanh(self.dense(features))
