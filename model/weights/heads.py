"""Which head of a source a head of ours starts from, where it has no tensor of that name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.weights.start import RESIZES, SAME_NAMES, Resizes, Rules

# Our head -> other names that its tensors may have, the best first. Below "task." are heads of imported releases.
OTHER_NAMES = {
    "answer_head": ("task.vqa_classifier",),
    "pair_head": ("task.nlvr2_classifier",),
    "rank_head": ("task.rank_output", "itm_head", "task.itm_score.fc"),
    "itm_head": ("task.itm_score.fc",),
}


def head_rules(state: Mapping[str, Tensor]) -> Rules:
    """Rules for ``start_from`` by which heads may start from those that ``state`` has for the same purpose."""
    rules = []
    for head, others in OTHER_NAMES.items():
        present = (name for name in (head, *others) if any(key.startswith(f"{name}.") for key in state))
        rules.append((rf"{head}\.(.+)", (rf"{next(present, head)}.\1",)))
    return (*rules, *SAME_NAMES)


def head_resizes(released: bool) -> Resizes:
    """What may have another size on its way into a head, besides what may anyway."""

    def rank(value: Tensor, shape: torch.Size) -> Tensor:
        """The number to rank by, from the two logits of image-text matching: [2, D] -> [1, D], or [2] -> [1].

        # NOTE release: the second logit's row alone (specification section 7.4); here: the difference of both, the log
        odds of a match, by which an untrained rank head orders pairs exactly as image-text matching does.
        """
        if len(value) != 2 or shape[:1] != (1,) or value.shape[1:] != shape[1:]:
            return value
        return value[1:] if released else value[1:] - value[:1]

    return (*RESIZES, (r"rank_head\.(weight|bias)", rank))
