"""Mask-Predict against its definition in plain Python, and on models whose answer is known."""

from __future__ import annotations

import pytest
import torch

from model.batch import Row
from model.decode.mask_predict import mask_predict
from tests.tiny_flm import VOCABULARY, images, tiny_flm

SPECIAL = list(VOCABULARY.special_ids)
MASK = VOCABULARY.mask_id


def log_probabilities(objective: torch.nn.Module, picture: torch.Tensor, words: list[int]) -> torch.Tensor:
    """[n, V] of one caption about one picture, some of its words `<mask>`."""
    batch = objective.planner(picture, [Row([0, *words, 2], 0, 0, "read")])
    logits = objective.lm_head.logits(objective.net(batch).l2r[1:-1])
    logits[:, SPECIAL] = float("-inf")
    return logits.log_softmax(-1)


def by_definition(objective, picture, length: int, iterations: int) -> tuple[float, list[int]]:
    """Mean log probability and words."""
    words, values = [MASK] * length, [0.0] * length
    for iteration in range(iterations):
        count = int(length * (iterations - iteration) / iterations + 1e-9)
        hidden = sorted(range(length), key=lambda place: (values[place], place))[:count]
        if not hidden:
            continue
        scores = log_probabilities(objective, picture, [MASK if i in hidden else w for i, w in enumerate(words)])
        for place in hidden:
            values[place], words[place] = scores[place].max().item(), int(scores[place].argmax())
    return sum(values) / length, words


@pytest.mark.parametrize(
    ("behaviour", "iterations"), [("default", 1), ("default", 4), ("released", 4), ("default", 10)]
)
@torch.no_grad()
def test_every_length_is_tried_and_the_best_mean_wins(behaviour: str, iterations: int) -> None:
    objective, pictures = tiny_flm(behaviour, name="mlm"), images(3, seed=3)
    plain = tiny_flm(name="mlm")
    plain.load_state_dict(objective.state_dict(), strict=False)  # released planners know no read rows
    lengths, chosen, changed = [5, 2, 8], set(), 0
    found = mask_predict(objective, pictures, lengths, iterations)
    for number, words in enumerate(found):
        picture = pictures[number : number + 1]
        candidates = [by_definition(plain, picture, length, iterations) for length in lengths]
        assert words == max(candidates)[1]
        chosen.add(len(words))
        changed += words != by_definition(plain, picture, len(words), 1)[1]
    assert iterations == 1 or (changed and len(chosen) > 1)  # else nothing would be tested
    assert not set(SPECIAL) & {word for words in found for word in words}


@torch.no_grad()
def test_planted_logits_decide_words_and_not_special_tokens() -> None:
    objective = tiny_flm(name="mlm", spread=0.01)
    objective.lm_head.weight.zero_()
    objective.lm_head.bias.zero_()
    objective.lm_head.bias[[7, *SPECIAL]] = torch.tensor([5.0, 9.0, 9.0, 9.0, 9.0])
    assert mask_predict(objective, images(2), [3, 4]) == [[7, 7, 7]] * 2  # equal means: the first length


def test_what_cannot_be_decoded_is_refused() -> None:
    objective, pictures = tiny_flm(name="mlm"), images(1)
    assert len(mask_predict(objective, pictures, [36], 1)[0]) == 36  # 40 positions, 2 before `<s>`, `<s>` and `</s>`
    for lengths in ([], [3, 0], [37]):
        with pytest.raises(ValueError, match="expected at least one, each from 1 to 36"):
            mask_predict(objective, pictures, lengths)
    with pytest.raises(ValueError, match="iterations is 0"):
        mask_predict(objective, pictures, [3], 0)
    with pytest.raises(ValueError, match="needs an mlm model, found ar"):
        mask_predict(tiny_flm(name="ar"), pictures, [3])
