"""Checkpoints of the FLM release, pretrained or fine-tuned: their key names, sizes and way back, all strict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import (
    ModelConfig,
    ReconstructorConfig,
    TextConfig,
    VisionConfig,
    Vocabulary,
    objective_options,
)
from model.objectives.pretraining import Pretraining
from model.objectives.table import OBJECTIVES
from model.weights.start import RESIZES, Rules, foreign_names, joined, resize, start_from
from model.weights.towers import CLIP_RULES, ROBERTA_RULES, bert_layer

RELEASED_RULES: Rules = (
    *((rf"net\.vision\.{ours}", tuple(f"vit_model.visual.{name}" for name in foreign)) for ours, foreign in CLIP_RULES),
    *((rf"net\.{ours}", tuple(f"text_transformer.{name}" for name in foreign)) for ours, foreign in ROBERTA_RULES),
    (r"net\.text_projection\.(weight|bias)", (r"cross_modal_text_transform.\1",)),
    (r"net\.image_projection\.(weight|bias)", (r"cross_modal_image_transform.\1",)),
    (r"net\.type_embedding\.weight", ("token_type_embeddings.weight",)),
    (r"net\.stream_embedding\.weight", ("token_type_embeddings_flm.weight",)),
    *bert_layer(r"net\.top\.(\d+)", r"cross_modal_text_layers.\1"),
    *bert_layer(r"net\.reconstructor_bottom\.(\d+)", r"fusion_layers_bottom.\1"),
    *bert_layer(r"net\.reconstructor_top\.(\d+)", r"fusion_layers_top.\1"),
    (r"net\.pooler\.dense\.(weight|bias)", (r"cross_modal_text_pooler_f.dense.\1",)),
    (r"lm_head\.transform\.(weight|bias)", (r"lm_score.transform.dense.\1",)),
    (r"lm_head\.norm\.(weight|bias)", (r"lm_score.transform.LayerNorm.\1",)),
    (r"lm_head\.weight", ("lm_score.decoder.weight",)),
    (r"lm_head\.bias", ("lm_score.bias",)),
)


def one_stream_rules(head: str) -> Rules:
    """Released MLM ("mlm_score") and AR ("lm_score") checkpoints: no second stream, no reconstructor."""
    absent = ("stream_embedding", "reconstructor", "pooler", "lm_head")
    return (
        *(rule for rule in RELEASED_RULES if not any(part in rule[0] for part in absent)),
        (r"net\.pooler\.dense\.(weight|bias)", (r"cross_modal_text_pooler.dense.\1",)),
        (r"lm_head\.transform\.(weight|bias)", (rf"{head}.transform.dense.\1",)),
        (r"lm_head\.norm\.(weight|bias)", (rf"{head}.transform.LayerNorm.\1",)),
        (r"lm_head\.weight", (f"{head}.decoder.weight",)),
        (r"lm_head\.bias", (f"{head}.bias",)),
    )


RULES_OF = {"flm": RELEASED_RULES, "mlm": one_stream_rules("mlm_score"), "ar": one_stream_rules("lm_score")}

# Second names of the same tensor in released checkpoints -> first name.
RELEASED_ALIASES = (
    (r"text_transformer2\.", "text_transformer."),
    (r"fusion_token_embedding\.", "text_transformer.embeddings."),
    (r"cross_modal(?:_text)?_layers(?:_r)?\.", "cross_modal_text_layers."),
    (r"cross_modal_text_transform_[rf]\.", "cross_modal_text_transform."),
    (r"lm_score_[rf]\.", "lm_score."),
    (r"(m?lm_score)\.decoder\.bias", r"\1.bias"),
)

# Stored in released checkpoints, read by nothing (oracle notes of the specification, "Dead tensors to ignore").
RELEASED_DEAD = (
    r"vit_model\.positional_embedding",
    r"vit_model\.ln_final\.(weight|bias)",
    r"text_transformer2?\.pooler\..*",
    r"cross_modal_image_pooler\..*",
    r"cross_modal_text_pooler\..*",
    r"lm_type_embeddings\..*",
    r"token_type_embeddings_flm\..*",  # read by FLM only
    r"itm_score_flm\..*",
    r".*\.position_ids",
)


@dataclass(frozen=True)
class ImportReport:
    """What became of every foreign key: ``used`` ours -> foreign names, ``aliased`` second -> first name, ``dead``."""

    used: dict[str, tuple[str, ...]]
    aliased: dict[str, str]
    dead: list[str]


@dataclass(frozen=True)
class Layout:
    """What a released state dict holds: the objective and sizes of its network, the head of a task if there is one."""

    objective: str  # flm, mlm or ar
    task: str | None  # vqa, nlvr2, retrieval or captioning; None for pretraining
    has_lm_head: bool
    model: ModelConfig
    vocabulary_size: int


# First part of the key of a head that no language loss has, and the task it shows (image-text matching is pretrained
# too). Such tensors keep their names, below "task."; which head of ours they are: model/weights/heads.py.
TASK_HEADS = {
    "vqa_classifier": "vqa",
    "nlvr2_classifier": "nlvr2",
    "rank_output": "retrieval",
    "itm_score": None,
    "itm_score_flm": None,
}


def read_layout(state: Mapping[str, Tensor], text_heads: int | None = None) -> Layout:
    """The layout of a released state dict, read from its names and shapes.

    ``text_heads`` is the one size that no shape tells; None means 64 channels a head.

    Raises:
        ValueError: a name that every released checkpoint has is missing, or its tensor has no size that fits.
    """

    def shape(name: str, num_dimensions: int = 2) -> torch.Size:
        if name not in state:
            raise ValueError(
                f"no tensor {name}; expected the state dict of a released FLM, MLM or AR checkpoint, found "
                f"{', '.join(sorted(state)[:3])} .."
            )
        found = state[name].shape
        if len(found) != num_dimensions or min(found) < 1:
            raise ValueError(f"{name} has shape {tuple(found)}, expected {num_dimensions} sizes from 1")
        return found

    def count(pattern: str) -> int:
        """Layers, numbered from 0, each of which has keys: a number in a name must not make a network of that depth."""
        numbers = {found[1] for key in state if (found := re.match(pattern, key))}
        if numbers != {str(number) for number in range(len(numbers))}:
            raise ValueError(f"layers {', '.join(sorted(numbers)[:5])} .. of {pattern}, expected all from 0")
        return len(numbers)

    vocabulary_size, width = shape("text_transformer.embeddings.word_embeddings.weight")
    vision_width, _, patch, _ = shape("vit_model.visual.conv1.weight", 4)
    grid = max(round((shape("vit_model.visual.positional_embedding")[0] - 1) ** 0.5), 1)
    firsts = {key.split(".")[0] for key in state}
    if any(first.startswith("fusion_layers") for first in firsts):
        objective = "flm"
    else:
        objective = "mlm" if "mlm_score" in firsts else "ar"
    model = ModelConfig(
        behaviour="released",
        vision=VisionConfig(
            name=None,
            image_size=grid * patch,
            patch_size=patch,
            width=vision_width,
            layers=1 + count(r"vit_model\.visual\.transformer\.resblocks\.(\d+)\."),  # the dropped one
            mlp_ratio=shape("vit_model.visual.transformer.resblocks.0.mlp.c_fc.weight")[0] / vision_width,
        ),
        text=TextConfig(
            width=width,
            heads=text_heads or max(width // 64, 1),
            ffn_width=shape("text_transformer.encoder.layer.0.intermediate.dense.weight")[0],
            bottom_layers=count(r"text_transformer\.encoder\.layer\.(\d+)\."),
            top_layers=count(r"cross_modal_text_layers\.(\d+)\."),
            max_positions=shape("text_transformer.embeddings.position_embeddings.weight")[0],
        ),
        reconstructor=ReconstructorConfig(count(r"fusion_layers_bottom\.(\d+)\."), count(r"fusion_layers_top\.(\d+)\."))
        if objective == "flm"
        else ReconstructorConfig(),
    )
    task = next((task for first in sorted(firsts) if (task := TASK_HEADS.get(first))), None)
    if objective == "flm" and "lm_score" in firsts and "lm_score_r" not in firsts:
        task = "captioning"  # which has one of pretraining's three language heads
    return Layout(objective, task, bool(firsts & {"lm_score", "mlm_score"}), model, vocabulary_size)


def from_released(state: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], ImportReport]:
    """Our weights by name from a released state dict, and what became of each of its keys.

    Raises:
        ValueError: a key missing, unknown, of another shape, or an alias that differs from its first name.
    """
    weights, used = _renamed(state, _shapes(layout), RULES_OF[layout.objective])
    for key in state:
        if key.split(".")[0] in TASK_HEADS:
            weights[f"task.{key}"], used[f"task.{key}"] = state[key], (key,)
    return weights, account(state, used)


def to_released(weights: Mapping[str, Tensor], report: ImportReport) -> dict[str, Tensor]:
    """The released state dict that ``from_released`` read, aliases included; what nothing reads is not in it."""
    state: dict[str, Tensor] = {}
    for name, foreign in report.used.items():
        value = weights[name][None] if name.endswith("token_type") else weights[name]
        state |= dict(zip(foreign, value.chunk(len(foreign)), strict=True))
    return state | {alias: state[first] for alias, first in report.aliased.items() if first in state}


def _shapes(layout: Layout) -> dict[str, torch.Size]:
    """Names and shapes of the parameters of our network of that layout."""
    vocabulary = Vocabulary(layout.vocabulary_size, bos_id=0, pad_id=1, eos_id=2, mask_id=layout.vocabulary_size - 1)
    objective = objective_options(layout.objective)
    with torch.device("meta"):
        parts = OBJECTIVES[layout.objective](layout.model, objective, vocabulary, 50, 0.0)
        built = Pretraining(layout.model, objective, *parts)
    named = built.named_parameters()
    return {name: value.shape for name, value in named if layout.has_lm_head or not name.startswith("lm_head")}


def import_released(objective: nn.Module, state: Mapping[str, Tensor]) -> ImportReport:
    """Loads a released pretraining state dict (FLM, MLM or AR) into a ``released`` objective of that name, accounting
    for every key.

    Raises:
        ValueError: a key missing, unknown, of another shape, or an alias that differs from its first name.
    """
    shapes = {name: value.shape for name, value in objective.named_parameters()}
    weights, used = _renamed(state, shapes, RULES_OF[objective.name])
    report = account(state, used)
    start_from(objective, weights)
    return report


def _renamed(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], rules: Rules
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """The tensors of a released state dict that make up what we name in ``shapes``, and what each was made of."""
    weights: dict[str, Tensor] = {}
    used = {name: foreign_names(name, rules) for name in shapes}
    for name, foreign in used.items():
        if not foreign:
            raise ValueError(f"the model has {name}, which the release does not know; use model.behaviour released")
        value = weights[name] = joined(name, foreign, state)
        if resize(name, value, shapes[name], RESIZES).shape != shapes[name]:
            raise ValueError(
                f"{foreign[0]} has shape {tuple(value.shape)}, {name} {tuple(shapes[name])}; wrong layout?"
            )
    return weights, used


def account(state: Mapping[str, Tensor], used: dict[str, tuple[str, ...]]) -> ImportReport:
    """Accounts for every key of a released state dict of which ``used`` was read; raises as ``import_released``."""
    consumed = {name for names in used.values() for name in names}
    aliased, dead, unknown = {}, [], []
    for key in state:
        first = _first_name(key)
        if key in consumed:
            continue
        if any(re.fullmatch(pattern, key) for pattern in RELEASED_DEAD):
            dead.append(key)
        elif first != key and first in consumed:
            if not torch.equal(state[key], state[first]):
                raise ValueError(
                    f"checkpoint key {key} differs from {first}, which released models share; wrong layout?"
                )
            aliased[key] = first
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"checkpoint has {len(unknown)} keys this model does not, first: {', '.join(unknown[:3])}")
    return ImportReport(used, aliased, dead)


def _first_name(key: str) -> str:
    for pattern, first in RELEASED_ALIASES:
        match = re.match(pattern, key)
        if match:
            return match.expand(first) + key[match.end() :]
    return key
