"""Foreign weights: the only place that knows the key names of other projects; every map is strict.

A map is written once, from our parameter name to the foreign names whose tensors, stacked along rows, make it up.
Released FLM checkpoints: ``import_released``; CLIP towers: ``load_vision``; RoBERTa: ``load_text``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import TextConfig, VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision import resize_positions

Rules = tuple[tuple[str, tuple[str, ...]], ...]

# CLIP image encoder (OpenAI and open_clip name it alike), below the prefix "visual.".
CLIP_RULES: Rules = (
    (r"patch_embedding\.weight", ("conv1.weight",)),
    (r"class_embedding", ("class_embedding",)),
    (r"position_embedding", ("positional_embedding",)),
    (r"(ln_pre|ln_post)\.(weight|bias)", (r"\1.\2",)),
    (r"blocks\.(\d+)\.qkv\.(weight|bias)", (r"transformer.resblocks.\1.attn.in_proj_\2",)),
    (r"blocks\.(\d+)\.out\.(weight|bias)", (r"transformer.resblocks.\1.attn.out_proj.\2",)),
    (r"blocks\.(\d+)\.(ln_1|ln_2)\.(weight|bias)", (r"transformer.resblocks.\1.\2.\3",)),
    (r"blocks\.(\d+)\.up\.(weight|bias)", (r"transformer.resblocks.\1.mlp.c_fc.\2",)),
    (r"blocks\.(\d+)\.down\.(weight|bias)", (r"transformer.resblocks.\1.mlp.c_proj.\2",)),
)


def _bert_layer(ours: str, foreign: str) -> Rules:
    """Rules of one kind of BERT layer; ``ours`` is a pattern with one group, the layer number, ``foreign`` uses it."""
    return (
        (
            rf"{ours}\.attention\.qkv\.(weight|bias)",
            tuple(rf"{foreign}.attention.self.{part}.\2" for part in ("query", "key", "value")),
        ),
        (rf"{ours}\.attention\.out\.(weight|bias)", (rf"{foreign}.attention.output.dense.\2",)),
        (rf"{ours}\.residual\.norm\.(weight|bias)", (rf"{foreign}.attention.output.LayerNorm.\2",)),
        (rf"{ours}\.cross_attention\.query\.(weight|bias)", (rf"{foreign}.crossattention.self.query.\2",)),
        (
            rf"{ours}\.cross_attention\.key_value\.(weight|bias)",
            tuple(rf"{foreign}.crossattention.self.{part}.\2" for part in ("key", "value")),
        ),
        (rf"{ours}\.cross_attention\.out\.(weight|bias)", (rf"{foreign}.crossattention.output.dense.\2",)),
        (rf"{ours}\.cross_residual\.norm\.(weight|bias)", (rf"{foreign}.crossattention.output.LayerNorm.\2",)),
        (rf"{ours}\.ffn\.up\.(weight|bias)", (rf"{foreign}.intermediate.dense.\2",)),
        (rf"{ours}\.ffn\.down\.(weight|bias)", (rf"{foreign}.output.dense.\2",)),
        (rf"{ours}\.ffn\.residual\.norm\.(weight|bias)", (rf"{foreign}.output.LayerNorm.\2",)),
    )


# RoBERTa as transformers names it; token_type has one row there and is a vector here.
ROBERTA_RULES: Rules = (
    (r"embedding\.word\.weight", ("embeddings.word_embeddings.weight",)),
    (r"embedding\.position\.weight", ("embeddings.position_embeddings.weight",)),
    (r"embedding\.token_type", ("embeddings.token_type_embeddings.weight",)),
    (r"embedding\.norm\.(weight|bias)", (r"embeddings.LayerNorm.\1",)),
    *_bert_layer(r"bottom\.(\d+)", r"encoder.layer.\1"),
)

RELEASED_RULES: Rules = (
    *((rf"net\.vision\.{ours}", tuple(f"vit_model.visual.{name}" for name in foreign)) for ours, foreign in CLIP_RULES),
    *((rf"net\.{ours}", tuple(f"text_transformer.{name}" for name in foreign)) for ours, foreign in ROBERTA_RULES),
    (r"net\.text_projection\.(weight|bias)", (r"cross_modal_text_transform.\1",)),
    (r"net\.image_projection\.(weight|bias)", (r"cross_modal_image_transform.\1",)),
    (r"net\.type_embedding\.weight", ("token_type_embeddings.weight",)),
    (r"net\.stream_embedding\.weight", ("token_type_embeddings_flm.weight",)),
    *_bert_layer(r"net\.top\.(\d+)", r"cross_modal_text_layers.\1"),
    *_bert_layer(r"net\.reconstructor_bottom\.(\d+)", r"fusion_layers_bottom.\1"),
    *_bert_layer(r"net\.reconstructor_top\.(\d+)", r"fusion_layers_top.\1"),
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


def foreign_names(name: str, rules: Rules) -> tuple[str, ...]:
    """Foreign keys that make up our parameter ``name``.

    Raises:
        KeyError: no rule, a parameter that the foreign layout does not have.
    """
    for pattern, foreign in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return tuple(match.expand(part) for part in foreign)
    raise KeyError(name)


def import_released(objective: nn.Module, state: Mapping[str, Tensor]) -> ImportReport:
    """Loads a released pretraining state dict (FLM, MLM or AR) into a ``released`` objective of that name, accounting
    for every key.

    Raises:
        ValueError: a key missing, unknown, of another shape, or an alias that differs from its first name.
    """
    with torch.no_grad():
        used = _fill(objective, state, RULES_OF[objective.name])
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


def load_vision(tower: nn.Module, config: VisionConfig) -> list[str]:
    """Loads CLIP weights into a vision tower: a local safetensors or PyTorch file, else an open_clip tag (hub).

    Returns:
        Keys of the image encoder that are left out: the dropped block and the output projection.

    Raises:
        ValueError: the file or tag does not fit the tower.
    """
    path = Path(config.pretrained)
    if path.is_file():
        state = _read_state(path)
    else:
        ensure_torchvision()
        import open_clip

        try:
            clip = open_clip.create_model(config.name, pretrained=config.pretrained, precision="fp32")
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model.vision.pretrained {config.pretrained!r} is neither a file nor a tag of {config.name} that can"
                f" be fetched ({reason}); give a local weights file, or null for random initialisation"
            ) from error
        state = clip.state_dict()
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    if not visual:
        raise ValueError(f"{path} holds no visual.* keys; expected the state dict of a CLIP model")
    with torch.no_grad():
        used = _fill(tower, visual, CLIP_RULES)
    return sorted(set(visual) - {name for names in used.values() for name in names})


def load_text(net: nn.Module, config: TextConfig) -> list[str]:
    """Loads RoBERTa weights (Hugging Face name or folder) into the embedding and bottom layers of an FLM network.

    Returns:
        Keys of the RoBERTa model that are left out: its upper layers and pooler.

    Raises:
        ValueError: no such model, or one of another size or vocabulary.
    """
    ensure_torchvision()
    import transformers

    try:
        roberta = transformers.AutoModel.from_pretrained(config.pretrained, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.text.pretrained {config.pretrained!r} can't be loaded ({reason}); give a folder with a RoBERTa"
            " model in safetensors, or null for random initialisation"
        ) from error
    state = roberta.state_dict()
    half = nn.ModuleDict({"embedding": net.embedding, "bottom": net.bottom})
    with torch.no_grad():
        used = _fill(half, state, ROBERTA_RULES)
    return sorted(set(state) - {name for names in used.values() for name in names})


def _read_state(path: Path) -> Mapping[str, Tensor]:
    """A state dict from a safetensors file, or a PyTorch file without executing anything in it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean that the file can't be used
        raise ValueError(
            f"{path} is not a plain weights file ({type(error).__name__}); expected safetensors or a state dict saved"
            " by torch.save"
        ) from error
    return loaded.get("state_dict", loaded)


def _fill(module: nn.Module, state: Mapping[str, Tensor], rules: Rules) -> dict[str, tuple[str, ...]]:
    """Copies foreign tensors into every parameter of ``module``; position tables are resized."""
    used = {}
    for name, parameter in module.named_parameters():
        try:
            names = foreign_names(name, rules)
        except KeyError:
            raise ValueError(
                f"the model has {name}, which the weights' layout does not know; released checkpoints need"
                " model.behaviour released"
            ) from None
        missing = [foreign for foreign in names if foreign not in state]
        if missing:
            raise ValueError(f"weights lack {missing[0]}, needed for {name}; are they of this kind of model and depth?")
        value = torch.cat([state[foreign] for foreign in names]) if len(names) > 1 else state[names[0]]
        if name.endswith("position_embedding"):
            value = resize_positions(value, round((parameter.shape[0] - 1) ** 0.5))
        if name.endswith("token_type"):
            value = value[0]
        if value.shape != parameter.shape:
            raise ValueError(
                f"weights' {names[0]} has shape {tuple(value.shape)}, the model's {name} {tuple(parameter.shape)};"
                " width, vocabulary or resolution differ"
            )
        parameter.copy_(value)
        used[name] = names
    return used
