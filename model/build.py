"""Builds an objective from its options, checking what can be checked before a device is touched."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from model.config import AUTO, ModelConfig, ObjectiveOptions, QFormerStage1Options, Vocabulary
from model.evlgen import EVLGen
from model.frozen import follow_mode, freeze
from model.language.causal_lm import LanguageModel, language_settings
from model.language.lora import add_adapters, check_lora, train_adapters
from model.language.text_form import text_form
from model.objectives.captioning import Captioning
from model.objectives.classification import Classification
from model.objectives.evlgen import ImageToText
from model.objectives.parts import Parts
from model.objectives.pretraining import Pretraining
from model.objectives.qformer_stage1 import QFormerStage1
from model.objectives.ranking import Ranking
from model.objectives.table import OBJECTIVES
from model.plans.contrast import ContrastPlanner
from model.plans.hard_negatives import HardNegatives
from model.plans.tasks import ClassKind
from model.qformer import QFormerPairs


def build_objective(
    model: ModelConfig,
    objective: ObjectiveOptions,
    vocabulary: Vocabulary,
    max_text_length: int = 50,
) -> Pretraining | ImageToText | QFormerStage1:
    """The objective with random weights; those that the options name come later (pipeline/weights/starting.py).

    Raises:
        ValueError: an option out of range, or options that do not fit each other.
    """
    if objective.name == "evlgen":
        return build_evlgen(model, vocabulary, max_text_length)
    if objective.name == "qformer_stage1":
        return build_qformer(model, objective, vocabulary, max_text_length)
    matching = objective.itm_weight and model.behaviour == "default"  # the release has none
    share = objective.negative_share if matching else 0.0
    in_batch = objective.negatives == "in_batch_hard"
    if in_batch:
        _check_hard_negatives(model, objective)
    parts = build_parts(model, objective, vocabulary, max_text_length, 0.0 if in_batch else share)
    if in_batch:
        parts = parts._replace(planner=HardNegatives(parts.planner, share))
    if objective.itc_weight:
        parts = parts._replace(planner=ContrastPlanner(parts.planner))
    return Pretraining(model, objective, *parts)


def build_evlgen(model: ModelConfig, vocabulary: Vocabulary, max_text_length: int) -> ImageToText:
    """EVLGen with random weights, its language model and, where the options say so, its vision tower out of training.

    ``vocabulary`` is that of the language model's own tokenizer. Weights come later, as of :func:`build_objective`.

    Raises:
        ValueError: an option out of range, or options that do not fit each other.
    """
    name = model.language.name
    _refuse_idle(model, "evlgen", "text", "reconstructor")
    _check_tower_of_connector(model)
    check_lora(model.language)
    settings = language_settings(name)
    if model.language.own_dropout:
        _check_own_dropout(model, settings)
    language = LanguageModel(settings)
    if model.language.lora_rank:
        language.adapted = add_adapters(language.llm.base_model, model.language)
    if vocabulary.size > language.num_tokens:
        raise ValueError(
            f"the tokenizer has {vocabulary.size} tokens, model.language.name {name} {language.num_tokens}; use its own"
            " one: data.tokenizer null"
        )
    form = text_form(vocabulary, settings.model_type, model.behaviour == "released")
    net = EVLGen(model, language, vocabulary, form)
    longest = len(form.before) + net.connector.num_tokens + max_text_length
    if language.max_length is not None and longest > language.max_length:
        raise ValueError(
            f"data.max_text_length {max_text_length} behind the {longest - max_text_length} tokens of an image is more"
            f" than the {language.max_length} positions of model.language.name {name}; lower it"
        )
    freeze(net.language, source=name)
    if model.language.own_dropout:
        follow_mode(net.language)
    train_adapters(net.language)
    if model.vision.frozen:
        freeze(net.vision, source=model.weights or model.vision.pretrained)
        for block in net.vision.blocks if net.has_temporal else ():
            block.temporal.requires_grad_(True)  # the frames' part is new, whatever the tower
    return ImageToText(net)


def build_qformer(
    model: ModelConfig, objective: QFormerStage1Options, vocabulary: Vocabulary, max_text_length: int
) -> QFormerStage1:
    """The first stage of a Q-Former with random weights; raises as :func:`build_objective`."""
    objective.check()
    _refuse_idle(model, objective.name, "text", "reconstructor", "language")
    _check_tower_of_connector(model)
    _check_tokens(vocabulary, max_text_length)
    refusals = [
        ("model.connector.name", model.connector.name, "qformer"),
        ("model.behaviour", model.behaviour, "default"),
        ("model.vision.temporal", model.vision.temporal, None),
    ]
    for option, found, expected in refusals:
        if found != expected:
            raise ValueError(
                f"objective.name qformer_stage1 wants {option} {expected or 'null'}, found {found}; use that, or train"
                " another objective"
            )
    if max_text_length + 2 > model.connector.max_positions:
        raise ValueError(
            f"data.max_text_length {max_text_length} needs {max_text_length + 2} positions,"
            f" model.connector.max_positions is {model.connector.max_positions}; raise it"
        )
    net = QFormerPairs(model, vocabulary)
    if model.vision.frozen:
        freeze(net.vision, source=model.weights or model.vision.pretrained)
    return QFormerStage1(net, objective)


def build_classification(
    model: ModelConfig,
    objective: ObjectiveOptions,
    vocabulary: Vocabulary,
    max_text_length: int,
    term: str,
    num_classes: int,
    num_images: int = 1,
    kind: ClassKind = "class",
) -> Classification:
    """Choosing one of ``num_classes`` for a text about ``num_images``, on the network of a pretraining objective.

    ``term`` names the loss, and with it the head (``model/objectives/classification.py``); ``kind`` says whether
    targets are classes or scores of several ("soft"). Weights are random, as of :func:`build_objective`.

    Raises:
        ValueError: an option out of range, or options that do not fit each other.
    """
    parts = build_parts(model, objective, vocabulary, max_text_length, num_images=num_images)
    return Classification(model, objective, parts, term, num_classes, num_images, kind)


def build_ranking(
    model: ModelConfig,
    objective: ObjectiveOptions,
    vocabulary: Vocabulary,
    max_text_length: int,
    in_batch_negatives: int | None = None,
) -> Ranking:
    """Ranking the texts of an image, and with ``in_batch_negatives`` so many pairs of the micro-batch both ways.

    Raises as :func:`build_objective`.
    """
    parts = build_parts(model, objective, vocabulary, max_text_length)
    return Ranking(model, objective, parts, in_batch_negatives)


def build_parts(
    model: ModelConfig,
    objective: ObjectiveOptions,
    vocabulary: Vocabulary,
    max_text_length: int,
    share: float = 0.0,
    num_images: int = 1,
) -> Parts:
    """Network and planner of a pretraining objective, its vision tower frozen where the options say so.

    ``share`` of the samples get a negative caption from the corpus; raises as :func:`build_objective`.
    """
    if objective.name not in OBJECTIVES:
        answers = "tasks pretraining, captioning, vqa, gqa and okvqa"
        tasks = answers if objective.name == "evlgen" else "task pretraining"
        raise ValueError(
            f"objective.name {objective.name} is for the {tasks}; use one of {', '.join(OBJECTIVES)}, or another"
            " task.name"
        )
    _check(model, objective, vocabulary, max_text_length)
    parts = OBJECTIVES[objective.name](model, objective, vocabulary, max_text_length, share, num_images)
    if model.vision.frozen:
        freeze(parts.net.vision, source=model.weights or model.vision.pretrained)
    return parts


def build_captioning(
    model: ModelConfig,
    objective: ObjectiveOptions,
    vocabulary: Vocabulary,
    max_text_length: int = 50,
    self_critical: bool = False,
    r2l_weight: float = 0.0,
    reconstruction_weight: float = 0.0,
) -> Captioning:
    """The objective captioning with random weights, for a network pretrained by ``objective``; raises as the above."""
    if objective.name not in OBJECTIVES:
        raise ValueError(
            f"objective.name {objective.name} writes no captions: use task.name pretraining; evlgen starts from it"
        )
    _check(model, objective, vocabulary, max_text_length)
    weights = r2l_weight, reconstruction_weight
    built = Captioning(model, objective, vocabulary, max_text_length, self_critical, *weights)
    if model.vision.frozen:
        freeze(built.net.vision, source=model.weights or model.vision.pretrained)
    return built


def _check(model: ModelConfig, objective: ObjectiveOptions, vocabulary: Vocabulary, max_text_length: int) -> None:
    objective.check()
    _refuse_idle(model, objective.name, "connector", "language")
    if model.vision.temporal is not None:
        raise ValueError(f"model.vision.temporal {model.vision.temporal} is for objective.name evlgen; use null")
    _check_frozen_tower(model)
    if model.behaviour == "released":
        _refuse_news(model, objective)
    if objective.name == "mlm" and objective.whole_words and not vocabulary.word_starts:
        raise ValueError(
            "objective.whole_words needs a tokenizer whose tokens show where a word begins (byte-level BPE, WordPiece"
            " or SentencePiece); use another data.tokenizer or objective.whole_words false"
        )
    if not 0 <= model.text.dropout < 1:
        raise ValueError(f"model.text.dropout is {model.text.dropout}, expected 0 to below 1")
    _check_tokens(vocabulary, max_text_length)
    if max_text_length + 2 > model.text.max_positions:
        raise ValueError(
            f"data.max_text_length {max_text_length} needs {max_text_length + 2} positions,"
            f" model.text.max_positions is {model.text.max_positions}; raise it"
        )


def _refuse_news(model: ModelConfig, objective: ObjectiveOptions) -> None:
    """Raises ValueError for an option that the release does not know."""
    is_flm = objective.name == "flm"
    news = {
        "model.vision.standardise": model.vision.standardise,
        "objective.name prefixlm": objective.name == "prefixlm",
        f"objective.itc_weight {objective.itc_weight:g}": objective.itc_weight,
        "objective.query_rate below 1": is_flm and objective.query_rate != 1,
        "objective.stream_rate below 1": is_flm and objective.stream_rate != 1,
        "objective.reconstruction_share below 1": is_flm and objective.reconstruction_share != 1,
        "model.reconstructor.boundary_states": is_flm and model.reconstructor.boundary_states,
    }
    if asked := [option for option, is_asked in news.items() if is_asked]:
        raise ValueError(f"{asked[0]} has no released behaviour; use model.behaviour default")


def _check_tokens(vocabulary: Vocabulary, max_text_length: int) -> None:
    if max_text_length < 3:
        raise ValueError(f"data.max_text_length is {max_text_length}, expected at least 3: <s>, one word, </s>")
    special = {name: getattr(vocabulary, name) for name in ("bos_id", "pad_id", "eos_id", "mask_id")}
    for name, value in special.items():
        if not 0 <= value < vocabulary.size:
            raise ValueError(f"tokenizer's {name} {value} lies outside its vocabulary of {vocabulary.size}")


def _refuse_idle(model: ModelConfig, objective: str, *parts: str) -> None:
    """Raises ValueError for a part of the model that the objective does not have and somebody has described."""
    for part in parts:
        described = getattr(model, part)
        changed = [
            one.name
            for one in fields(described)
            if getattr(described, one.name) != getattr(type(described)(), one.name)
        ]
        if changed:
            raise ValueError(
                f"model.{part}.{changed[0]} has no effect: objective.name {objective} has no such part; leave it out,"
                " or train another objective"
            )


def _check_own_dropout(model: ModelConfig, settings: Any) -> None:
    """Raises ValueError where the default behaviour is asked for what only the release does, or there is no dropout."""
    if model.behaviour != "released":
        raise ValueError(
            "model.language.own_dropout is of model.behaviour released only; else a frozen language model has none"
        )
    if not any(getattr(settings, name, 0) for name in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop")):
        raise ValueError(
            f"model.language.own_dropout has no effect: model.language.name {model.language.name} has no dropout; use"
            " false"
        )


def _check_tower_of_connector(model: ModelConfig) -> None:
    _check_frozen_tower(model)
    if model.vision.standardise:
        raise ValueError(
            "model.vision.standardise has no effect: the norm of a connector is model.connector.standardise; use that"
        )


def _check_frozen_tower(model: ModelConfig) -> None:
    if model.vision.frozen and not model.weights and model.vision.pretrained in (None, AUTO):
        raise ValueError(
            f"model.vision.frozen needs weights that can be had again, found model.vision.pretrained"
            f" {model.vision.pretrained or 'null'}; name a file or a tag, or use model.vision.frozen false"
        )


def _check_hard_negatives(model: ModelConfig, objective: ObjectiveOptions) -> None:
    """Raises ValueError where nothing would be matched, so that nobody believes in negatives that are not there."""
    reason = next((name for name in ("itm_weight", "negative_share") if not getattr(objective, name)), None)
    if model.behaviour == "released":
        reason = "model.behaviour released, which has no image-text matching"
    elif reason is not None:
        reason = f"objective.{reason} 0"
    if reason is not None:
        raise ValueError(
            f"objective.negatives in_batch_hard has no effect with {reason}; change that, or use negatives corpus"
        )
