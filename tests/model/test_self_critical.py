"""Self-critical training: its gradient is REINFORCE by hand, and on a tiny task the reward rises."""

from __future__ import annotations

import math

import pytest
import torch

from model.batch import Row
from model.build import build_captioning
from model.config import objective_options
from model.decode.search import greedy, nucleus
from model.decode.stream import decoder_of
from model.objectives.self_critical import Critic, SelfCriticalPlanner
from model.plans.builder import row_generator
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, images, tiny_config

EOS, LONGEST = VOCABULARY.eos_id, 4


def trained_by(reward, prompt: tuple[int, ...] = (), dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny_config(dropout=dropout)
    built = build_captioning(config, objective_options("ar"), VOCABULARY, MAX_TEXT_LENGTH, self_critical=True)
    built.critic = Critic(reward, prompt, LONGEST)
    with torch.no_grad():
        built.lm_head.bias[EOS] = 3.0
    return built


def rows(count: int, seed: int = 0) -> list[Row]:
    """References: one word a caption, another for every image; each has two."""
    return [Row([0, EOS], number, 100 * seed + number, target=references(number)) for number in range(count)]


def references(number: int) -> list[list[int]]:
    return [[10 + number, EOS], [10 + number, 30, EOS]]


def test_the_plan_holds_uniforms_of_the_row_and_references() -> None:
    """Invariant 5: what a row draws depends on its own seed only; a placeholder has no caption."""
    planner = SelfCriticalPlanner(LONGEST)
    batch = planner(images(3), [*rows(2), Row([0, EOS], 2, 0, "placeholder")])
    term, words = batch.terms["self_critical"], batch.terms["references"]
    assert batch.counts == {"self_critical": 2} and term.position.tolist() == [0, 1]
    for number in range(2):
        assert torch.equal(term.target[number], torch.from_numpy(row_generator(number, 1).random(LONGEST)))
        own = words.target[words.position == number].tolist()
        assert own == [10 + number, EOS, 10 + number, 30, EOS]
    alone = planner(images(1), [Row([0, EOS], 0, 1, target=references(1))])
    assert torch.equal(alone.terms["self_critical"].target, term.target[1:])


@pytest.mark.parametrize("prompt", [(), (7,)])
def test_the_gradient_is_reinforce_by_hand(prompt: tuple[int, ...]) -> None:
    """-(r(sample) - r(greedy)) d log p(sample), log p word by word from whole passes over the caption; the reward sees
    captions and references with `</s>` as their last word where they ended."""
    seen = []

    def reward(captions, of_captions):
        seen.append((captions, of_captions))
        return [math.fsum(word * 0.01 + 0.1 for word in words) + len(of) for words, of in zip(captions, of_captions)]

    objective = trained_by(reward, prompt).eval()
    pictures = images(6, seed=1)
    batch = SelfCriticalPlanner(LONGEST)(pictures, rows(6))
    loss = objective(batch)["self_critical"]
    ours = torch.autograd.grad(loss, parameters(objective), allow_unused=True)

    with torch.no_grad():
        uniforms = batch.terms["self_critical"].target
        sampled = nucleus(decoder_of(objective, pictures, prompt), LONGEST, uniforms, 1.0)
        baseline = greedy(decoder_of(objective, pictures, prompt), LONGEST)
    [(captions, of_captions)] = seen
    for number, words in enumerate([*sampled, *baseline]):
        assert captions[number] == [*words[len(prompt) :], *[EOS] * (len(words) < LONGEST)]
        assert of_captions[number] == references(number % 6)
    assert len({len(words) for words in sampled}) > 1 and sampled != baseline  # else nothing would be tested
    worth = [math.fsum(word * 0.01 + 0.1 for word in words) for words in captions]
    expected = torch.zeros(())
    for number, words in enumerate(sampled):
        ids = [VOCABULARY.bos_id, *words, EOS]
        whole = objective.planner()(pictures[number : number + 1], [Row(ids, 0, 0)])
        logs = objective.lm_head.logits(objective.net(whole).l2r).log_softmax(-1)
        predicted = range(len(prompt), len(words) + (len(words) < LONGEST))
        log_p = sum(logs[place, ids[place + 1]] for place in predicted)
        expected = expected - (worth[number] - worth[6 + number]) * log_p
    theirs = torch.autograd.grad(expected, parameters(objective), allow_unused=True)
    torch.testing.assert_close(loss, expected, rtol=10 * TINY, atol=10 * TINY)
    compared = 0
    for own, other in zip(ours, theirs, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
            compared += bool(own.abs().max() > 0)
    assert compared > 20


def parameters(objective: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(objective.parameters())


def test_equal_captions_teach_nothing_and_a_batch_without_pairs_neither() -> None:
    objective = trained_by(lambda captions, of: [1.0] * len(captions))
    batch = SelfCriticalPlanner(LONGEST)(images(2), rows(2))
    objective(batch)["self_critical"].backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())
    empty = SelfCriticalPlanner(LONGEST)(images(1), [Row([0, EOS], 0, 0, "placeholder")])
    assert objective(empty)["self_critical"] == 0


def test_sampling_is_in_evaluation_mode_and_training_mode_comes_back() -> None:
    """With dropout the same uniforms give the same captions."""
    seen = []
    objective = trained_by(lambda captions, of: seen.append(captions) or [0.0] * len(captions), dropout=0.5).train()
    batch = SelfCriticalPlanner(LONGEST)(images(4), rows(4))
    objective(batch)
    objective(batch)
    assert objective.training and objective.net.top[0].training and seen[0] == seen[1]


@pytest.mark.slow
def test_the_reward_rises_on_a_tiny_task() -> None:
    """Worth 1 is the image's own word alone, .3 a caption that has it: from nothing to own words, images told apart."""

    def reward(captions, of_captions):
        return [float(words == of[0]) + 0.3 * (of[0][0] in words) for words, of in zip(captions, of_captions)]

    objective, pictures = trained_by(reward).train(), images(4, seed=1)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)

    def mean_reward() -> float:
        found = greedy(decoder_of(objective.eval(), pictures), LONGEST)
        objective.train()
        ended = [[*words, *[EOS] * (len(words) < LONGEST)] for words in found]
        return sum(reward(ended, [references(number) for number in range(4)])) / 4

    before = mean_reward()
    for step in range(60):
        batch = SelfCriticalPlanner(LONGEST)(pictures.repeat(16, 1, 1, 1, 1), many(step))
        optimizer.zero_grad()
        (objective(batch)["self_critical"] / 64).backward()
        optimizer.step()
    assert before == 0 and mean_reward() >= 0.3


def many(step: int) -> list[Row]:
    """16 draws for each of 4 images."""
    return [Row([0, EOS], number, 1000 * step + number, target=references(number % 4)) for number in range(64)]
