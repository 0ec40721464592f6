"""What an objective of pretraining is made of, and what fine-tuning takes over from it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from model.batch import Planner


class Parts(NamedTuple):
    """A network, the planner of its batches, and the factor of each language term's mean."""

    net: nn.Module
    planner: Planner
    term_weights: dict[str, float]
