"""Weights by the name that a user gives them: CLIP files and tags, RoBERTa and BERT, imported models, runs of ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model.config import LanguageConfig, ModelConfig, TextConfig, VisionConfig
from model.evlgen import EVLGen
from model.language.causal_lm import LanguageModel, language_settings
from model.language.lora import ADAPTER
from model.objectives.evlgen import ImageToText
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import VisionTower
from model.vision.tower import build_tower
from model.weights.heads import head_resizes, head_rules
from model.weights.start import Loaded, Resizes, named_tensors, start_from
from model.weights.towers import bert_bottom, clip_image_encoder, eva_image_encoder, refuse_other_network
from pipeline.checkpoint import restore
from pipeline.checkpoint.files import CheckpointError, run_of
from pipeline.config.command_line import load_config
from pipeline.config.options import Config
from pipeline.exported.folder import is_exported
from pipeline.exported.settings import tower_file
from pipeline.language_weights.loading import load_language
from pipeline.weights.external import load_external
from pipeline.weights.files import read_state_dict

IMPORTED, IMPORT_RECIPE = "weights.safetensors", "recipe.yaml"  # in the folder of an imported model
HEAD = r"(?!net\.).+"  # whatever is not of the network: what a task or objective puts on top
TOWER, LANGUAGE = "net.vision.", "net.language."
IMAGE_NORM = "net.image_norm.weight"
OF_VIDEO = (r"blocks\.\d+\.temporal\..+",)  # begins anew in a tower of images
MAY_BEGIN = (HEAD, *(re.escape(TOWER) + pattern for pattern in OF_VIDEO))


def load_model(objective: nn.Module, weights: str) -> Loaded:
    """Starts a whole objective from ``model.weights``: a run or checkpoint folder of ours, or an imported model.

    A head starts from the source's head for the same purpose (``model/weights/heads.py``). Heads that the source lacks,
    and layers of another number of classes, stay as they are; heads that only the source has are left out; the vision
    tower's position table is resized; what frames tell each other begins anew where the source is of images. An
    objective may leave more of a source unread (``not_read``, patterns of names), or give further ``resizes``.

    Raises:
        ValueError: nothing of the kind is there, or the networks differ.
    """
    return _start(objective, weights, MAY_BEGIN, getattr(objective, "resizes", ()))


def load_whole(objective: nn.Module, weights: str) -> Loaded:
    """The same for a model that is used as it is: all of it, heads and rows of its vocabulary included, must be there.

    Raises:
        ValueError: nothing of the kind is there, or something is missing.
    """
    return _start(objective, weights)


def is_import(folder: Path) -> bool:
    """Whether it was made by `python -m pipeline.convert import-flm`."""
    return (folder / IMPORTED).is_file()


def import_config(folder: Path) -> Config:
    """The configuration that an imported model is used with: its sizes, its objective, and its task if it has one.

    Raises:
        ConfigError: there is none, or it holds what no configuration has.
    """
    config = load_config(folder / IMPORT_RECIPE)
    config.model.weights = str(folder)  # which may have been moved
    return config


def load_evlgen(objective: ImageToText, weights: str, config: LanguageConfig) -> Loaded:
    """Starts EVLGen from a run or import as :func:`load_model`, with the language model that is named: read once.

    Adapters that the source lacks begin anew; so does the connector's last layer where the source has none (a Q-Former
    after its first stage). Raises as :func:`load_model`.
    """
    language = objective.net.language
    loaded = load_language(language, config.name)
    if is_import(Path(weights)):
        return _start(objective, weights, MAY_BEGIN)
    whole = read_model(weights, {config.name: language})
    base = {one for one in whole if one.startswith(LANGUAGE) and not re.fullmatch(ADAPTER, one)}
    state = {one: value for one, value in whole.items() if one not in base}
    try:
        fresh = objective.fresh_from(state)
        if any(re.fullmatch(ADAPTER, one) for one in state):
            _refuse_adapters_of_another(objective, weights, config, {one: whole[one] for one in base})
    except ValueError as error:
        raise ValueError(f"model.weights {weights} {error}") from None
    found = _start_from_state(objective, weights, state, [*MAY_BEGIN, *fresh])
    ours = {f"{LANGUAGE}llm.{one}" for one in loaded.loaded}
    fresh = [one for one in found.fresh if one not in ours]
    return Loaded([*found.loaded, *sorted(ours)], found.resized, fresh, found.dropped)


def _refuse_adapters_of_another(
    objective: ImageToText, weights: str, config: LanguageConfig, base: Mapping[str, Tensor]
) -> None:
    """Raises ValueError where a run's adapters, trained beside ``base``, would be others here."""
    before, own = load_config(run_of(restore.resolve(Path(weights)))).model.language, dict(named_tensors(objective))
    if any(own[name].shape != value.shape or not torch.equal(own[name], value) for name, value in base.items()):
        raise ValueError(
            f"has adapters of the language model {before.name}, found model.language.name {config.name} with other"
            " weights; name that one"
        )
    if before.lora_alpha != config.lora_alpha:
        raise ValueError(
            f"has adapters with model.language.lora_alpha {before.lora_alpha:g}, found {config.lora_alpha:g}, by which"
            " they would count otherwise; use the run's"
        )


def _start(objective: nn.Module, weights: str, fresh: Iterable[str] = (), resizes: Resizes = ()) -> Loaded:
    if is_import(Path(weights)):
        fresh = [*fresh, *getattr(objective, "elsewhere", ())]
    return _start_from_state(objective, weights, read_model(weights), fresh, resizes)


def _start_from_state(
    objective: nn.Module, weights: str, state: dict[str, Tensor], fresh: Iterable[str], resizes: Resizes = ()
) -> Loaded:
    source = f"model.weights {weights}"
    dropped = [HEAD, *getattr(objective, "not_read", ())]
    released = getattr(getattr(objective, "net", None), "released", False)
    ours = dict(objective.named_parameters())
    if (IMAGE_NORM in ours) != (IMAGE_NORM in state):
        found, setting = ("has no", "false") if IMAGE_NORM in ours else ("has a", "true")
        raise ValueError(f"{source} {found} norm behind its vision tower; set model.vision.standardise {setting}")
    return start_from(objective, state, head_rules(state), source, fresh, dropped, (*head_resizes(released), *resizes))


def load_vision_tower(tower: nn.Module, config: ModelConfig) -> Loaded:
    """Gives a vision tower the weights that ``model.weights`` or ``model.vision.pretrained`` name.

    Raises:
        ValueError: they can't be had or do not fit.
    """
    found = {}
    if config.weights and (file := _exported_tower(Path(config.weights))) is not None:
        return load_vision(tower, dataclasses.replace(config.vision, pretrained=str(file)))
    if config.weights:
        named = read_model(config.weights).items()
        found = {name.removeprefix(TOWER): value for name, value in named if name.startswith(TOWER)}
    if not found or all(".temporal." in name for name in found):  # an imported EVLGen is what was trained only
        return load_vision(tower, config.vision)
    return start_from(tower, found, source=f"model.weights {config.weights}", fresh=OF_VIDEO)


def _exported_tower(folder: Path) -> Path | None:
    """The weights of a frozen tower where ``folder`` is an exported one that holds them, else None."""
    return tower_file(folder) if is_exported(folder) else None


def read_model(weights: str, languages: Mapping[str, LanguageModel] = MappingProxyType({})) -> dict[str, Tensor]:
    """All weights of a run, a checkpoint or an imported model by our names, its frozen parts included.

    ``languages`` are at hand already, by name.

    Raises:
        ValueError: there is no such thing, or its frozen parts are no longer those it was trained with.
    """
    folder = Path(weights)
    if is_import(folder):
        return read_state_dict(folder / IMPORTED)
    try:
        checkpoint = restore.resolve(folder)
        frozen = {}
        if restore.read_state(checkpoint).frozen:
            frozen = _frozen_of(load_config(run_of(checkpoint)).model, languages)
        return restore.weights_in(checkpoint, frozen)
    except CheckpointError as error:
        raise ValueError(
            f"model.weights {weights}: {error}; a folder made by `python -m pipeline.convert` holds {IMPORTED}"
        ) from error


def load_frozen_parts(objective: nn.Module, config: ModelConfig) -> None:
    """Gives an objective the weights of its parts that are not trained, which no checkpoint holds.

    Raises:
        ValueError: they can't be had or do not fit.
    """
    if config.vision.frozen:
        load_vision_tower(objective.net.vision, config)
    if isinstance(getattr(objective, "net", None), EVLGen):
        load_language(objective.net.language, config.language.name)


def _frozen_of(config: ModelConfig, languages: Mapping[str, LanguageModel]) -> dict[str, Tensor]:
    """The same, by our names, for a model that is not built."""
    found = {}
    if config.vision.frozen:
        tower = build_tower(config.vision)
        load_vision_tower(tower, config)
        kept = ((name, value) for name, value in named_tensors(tower) if ".temporal." not in name)  # that is trained
        found |= {f"{TOWER}{name}": value.detach() for name, value in kept}
    if (name := config.language.name) is not None:
        language = languages.get(name)
        if language is None:
            language = LanguageModel(language_settings(name))
            load_language(language, name)
        of_base = [pair for pair in named_tensors(language) if not re.fullmatch(ADAPTER, pair[0])]
        found |= {f"{LANGUAGE}{one}": value.detach() for one, value in of_base}
    return found


def load_vision(tower: nn.Module, config: VisionConfig) -> Loaded:
    """Gives any vision tower the weights that ``config.pretrained`` names: a local file, or a tag of its library's.

    Raises:
        ValueError: the file or tag does not fit the tower; it is as it was before.
    """
    return _load_clip(tower, config) if isinstance(tower, VisionTower) else load_external(tower, config)


def _load_clip(tower: VisionTower, config: VisionConfig) -> Loaded:
    """From a local safetensors or PyTorch file, else an open_clip tag (hub)."""
    if config.pretrained is None:
        raise ValueError(
            "model.vision.pretrained is null, and these weights need the tower they were trained with; name it"
        )
    source, file = f"model.vision.pretrained {config.pretrained}", Path(config.pretrained)
    if file.is_file():
        state = read_state_dict(file)
    elif config.name is None:
        raise ValueError(f"{source}: no such file (nor a tag, as model.vision.name is null)")
    else:
        state = _state_of_tag(tower, config)
    image_encoder = clip_image_encoder if tower.config.layout == "clip" else eva_image_encoder
    try:
        state, rules, dropped = image_encoder(state, tower.config)
    except ValueError as error:
        raise ValueError(f"{source} {error}") from error
    return start_from(tower, state, rules, source, OF_VIDEO, dropped)


def _state_of_tag(tower: VisionTower, config: VisionConfig) -> dict[str, Tensor]:
    ensure_torchvision()
    import open_clip

    name, tag = config.name, config.pretrained
    refuse_other_network(tower.config, tag, open_clip.get_pretrained_cfg(name, tag))
    try:
        return open_clip.create_model(name, pretrained=tag, precision="fp32").state_dict()
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(
            f"model.vision.pretrained {tag!r} is neither a file nor a tag of {name} that can"
            f" be fetched ({str(error).splitlines()[0]}); give a local weights file, or null for random initialisation"
        ) from error


def load_text(net: nn.Module, config: TextConfig) -> Loaded:
    """Loads RoBERTa or BERT weights (Hugging Face name or folder) into the embedding and bottom layers of a network.

    Raises:
        ValueError: no such model, or one of another kind, size or vocabulary.
    """
    ensure_torchvision()
    import transformers

    source = f"model.text.pretrained {config.pretrained}"
    try:
        foreign = transformers.AutoModel.from_pretrained(
            config.pretrained, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # settings of others make transformers raise anything; all mean that it can't be used
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{source} can't be loaded ({reason}); give a folder with a RoBERTa or BERT model in safetensors, or null"
            " for random initialisation"
        ) from error
    tokens, theirs = net.embedding.word.num_embeddings, foreign.config.vocab_size
    if tokens != theirs:
        raise ValueError(
            f"{source} has {theirs} tokens, the tokenizer {tokens}; read captions as it does:"
            f" --data.tokenizer {config.pretrained}"
        )
    try:
        state, rules, dropped = bert_bottom(foreign.state_dict(), foreign.config, config)
    except ValueError as error:
        raise ValueError(f"{source} {error}") from error
    half = nn.ModuleDict({"embedding": net.embedding, "bottom": net.bottom})
    return start_from(half, state, rules, source, dropped=dropped)
