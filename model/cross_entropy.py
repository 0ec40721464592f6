"""Cross entropy of a linear layer over the vocabulary that never holds all [targets x vocabulary] logits.

Legend (suffixes of names): M targets, D width, V vocabulary, C vocabulary chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cpu.door import KeptMemory


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk_size: int, memory: KeptMemory
) -> tuple[Tensor, Tensor]:
    """Cross entropy of ``hidden @ weight.T + bias``, a chunk of the vocabulary at a time.

    Args:
        hidden: [M, D].
        weight: [V, D], of the same dtype; both are cast under autocast, as by a linear layer.
        bias: [V].
        labels: int64 [M], 0 to V-1.
        chunk_size: C, vocabulary entries whose logits are held at once.
        memory: where the gradient of the weight is taken from; without grad mode nothing is.

    Returns:
        fp32 [M] losses with gradient, bool [M] whether the label's logit is larger than all others: where two words
        share the largest logit (bf16 has few numbers), neither is predicted.
    """
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # a dry run has no autocast
        hidden, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (hidden, weight))
    wanted = memory if torch.is_grad_enabled() else None  # within ``apply`` grad mode is always off
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, chunk_size, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward keeps a running maximum and sum of exponentials (online log-sum-exp, Milakov & Gimelshein 2018,
    arXiv 1805.02867), so that memory is [M, C] instead of [M, V]. Backward needs every exponential again. The last
    chunk's are still in the buffer; those of as many chunks before it as fit wait in the memory that the gradient of
    the weight takes in any case, and are read before it is written; all others are computed again. So they are under
    torch.compile, whose graphs write to no memory twice. Products run in the input's dtype, everything else in fp32.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk_size: int, memory: KeptMemory | None
    ):
        lowest_M = torch.full((hidden.shape[0],), float("-inf"), dtype=torch.float32, device=hidden.device)
        maximum_M = largest_other_M = lowest_M  # so far: of all logits, of all but the label's
        total_M = torch.zeros_like(maximum_M)
        label_logit_M = torch.zeros_like(maximum_M)
        chunks = _chunks(weight, labels, chunk_size)
        buffer = _buffer(hidden, weight, chunk_size)
        keeps = memory is not None and any(ctx.needs_input_grad) and not torch.compiler.is_compiling()
        weight_grad_VD = None
        if keeps and ctx.needs_input_grad[1]:
            weight_grad_VD = memory.empty(weight.shape, weight.dtype, weight.device)
        rooms = _rooms(weight_grad_VD, hidden.shape[0], chunk_size, len(chunks))
        places = [buffer] * (len(chunks) - 1 - len(rooms)) + rooms + [buffer]
        kept: list[tuple[Tensor, Tensor]] = []  # a chunk's exponentials, and the maximum they refer to
        for (start, stop, local_M1, inside_M), place in zip(chunks, places, strict=True):
            logits_MC = _logits(hidden, weight[start:stop], bias[start:stop], place)
            at_label_M1 = logits_MC.gather(1, local_M1)
            label_logit_M = torch.where(inside_M, at_label_M1[:, 0], label_logit_M)
            logits_MC.scatter_(1, local_M1, torch.where(inside_M[:, None], lowest_M[:, None], at_label_M1))
            largest_other_M = torch.maximum(largest_other_M, logits_MC.amax(1))
            logits_MC.scatter_(1, local_M1, at_label_M1)
            new_maximum_M = torch.maximum(
                maximum_M, torch.maximum(largest_other_M, torch.where(inside_M, label_logit_M, lowest_M))
            )
            exponentials_MC = logits_MC.sub_(new_maximum_M[:, None]).exp_()
            total_M = total_M * (maximum_M - new_maximum_M).exp() + exponentials_MC.sum(1)
            maximum_M = new_maximum_M
            kept.append((exponentials_MC, maximum_M))
        log_sum_M = maximum_M + total_M.log()
        correct = label_logit_M > largest_other_M
        ctx.save_for_backward(hidden, weight, bias, labels, log_sum_M)
        ctx.chunk_size = chunk_size
        ctx.kept = (weight_grad_VD, buffer, kept[-1 - len(rooms) :]) if keeps else (None, None, [])
        ctx.mark_non_differentiable(correct)
        return log_sum_M - label_logit_M, correct

    @staticmethod
    def backward(ctx, loss_grad_M: Tensor, _):
        hidden, weight, bias, labels, log_sum_M = ctx.saved_tensors
        (weight_grad_VD, buffer, kept), ctx.kept = ctx.kept, (None, None, [])  # read once: it is written over
        if buffer is None:
            buffer = _buffer(hidden, weight, ctx.chunk_size)
            weight_grad_VD = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        hidden_grad_MD = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        bias_grad_V, ones = torch.empty_like(bias), torch.ones_like(log_sum_M)
        for start, stop, local_M1, inside_M in reversed(_chunks(weight, labels, ctx.chunk_size)):
            if kept:
                exponentials_MC, maximum_M = kept.pop()
                grad_MC = buffer[: exponentials_MC.numel()].view_as(exponentials_MC)
                torch.mul(exponentials_MC, ((maximum_M - log_sum_M).exp() * loss_grad_M)[:, None], out=grad_MC)
            else:
                grad_MC = _logits(hidden, weight[start:stop], bias[start:stop], buffer).sub_(log_sum_M[:, None]).exp_()
                grad_MC.mul_(loss_grad_M[:, None])
            grad_MC.scatter_add_(1, local_M1, (inside_M * -loss_grad_M)[:, None])
            bias_grad_V[start:stop] = ones @ grad_MC
            low = grad_MC.to(hidden.dtype)
            hidden_grad_MD += low @ weight[start:stop]
            if weight_grad_VD is not None:
                torch.mm(low.T, hidden, out=weight_grad_VD[start:stop])
        return hidden_grad_MD.to(hidden.dtype), weight_grad_VD, bias_grad_V, None, None, None


def _chunks(weight: Tensor, labels: Tensor, chunk_size: int) -> list[tuple[int, int, Tensor, Tensor]]:
    """For each chunk of the vocabulary: its first entry and its end, the labels within it int64 [M, 1] (clamped), and
    which targets have their label in it, bool [M]."""
    chunks = []
    for start in range(0, weight.shape[0], chunk_size):
        stop = min(start + chunk_size, weight.shape[0])
        local = (labels - start).clamp(0, stop - start - 1)[:, None]
        chunks.append((start, stop, local, (labels >= start) & (labels < stop)))
    return chunks


def _buffer(hidden: Tensor, weight: Tensor, chunk_size: int) -> Tensor:
    """Room for the logits of one chunk, fp32 [M * C]."""
    size = hidden.shape[0] * min(chunk_size, weight.shape[0])
    return torch.empty(size, dtype=torch.float32, device=hidden.device)


def _rooms(weight_grad: Tensor | None, num_targets: int, chunk_size: int, num_chunks: int) -> list[Tensor]:
    """The front of ``weight_grad`` as rooms fp32 [M * C] for the chunks before the last one, as many as fit.

    Backward goes from the last chunk to the first and writes the gradient of chunk k to k * C * D only when that chunk
    has been read. With n chunks and K rooms of size E, s rooms are then still to be read where k = n - 1 - K + s, and
    they end before it: s * E <= k * C * D, since K * E <= (n - 1) * C * D, and K = n - 1 where E < C * D.
    """
    if weight_grad is None or num_targets == 0:
        return []
    size = num_targets * chunk_size
    front = weight_grad[: (num_chunks - 1) * chunk_size].view(-1).view(torch.uint8)
    count = min(num_chunks - 1, front.numel() // (4 * size))
    return list(front[: count * 4 * size].view(torch.float32).view(count, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, place: Tensor) -> Tensor:
    """fp32 logits [M, C] in the front of ``place``."""
    out = place[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
    if hidden.dtype != torch.float32:
        return out.copy_(F.linear(hidden, weight)).add_(bias)
    return torch.mm(hidden, weight.T, out=out).add_(bias)  # addmm would spread the bias over all of ``out`` first
