"""Beam search by the rules of transformers' ``generate``, for numbers that are compared with those made by it.

Rules: ``_beam_search`` of generation/utils.py in transformers 5.23, ``BeamSearchScorer`` of its 4.31 (which the public
release of EVLGen decoded with), both with ``early_stopping`` False.
Legend: B images, K beams, V vocabulary, N words that may follow the prompt, C candidates of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decode.search import Decoder, alone, penalised, room, sequences

NEVER = float("-inf")


@dataclass(frozen=True)
class Rules:
    """What the versions of transformers differ in.

    Args:
        cut_beams: at the last step all K beams are kept as if they had ended; else those among the first K candidates.
        added_length: so many tokens more are counted of a sequence that was cut, and of what an image can still become.
        ends_give_hope: whether a sequence that just ended tells, like beams that go on, how good an image can become.
    """

    cut_beams: bool
    added_length: int
    ends_give_hope: bool


TRANSFORMERS_4 = Rules(cut_beams=True, added_length=1, ends_give_hope=True)  # 4.31, without ids of a prompt
TRANSFORMERS_5 = Rules(cut_beams=False, added_length=0, ends_give_hope=False)


@torch.no_grad()
def ranked_beam(
    decoder: Decoder,
    max_tokens: int = 30,
    beams: int = 3,
    length_penalty: float = 1.0,
    all_agree: Callable[[bool], bool] = alone,
    min_tokens: int = 0,
    rules: Rules = TRANSFORMERS_4,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """The best of K kept sequences, which ended among the K best candidates of their step.

    What differs from :func:`model.decode.search.beam`: a beam may end only where its end is among the K most probable
    candidates of all beams, so a better sequence may be lost; and an image is done once K sequences are kept and its
    best beam, at the length that it has, is not above the worst of them, though more words could make it so.

    Args and returns as of :func:`model.decode.search.beam`, and ``rules``.

    Raises:
        ValueError: as there.
    """
    num_words = room(decoder, max_tokens, min_tokens)
    if beams < 1:
        raise ValueError(f"beams is {beams}, expected at least 1")
    scores = decoder.start()
    (num_images, vocabulary), device = scores.shape, scores.device
    ends = torch.tensor(decoder.end_ids, device=device)
    first = torch.arange(num_images, device=device)[:, None]
    sums = torch.zeros(
        num_images, 1, dtype=torch.float32, device=device
    )  # log probability of each beam, the largest first
    words = torch.full((num_images, 1, num_words), decoder.end_ids[0], device=device)
    kept = _Kept(num_images, beams, words)
    for number in range(num_words):
        length = len(decoder.prompt) + number + 1
        of_word = scores.log_softmax(-1).view(num_images, -1, vocabulary)
        total = penalised(of_word, words[:, :, :number], repetition_penalty)
        if length <= min_tokens:
            total[:, :, ends] = NEVER
        flat = (total + sums[:, :, None]).flatten(1)
        top, flat = flat.topk(min(max(2, 1 + len(ends)) * beams, flat.shape[1]))
        parents, ids = flat // vocabulary, flat % vocabulary
        candidates = words[first, parents]
        candidates[:, :, number] = ids
        ended = torch.isin(ids, ends)
        counted = torch.arange(top.shape[1], device=device) < beams
        kept.add(torch.where(ended & counted, top, NEVER), length**length_penalty, candidates)
        going = torch.where(ended, NEVER, top)
        if length == max_tokens and not rules.cut_beams:
            going = torch.where(counted, going, NEVER)
        sums, chosen = going.topk(min(beams, going.shape[1]))
        words = candidates[first, chosen]
        if length == max_tokens:
            kept.add(sums, (length + rules.added_length) ** length_penalty, words)
            break
        best = top[:, 0] if rules.ends_give_hope else sums[:, 0]
        kept.close(best, (length + rules.added_length) ** length_penalty)
        if all_agree(bool(kept.done.all())):
            break
        decoder.select((first * total.shape[1] + parents.gather(1, chosen)).flatten())
        scores = decoder.step(ids.gather(1, chosen).flatten())
    return sequences(decoder, kept.words[:, 0])


class _Kept:
    """The K best sequences of each image that ended: ``values`` fp32 [B, K], ``words`` int64 [B, K, N], the best first;
    nothing is added to an image that is ``done``, bool [B]."""

    def __init__(self, num_images: int, beams: int, words: Tensor) -> None:
        """``words``: [B, 1, N] that no word was chosen of."""
        self.values = torch.full((num_images, beams), NEVER, dtype=torch.float32, device=words.device)
        self.words = words.expand(-1, beams, -1).clone()
        self.done = torch.zeros(num_images, dtype=torch.bool, device=words.device)

    def add(self, sums: Tensor, divisor: float, words: Tensor) -> None:
        """Sequences ``words`` [B, C, N] of log probability ``sums`` [B, C], -inf for none."""
        values = torch.where(self.done[:, None], NEVER, sums / divisor)
        merged = torch.cat([self.values, values], dim=1)
        self.values, chosen = merged.topk(self.values.shape[1])
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        self.words = torch.cat([self.words, words], dim=1)[rows, chosen]

    def close(self, best: Tensor, divisor: float) -> None:
        """Images are done that keep K sequences, none of which is worse than ``best`` [B] / ``divisor``."""
        worst = self.values[:, -1]
        self.done |= (worst > NEVER) & (worst >= best / divisor)
