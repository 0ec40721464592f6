"""A norm of a vision tower's tokens that begins with channels that tell images apart.

Features of a trained tower differ little from image to image: most of each token is what all have in common, which a
norm over channels leaves in.

Legend: B images, P tokens, W channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST_ENLARGED, TINY = 10.0, 1e-6  # of a norm's weight, over that of a channel of mean deviation; a deviation


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the W channels whose weight and bias can be fitted to images; both are trained."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    @torch.no_grad()
    def standardise(self, tokens: Tensor) -> None:
        """Sets weight and bias: over ``tokens`` [B, P, W] each channel of the output has mean 0 and variance 1.

        A channel that is nearly constant is enlarged tenfold at most.
        """
        self.reset_parameters()
        channels = self(tokens.to(self.weight)).double().flatten(0, 1)
        deviation = channels.std(0, correction=0)
        weight = 1 / deviation.clamp(min=max(float(deviation.mean()) / MOST_ENLARGED, TINY))
        self.weight.copy_(weight)
        self.bias.copy_(-channels.mean(0) * weight)
