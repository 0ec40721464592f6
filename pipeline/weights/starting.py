"""Which weights a model starts from: rank 0 decides and loads them, the engine gives them to all other ranks.

``auto`` takes the paper's, CLIP's and RoBERTa's, where they can be had and fit, else random ones, and says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.config import AUTO, ModelConfig, TextConfig, VisionConfig
from model.evlgen import EVLGen
from model.objectives.evlgen import OUTPUT, ImageToText
from model.objectives.pretraining import Pretraining
from model.qformer import QFormerPairs
from model.torchvision_shim import ensure_torchvision
from model.towers import fit_image_norm
from model.vision.clip import VisionTower
from model.weights.start import Loaded
from model.weights.towers import refuse_other_network
from pipeline.checkpoint.files import run_of
from pipeline.checkpoint.restore import load_into
from pipeline.config.options import ConfigError
from pipeline.data.tokenizer import TextTokenizer
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.exported.folder import is_exported
from pipeline.language_weights.loading import load_connector, load_language
from pipeline.weights.external import published_files
from pipeline.weights.hub import Hub, HubError
from pipeline.weights.sources import (
    is_import,
    load_evlgen,
    load_frozen_parts,
    load_model,
    load_text,
    load_vision,
    load_vision_tower,
    load_whole,
)

CLIP_TAG, CLIP_FILE = "openai", "open_clip_model.safetensors"
ROBERTA, ROBERTA_LAYERS, ROBERTA_TOKENS = "roberta-base", 12, 50265
ROBERTA_SIZES = {name: getattr(TextConfig(), name) for name in ("width", "heads", "ffn_width", "max_positions")}
VOCABULARY_FILE = "tokenizer.json"


@dataclasses.dataclass
class Start:
    """What one tower, or the whole model, starts from; ``taken`` None is random, with the ``reason`` under auto."""

    asked: str | None
    taken: str | None
    reason: str | None = None
    names: Loaded | None = None  # what became of each of them


def load_starting_weights(
    objective: Pretraining,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    place: Place,
    agreement: Agreement,
    hub: Hub | None = None,
) -> dict[str, dict[str, Any]]:
    """Load what ``config`` asks for into rank 0's ``objective``, and tell every rank what that was.

    Only rank 0 reads files or asks the hub, so no two processes fetch the same file and no two nodes decide
    differently. The engine broadcasts rank 0's parameters when it is built.

    Returns:
        "vision" and "text" (of evlgen "language" and "connector"), or "model" with ``model.weights``, to asked, taken
        and reason: fit for JSON.

    Raises:
        ConfigError: on every rank, if weights that were named can't be had or do not fit.
    """

    def load() -> dict[str, dict[str, Any]]:
        starts = _load(objective, config, tokenizer, hub or Hub())
        return {name: dataclasses.asdict(start) for name, start in starts.items()}

    return _on_rank_0(load, place, agreement)


def fit_to_images(
    objective: nn.Module,
    config: ModelConfig,
    starting: dict[str, dict[str, Any]],
    first_images: Callable[[], Tensor],
    place: Place,
    agreement: Agreement,
) -> None:
    """Fit what is random behind rank 0's vision tower to the first images of training.

    That is the connector (``begin_with`` of its objective) or the norm of ``VisionConfig.standardise``. Nothing is done
    in released behaviour, and where what a run has learnt goes on as it is.
    """
    fresh = "connector" in starting
    of_run = starting.get("model", {}).get("names") or {}
    if config.behaviour != "default":
        return
    if fresh or OUTPUT in of_run.get("fresh", ()):
        fit = partial(objective.begin_with, fresh=fresh)
    elif config.vision.standardise and "model" not in starting:
        fit = partial(fit_image_norm, objective.net)
    else:
        return
    was_training = objective.training
    objective.eval()
    _on_rank_0(lambda: fit(first_images()), place, agreement)
    objective.train(was_training)


def load_frozen(objective: nn.Module, config: ModelConfig, place: Place, agreement: Agreement) -> None:
    """Load the frozen parts of a model whose other weights come from a checkpoint; raises as the above."""
    _on_rank_0(lambda: load_frozen_parts(objective, config), place, agreement)


def load_trained(objective: nn.Module, config: ModelConfig, checkpoint: Path) -> None:
    """Give a model, built without an engine, all weights of a checkpoint, its frozen parts included; or of an imported
    model, its task's head included. No rank is asked.

    Raises:
        ValueError: the checkpoint is damaged or of another model, or frozen weights are no longer those it was
            trained with.
    """
    load_frozen_parts(objective, config)
    if is_import(checkpoint):
        load_whole(objective, str(checkpoint))
    else:
        load_into(objective, checkpoint)


def _on_rank_0(load: Callable[[], Any], place: Place, agreement: Agreement) -> Any:
    """What ``load`` returns to rank 0, on every rank; its ValueError is every rank's ConfigError."""
    found, error = None, None
    if place.is_main:
        try:
            found = load()
        except ValueError as refused:
            error = str(refused)
    found, error = agreement.gather((found, error))[0]
    if error is not None:
        raise ConfigError(error)
    return found


def describe_start(starting: dict[str, dict[str, Any]]) -> tuple[str, list[str]]:
    """One line that says what the model starts from, and a warning for every tower that did not get the paper's."""
    parts = []
    for name, start in starting.items():
        names = start.get("names")
        parts.append(f"{name} {start['taken'] or 'random'}{f' ({Loaded(**names)})' if names else ''}")
    warnings = [
        f"WARNING: the {name} tower starts from RANDOM weights: {start['reason']}. "
        f"--model.{name}.pretrained {CLIP_TAG if name == 'vision' else ROBERTA} makes this an error, "
        f"--model.{name}.pretrained null makes it silent"
        for name, start in starting.items()
        if start["reason"]
    ]
    return f"starting weights: {', '.join(parts)}", warnings


def _load(objective: Pretraining, config: ModelConfig, tokenizer: TextTokenizer, hub: Hub) -> dict[str, Start]:
    net = getattr(objective, "net", None)  # a task may have no towers, then none can be asked for
    if config.weights and isinstance(net, EVLGen):
        return {"model": _load_evlgen(objective, config)}
    if config.weights:
        _refuse_other_tokens_of_run(config.weights, tokenizer)
        names = load_model(objective, config.weights)
        if is_import(Path(config.weights)):
            load_frozen_parts(objective, config)
        return {"model": Start(config.weights, config.weights, names=names)}
    if isinstance(net, EVLGen):
        language, bert = config.language.name, config.connector.pretrained
        starts = {
            "vision": _load_vision(net, config, hub),
            "language": Start(language, language, names=load_language(net.language, language)),
            "connector": Start(bert, bert, names=None if bert is None else load_connector(net.connector, bert)),
        }
        return starts
    if isinstance(net, QFormerPairs):
        bert = config.connector.pretrained
        names = None if bert is None else load_connector(net.connector, bert)
        if bert is not None:
            net.begin_text_as_queries()
        return {"vision": _load_vision(net, config, hub), "connector": Start(bert, bert, names=names)}
    return {"vision": _load_vision(net, config, hub), "text": _load_text(net, config, tokenizer, hub)}


def _load_evlgen(objective: ImageToText, config: ModelConfig) -> Start:
    """From a run, whose words only adapters were trained with, or an import."""
    names = load_evlgen(objective, config.weights, config.language)
    if is_import(Path(config.weights)) and config.vision.frozen:
        load_vision_tower(objective.net.vision, config)
    return Start(config.weights, config.weights, names=names)


def _load_vision(net: Any, config: ModelConfig, hub: Hub) -> Start:
    asked = config.vision.pretrained
    if asked is None:
        return Start(None, None)
    if asked != AUTO:
        return Start(asked, asked, names=load_vision(net.vision, config.vision))
    try:
        is_clip = isinstance(net.vision, VisionTower)
        file = _clip_file(net.vision, hub) if is_clip else _external_file(config.vision, hub)
        names = load_vision(net.vision, dataclasses.replace(config.vision, pretrained=str(file)))
    except ValueError as error:
        return Start(asked, None, _one_line(error))
    return Start(asked, f"{CLIP_TAG if is_clip else config.vision.name} ({file})", names=names)


def _external_file(config: VisionConfig, hub: Hub) -> Path:
    """The weights that a library has by default for its model; raises ValueError with the reason if there are none."""
    repository, *names = published_files(config)
    return _from_hub(hub, repository, *names) / names[-1]


def _clip_file(tower: VisionTower, hub: Hub) -> Path:
    """The weights that open_clip's tag means for this tower; raises ValueError with the reason if there are none."""
    ensure_torchvision()
    import open_clip

    name = tower.config.name
    if name is None:
        raise ValueError("model.vision.name is null, so no published weights are known to fit")
    known = open_clip.get_pretrained_cfg(name, CLIP_TAG)
    if not known or not known.get("hf_hub"):
        raise ValueError(f"open_clip has no {CLIP_TAG} weights of {name}")
    refuse_other_network(tower.config, CLIP_TAG, known)
    return _from_hub(hub, known["hf_hub"].rstrip("/"), CLIP_FILE) / CLIP_FILE


def _load_text(net: Any, config: ModelConfig, tokenizer: TextTokenizer, hub: Hub) -> Start:
    asked = config.text.pretrained
    if asked is None:
        return Start(None, None)
    if asked != AUTO:
        _refuse_other_tokens(asked, tokenizer, hub)
        return Start(asked, asked, names=load_text(net, config.text))
    try:
        folder = _roberta_folder(config.text, tokenizer, hub)
        names = load_text(net, dataclasses.replace(config.text, pretrained=str(folder)))
    except ValueError as error:
        return Start(asked, None, _one_line(error))
    return Start(asked, f"{ROBERTA} ({folder})", names=names)


def _roberta_folder(config: TextConfig, tokenizer: TextTokenizer, hub: Hub) -> Path:
    """Where RoBERTa's weights are; raises ValueError with the reason if they do not fit or can't be had.

    What can be told without the hub is told first.
    """
    mend = f"--data.tokenizer {ROBERTA} reads captions as {ROBERTA} does"
    for name, size in ROBERTA_SIZES.items():
        if getattr(config, name) != size:
            raise ValueError(f"model.text.{name} is {getattr(config, name)}, {ROBERTA}'s {size}")
    if config.bottom_layers > ROBERTA_LAYERS:
        raise ValueError(f"model.text.bottom_layers is {config.bottom_layers}, {ROBERTA} has {ROBERTA_LAYERS}")
    if tokenizer.vocabulary.size != ROBERTA_TOKENS:
        raise ValueError(
            f"the tokenizer {tokenizer.source} has {tokenizer.vocabulary.size} tokens, {ROBERTA}'s {ROBERTA_TOKENS};"
            f" {mend}"
        )
    if tokenizer.source != ROBERTA or Path(ROBERTA).exists():
        other = _other_token(tokenizer, _from_hub(hub, ROBERTA, VOCABULARY_FILE) / VOCABULARY_FILE)
        if other:
            raise ValueError(f"the tokenizer {tokenizer.source} is another one than {ROBERTA}'s ({other}); {mend}")
    return _from_hub(hub, ROBERTA, "config.json", "model.safetensors")


def _from_hub(hub: Hub, repository: str, *names: str) -> Path:
    try:
        return hub.folder(repository, *names)
    except HubError as error:
        raise ValueError(f"{repository}: {error}") from error


def _refuse_other_tokens(source: str, tokenizer: TextTokenizer, hub: Hub) -> None:
    """Raise ValueError if the named model's own tokenizer is at hand and numbers words in another way."""
    if tokenizer.source == source:
        return
    try:
        folder = Path(source) if Path(source).is_dir() else hub.folder(source, VOCABULARY_FILE)
    except HubError:
        return
    _refuse_tokens_other_than(folder, tokenizer, f"model.text.pretrained {source}")


def _refuse_other_tokens_of_run(weights: str, tokenizer: TextTokenizer) -> None:
    """The same for ``model.weights``, a run folder or a checkpoint folder in it."""
    folder = Path(weights)
    run = run_of(folder)
    copy = run if is_exported(run) else run / "tokenizer"
    _refuse_tokens_other_than(copy, tokenizer, f"model.weights {weights}")


def _refuse_tokens_other_than(folder: Path, tokenizer: TextTokenizer, source: str) -> None:
    other = _other_token(tokenizer, folder / VOCABULARY_FILE) if (folder / VOCABULARY_FILE).is_file() else None
    if other:
        raise ValueError(
            f"{source}: the tokenizer {tokenizer.source} is not the one that its words were learned with ({other});"
            f" use --data.tokenizer {folder}"
        )


def _other_token(tokenizer: TextTokenizer, file: Path) -> str | None:
    """The first token whose id differs in a tokenizer.json, in words; None if all of ours mean the same there."""
    from tokenizers import Tokenizer

    try:
        theirs = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{file} is not a tokenizer ({_one_line(error)}); fetch it again") from error
    ours = sorted(tokenizer.tokens.items(), key=lambda pair: pair[1])
    for token, number in ours:
        if theirs.get(token) != number:
            return f"{token!r} is token {number} here, {theirs.get(token, 'none')} there"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
