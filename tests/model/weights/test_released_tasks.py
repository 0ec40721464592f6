"""Fine-tuned released models: CLS features, logits and losses of their tasks against a plain computation and dumps."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Row
from model.build import build_classification, build_objective
from model.config import ModelConfig, TextConfig, VisionConfig, Vocabulary, objective_options
from model.weights.heads import head_rules
from model.weights.released import from_released, import_released, read_layout
from model.weights.start import start_from
from tests.model.weights.test_released import LENGTH, released_objective
from tests.oracle import load_oracle
from tests.released_fixture import made_weights, released_fixture
from tests.released_reference import classified, feature
from tests.rounding import RELEASED, rounding

HEADED = RELEASED + rounding(128, 128, 128, 128)  # and a head of 128 channels
VOCABULARY = Vocabulary(size=292, bos_id=0, pad_id=1, eos_id=2, mask_id=291)
HEAD_SHAPES = {  # keys and shapes beside the network's, as the release's models of the tiny sizes have them
    "vqa": {"vqa_classifier": (64, 11)},
    "nlvr2": {"nlvr2_classifier": (128, 2)},
}


@functools.cache
def flm_extract() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors and weights of the pretrained model."""
    return released_fixture("flm")[:2]


def fine_tuned_state(task: str) -> dict[str, Tensor]:
    """The state dict of a tiny released model fine-tuned on a task, weights by the rule that made the dumps."""
    state = dict(flm_extract()[1])
    if task in ("vqa", "nlvr2", "retrieval"):
        state = {name: value for name, value in state.items() if not name.startswith("lm_score")}
    if task in HEAD_SHAPES:
        ((head, (width, num_classes)),) = HEAD_SHAPES[task].items()
        shapes = [("0", (128, width)), ("1", (128,)), ("3", (num_classes, 128))]
        layout = [[f"{head}.{part}.weight", list(shape), f"{head}.{part}.weight"] for part, shape in shapes]
        layout += [[f"{head}.{part}.bias", [shape[0]], f"{head}.{part}.bias"] for part, shape in shapes]
        state |= made_weights(layout)
        state[f"{head}.1.weight"] += 1
    if task == "nlvr2":
        state |= made_weights([["token_type_embeddings.weight", [3, 64], "token_type_embeddings.weight"]])
    if task == "retrieval":
        shapes = {"itm_score.fc": 2, "itm_score_flm.fc": 2, "rank_output": 1}
        layout = [[f"{name}.weight", [rows, 64], f"{name}.weight"] for name, rows in shapes.items()]
        state |= made_weights(layout + [[f"{name}.bias", [rows], f"{name}.bias"] for name, rows in shapes.items()])
    if task == "captioning":
        state = {name: value for name, value in state.items() if not name.startswith(("lm_score_f", "lm_score_r"))}
        for name, value in state.items():
            if "word_embeddings" in name or name in ("lm_score.bias", "lm_score.decoder.weight"):
                first = "text_transformer.embeddings.word_embeddings.weight" if "word_embeddings" in name else name
                state[name] = made_weights([[name, [294, *value.shape[1:]], first]])[name]
    return state


def released_model() -> ModelConfig:
    return ModelConfig(
        behaviour="released",
        vision=VisionConfig(name=None, image_size=96, patch_size=32, width=128, layers=4),
        text=TextConfig(width=64, heads=4, ffn_width=256, bottom_layers=3, top_layers=3, max_positions=66),
    )


def task_objective(task: str, state: dict[str, Tensor]) -> nn.Module:
    """With all weights of a released state dict, its head's too."""
    num_classes, num_images, kind = {"vqa": (11, 1, "soft"), "nlvr2": (2, 2, "class")}[task]
    options = (released_model(), objective_options(), VOCABULARY, LENGTH)
    built = build_classification(*options, task, num_classes, num_images, kind).eval()
    weights, _ = from_released(state, read_layout(state, text_heads=4))
    start_from(built, weights, head_rules(weights))
    return built


def with_pixels(batch: Batch, pixels: Tensor) -> Batch:
    """Normalised pixels [B, I, 3, S, S] in the place of bytes."""
    batch.images = pixels
    return batch


def some_inputs() -> tuple[list[list[int]], Tensor]:
    """Four texts of other lengths, truncated and unpadded among them, and normalised pixels [4, 3, 96, 96]."""
    tensors = flm_extract()[0]
    texts = [ids[:n].tolist() for ids, n in zip(tensors["text_ids"], tensors["lengths"].tolist(), strict=True)]
    return texts, tensors["image"]


def test_vqa_logits_and_loss() -> None:
    state, (texts, pixels) = fine_tuned_state("vqa"), some_inputs()
    objective = task_objective("vqa", state)
    targets = [[(3, 1.0), (7, 0.3)], [(0, 0.6)], [], [(10, 0.9), (1, 0.3), (2, 0.3)]]
    rows = [Row(ids, n, n, "read", target=target) for n, (ids, target) in enumerate(zip(texts, targets, strict=True))]
    batch = with_pixels(objective.planner(torch.zeros(4, 1, 3, 96, 96, dtype=torch.uint8), rows), pixels[:, None])
    features = [feature(state, ids, image) for ids, image in zip(texts, pixels, strict=True)]
    expected = torch.stack([classified(state, "vqa_classifier", each) for each in features])
    torch.testing.assert_close(objective.logits(batch), expected, rtol=HEADED, atol=HEADED)
    dense = torch.zeros(4, 11)
    for row, target in enumerate(targets):
        for number, score in target:
            dense[row, number] = score
    loss = F.binary_cross_entropy_with_logits(expected, dense) * 11  # as the release: mean over all, times classes
    ours = objective(batch)["vqa"] / batch.counts["vqa"]
    assert ours.item() == pytest.approx(loss.item(), abs=11 * HEADED)
    assert objective.score(batch)["vqa"][1].item() == pytest.approx(dense[range(4), expected.argmax(1)].sum().item())


def test_nlvr2_logits_and_loss() -> None:
    state, (texts, pixels) = fine_tuned_state("nlvr2"), some_inputs()
    assert not torch.equal(*state["token_type_embeddings.weight"][1:])
    objective = task_objective("nlvr2", state)
    pairs, labels = torch.stack([pixels, pixels.roll(1, 0)], 1), torch.tensor([1, 0, 0, 1])
    rows = [Row(texts[n], 2 * n + i, n, "read", target=labels[n].item()) for n in range(4) for i in range(2)]
    batch = with_pixels(objective.planner(torch.zeros(4, 2, 3, 96, 96, dtype=torch.uint8), rows), pairs)
    both = [torch.cat([feature(state, texts[n], pairs[n, i], 1 + i) for i in range(2)]) for n in range(4)]
    expected = torch.stack([classified(state, "nlvr2_classifier", each) for each in both])
    torch.testing.assert_close(objective.logits(batch), expected, rtol=HEADED, atol=HEADED)
    ours = objective(batch)["nlvr2"] / batch.counts["nlvr2"]
    assert ours.item() == pytest.approx(F.cross_entropy(expected, labels).item(), abs=2 * HEADED)


def pooled_features(objective: nn.Module, texts: list[list[int]], pixels: Tensor) -> Tensor:
    rows = [Row(ids, number, number, "read") for number, ids in enumerate(texts)]
    batch = objective.planner(torch.zeros(len(texts), 1, 3, 96, 96, dtype=torch.uint8), rows)
    batch.images = pixels[:, None]
    term = batch.terms["read"]
    with torch.no_grad():
        states = getattr(objective.net(batch), term.source)[term.position]
        return objective.net.pooler(states)


def test_the_cls_query_equals_the_released_one() -> None:
    """The last reconstructor layer's state 0 of the extract, which the release computed among all other queries."""
    tensors, state = flm_extract()
    objective = released_objective()
    import_released(objective, state)
    texts, pixels = some_inputs()
    found = pooled_features(objective, texts, pixels)
    pooler = "cross_modal_text_pooler_f.dense"
    released = torch.tanh(
        F.linear(tensors["layers.recon_top2"][:, 0], state[f"{pooler}.weight"], state[f"{pooler}.bias"])
    )
    torch.testing.assert_close(found, released, rtol=0, atol=HEADED)


@pytest.mark.parametrize("name", ["mlm", "ar"])
def test_the_cls_state_of_one_stream_equals_the_released_one(name: str) -> None:
    tensors, state, _ = released_fixture(name)
    objective = build_objective(released_model(), objective_options(name), VOCABULARY, LENGTH).eval()
    import_released(objective, state)
    texts, pixels = some_inputs()
    if name == "mlm":  # the dump's texts are masked
        texts = [ids[: len(text)].tolist() for ids, text in zip(tensors["ids"], texts, strict=True)]
    found = pooled_features(objective, texts, pixels)
    starts = torch.tensor([0, *[len(text) for text in texts]]).cumsum(0)[:-1]
    pooler = "cross_modal_text_pooler.dense"
    states = tensors["layers.top2"][starts]
    released = torch.tanh(F.linear(states, state[f"{pooler}.weight"], state[f"{pooler}.bias"]))
    torch.testing.assert_close(found, released, rtol=0, atol=HEADED)
    plain = [feature(state, ids, image, kind=name) for ids, image in zip(texts, pixels, strict=True)]
    torch.testing.assert_close(torch.stack(plain), released, rtol=0, atol=HEADED)


@pytest.mark.parametrize("name", ["a_flm_pretrain", "b_mlm", "b_ar"])
def test_features_of_the_dumps(name: str) -> None:
    """The pooled feature itself; MLM's and AR's stands in their dumps twice, side by side (specification section 4)."""
    dump, kind = load_oracle(f"{name}.pt"), name.split("_")[1]
    inputs = load_oracle("a_flm_pretrain.pt")["inputs"]
    objective = build_objective(released_model(), objective_options(kind), VOCABULARY, LENGTH).eval()
    import_released(objective, dump["state_dict"])
    ids = dump["objective_out"]["mlm_ids"] if kind == "mlm" else inputs["text_ids"]
    texts = [row[:n].tolist() for row, n in zip(ids, inputs["text_masks"].sum(1), strict=True)]
    released = dump["outputs"]["cls_feats"]
    if kind != "flm":
        assert torch.equal(*released.chunk(2, 1))
        released = released[:, :64]
    torch.testing.assert_close(pooled_features(objective, texts, inputs["image"]), released, rtol=0, atol=HEADED)
    plain = [feature(dump["state_dict"], text, image, kind=kind) for text, image in zip(texts, inputs["image"])]
    torch.testing.assert_close(torch.stack(plain), released, rtol=0, atol=HEADED)
