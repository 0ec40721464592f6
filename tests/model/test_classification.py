"""Fine-tuning by classification against the network run naively, text by text, with heads and losses by definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.batch import Batch, Row
from model.build import build_classification
from model.config import VisionConfig, objective_options
from model.heads import RankHead
from tests.model.test_features import OBJECTIVES, plain_features
from tests.model.test_flops import plain_attention
from tests.rounding import TINY, rounding
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, pair_rows, tiny_config

TASKS = {  # head, classes, images, kind
    "vqa": ("answer_head", 7, 1, "soft"),
    "nlvr2": ("pair_head", 2, 2, "class"),
    "snli_ve": ("entailment_head", 3, 1, "class"),
}
# The network, then a head of 2 x 32 or 32 inputs, 64 hidden channels and their LayerNorm, and a sum over 7 classes.
HEADED = TINY + rounding(64, 64, 64, 64, 7)


def tiny_classifier(
    term: str, num_images: int | None = None, behaviour: str = "default", dropout: float = 0.0, **options
) -> nn.Module:
    """In evaluation mode, with weights that make outputs depend visibly on inputs."""
    _, num_classes, usual, kind = TASKS[term]
    torch.manual_seed(0)
    built = build_classification(
        tiny_config(behaviour, dropout),
        objective_options(**options),
        VOCABULARY,
        MAX_TEXT_LENGTH,
        term,
        num_classes,
        num_images or usual,
        kind,
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(1.6)
            if "head." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return built.eval()


def pictures(num_samples: int, num_images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_samples, num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)


def texts(term: str, num_images: int) -> list[tuple[list[int], object]]:
    """Token ids and target of four texts; the third has no target."""
    targets = [[(2, 1.0), (5, 0.3)], [], None, [(0, 0.6)]] if term == "vqa" else [1, 0, None, 1]
    return list(zip([caption(4, 1), caption(11, 2), caption(1, 3), caption(6, 4)], targets, strict=True))


def batch_of(objective: nn.Module, term: str, samples: list[int], seed: int = 0) -> Batch:
    """Sample number i is about its own images; sample 4 is a placeholder."""
    count, rows = objective.num_images, []
    for place, number in enumerate(samples):
        if number == 4:
            rows.append(Row([0, 2], place * count, 0, "placeholder"))
            continue
        ids, target = texts(term, count)[number]
        rows += [Row(ids, place * count + image, number, "read", target=target) for image in range(count)]
    return objective.planner(pictures(5, count, seed)[samples], rows)


def plain_logits(objective: nn.Module, head: str, ids: list[int], images: Tensor) -> Tensor:
    """[C] of one text about its images uint8 [I, 3, S, S], by the definitions of sections 2.7, 7.1 and 7.2."""
    width, features = 32, []
    for number, image in enumerate(images):
        state = plain_features(objective, ids, image[None], image_type=1 + number)[:width]
        pooler = objective.net.pooler.dense
        features.append(torch.tanh(pooler.weight @ state + pooler.bias))
    weights = dict(objective.get_submodule(head).named_parameters())
    hidden = weights["0.weight"] @ torch.cat(features) + weights["0.bias"]
    centred = hidden - hidden.mean()
    hidden = centred / (centred.square().mean() + 1e-5).sqrt() * weights["1.weight"] + weights["1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return weights["3.weight"] @ hidden + weights["3.bias"]


def plain_loss(term: str, logits: Tensor, target: object) -> tuple[Tensor, float]:
    """Loss and how right the largest logit is, of one text."""
    if term != "vqa":
        return logits.logsumexp(0) - logits[target], float(logits.argmax() == target)
    dense = torch.zeros(len(logits))
    for number, score in target:
        dense[number] = score
    mean = -(dense * logits.sigmoid().log() + (1 - dense) * (1 - logits.sigmoid()).log()).mean()
    return mean * len(logits), dense[logits.argmax()].item()


@pytest.mark.parametrize("term", TASKS)
@pytest.mark.parametrize("options", OBJECTIVES)
@torch.no_grad()
def test_logits_losses_and_correctness_equal_the_definitions(options: dict, term: str) -> None:
    """Every objective and behaviour, several images, a text without target, a placeholder; neighbours and padding
    change nothing (invariant 5).
    """
    objective, (head, *_) = tiny_classifier(term, **options), TASKS[term]
    count = objective.num_images
    samples, images = [1, 4, 0, 2, 3], pictures(5, count)
    batch = batch_of(objective, term, samples)
    known = texts(term, count)
    expected = [plain_logits(objective, head, known[each][0], images[each]) for each in (1, 0, 2, 3)]
    found = objective.logits(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected), rtol=HEADED, atol=HEADED)
    assert objective.samples(batch).tolist() == [0, 2, 3, 4]
    outcomes = [plain_loss(term, expected[at], known[each][1]) for at, each in ((0, 1), (1, 0), (3, 3))]
    assert batch.counts == {term: 3} and objective.term_weights == {term: 1.0}
    total = torch.stack([loss for loss, _ in outcomes]).sum()
    loss, correct = objective.score(batch)[term]
    torch.testing.assert_close(loss, total, rtol=3 * HEADED, atol=3 * HEADED)
    torch.testing.assert_close(objective(batch)[term], loss, rtol=TINY, atol=TINY)
    assert correct.item() == pytest.approx(sum(right for _, right in outcomes))
    for place, each in enumerate((1, 0, 2, 3)):
        alone = objective.logits(batch_of(objective, term, [each]))
        torch.testing.assert_close(alone[0], found[place], rtol=HEADED, atol=HEADED)


@torch.no_grad()
def test_any_number_of_images_in_their_order() -> None:
    objective = tiny_classifier("nlvr2", num_images=3)
    images = pictures(2, 3)
    ids = caption(5, 1)

    def logits(pixels: Tensor) -> Tensor:
        rows = [Row(ids, number, 0, "read") for number in range(6)]
        return objective.logits(objective.planner(pixels, rows))

    found = logits(images)
    expected = torch.stack([plain_logits(objective, "pair_head", ids, sample) for sample in images])
    torch.testing.assert_close(found, expected, rtol=HEADED, atol=HEADED)
    assert (logits(images.flip(1)) - found).abs().min() > 1e-4
    assert objective.net.type_embedding.num_embeddings == 4


@pytest.mark.parametrize("term", ["vqa", "nlvr2"])
@pytest.mark.parametrize("options", OBJECTIVES)
def test_every_parameter_learns(options: dict, term: str) -> None:
    objective = tiny_classifier(term, **options).train()
    objective(batch_of(objective, term, [0, 1, 3]))[term].backward()
    idle = [name for name, value in objective.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []


@pytest.mark.parametrize("options", OBJECTIVES)
def test_a_batch_without_targets_has_a_loss_of_zero(options: dict) -> None:
    """Placeholders only, as a rank may meet; backward runs and gives zeros."""
    objective = tiny_classifier("nlvr2", **options)
    batch = batch_of(objective, "nlvr2", [4, 4])
    loss = objective(batch)["nlvr2"]
    loss.backward()
    assert loss.item() == 0 and batch.counts == {"nlvr2": 0} and objective.logits(batch).shape == (0, 2)
    assert all(value.grad is None or not value.grad.any() for value in objective.parameters())


@pytest.mark.parametrize("name", ["flm", "ar"])
@pytest.mark.parametrize("external", [False, True])
def test_a_frozen_tower_learns_nothing_and_all_else_does(name: str, external: bool) -> None:
    """Ours and one of another library; two images a sample."""
    config = tiny_config()
    config.vision = VisionConfig(name="timm/test_efficientnet", image_size=32) if external else config.vision
    config.vision.pretrained, config.vision.frozen = "weights", True
    tail = (objective_options(name), VOCABULARY, MAX_TEXT_LENGTH, "nlvr2", 2, 2)
    objective = build_classification(config, *tail).train()
    before = {key: value.clone() for key, value in objective.net.vision.state_dict().items()}
    objective(batch_of(objective, "nlvr2", [0, 1, 3]))["nlvr2"].backward()
    idle = {key for key, value in objective.named_parameters() if value.grad is None or not value.grad.any()}
    assert idle == {f"net.vision.{key}" for key, _ in objective.net.vision.named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in objective.net.vision.state_dict().items())


def test_groups_of_heads_and_decay_of_matrices() -> None:
    objective = tiny_classifier("vqa")
    objective.rank_head = RankHead(32)
    groups = {name: objective.parameter_group(name) for name, _ in objective.named_parameters()}
    assert {group for name, group in groups.items() if name.startswith("answer_head")} == {"head"}
    assert {group for name, group in groups.items() if name.startswith("rank_head")} == {"rest"}
    decayed = [name for name, value in objective.answer_head.named_parameters() if objective.decays(name, value)]
    assert decayed == ["0.weight", "3.weight"]


@pytest.mark.parametrize("term", ["vqa", "nlvr2"])
def test_cost_agrees_with_pytorchs_counter(monkeypatch, term: str) -> None:
    """Within 1 %."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    objective = tiny_classifier(term)
    batch = batch_of(objective, term, [0, 1, 3])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective(batch)
    assert abs(objective.flops(batch) / (3 * counter.get_total_flops()) - 1) < 0.01


def test_negatives_of_pretraining_play_no_part() -> None:
    options = dict(negatives="in_batch_hard", itm_weight=0.0)
    assert tiny_classifier("vqa", **options).planner.planner.negative_share == 0


@pytest.mark.parametrize(
    ("term", "target", "images", "message"),
    [
        ("nlvr2", 2, [0, 1], "a target of nlvr2 is class 2 with score 1.0, expected classes 0 to 1"),
        ("nlvr2", -1, [0, 1], "class -1"),
        (
            "vqa",
            [(7, 1.0)],
            [0],
            "a target of vqa is class 7 with score 1.0, expected classes 0 to 6 and scores",
        ),
        ("vqa", [(1, 1.5)], [0], "class 1 with score 1.5"),
        ("vqa", [(1, float("nan"))], [0], "class 1 with score nan"),
        ("nlvr2", 1, [1, 0], r"read images \[1, 0\], expected the 2 of one sample in order"),
        ("nlvr2", 1, [1, 2], r"read images \[1, 2\]"),
        ("nlvr2", 1, [0], r"read images \[0\]"),
    ],
)
def test_what_does_not_fit_is_refused(term: str, target: object, images: list[int], message: str) -> None:
    objective = tiny_classifier(term)
    rows = [Row(caption(3), image, 0, "read", target=target) for image in images]
    with pytest.raises(ValueError, match=message):
        objective.planner(pictures(2, objective.num_images), rows)


def test_more_images_than_the_network_knows_are_refused() -> None:
    objective = tiny_classifier("vqa")
    batch = objective.planner.planner(pictures(2, 2), [Row(caption(3), 0, 0, "read")])
    with pytest.raises(ValueError, match="samples have 2 images, the network knows 1"):
        objective.net(batch)
    with pytest.raises(ValueError, match="vqa has 1 classes, expected at least 2"):
        build_classification(tiny_config(), objective_options(), VOCABULARY, MAX_TEXT_LENGTH, "vqa", 1)


def test_pairs_in_a_batch_are_no_targets() -> None:
    """Rows of other roles are planned as their objective plans them; what they predict is left out."""
    objective = tiny_classifier("vqa")
    read = dataclasses.replace(Row(caption(4), 1, 0, "read"), target=[(1, 1.0)])
    batch = objective.planner(pictures(2, 1), [*pair_rows([caption(3)]), read])
    assert batch.counts == {"vqa": 1} and set(batch.terms) == {"vqa", "read"}
