"""Weights of CLIP, RoBERTa and BERT: which of their tensors make up which of our parameters; every map is strict.

A map is written once, from our parameter name to the foreign names whose tensors, stacked along rows, make it up.
CLIP towers: ``load_vision``; RoBERTa and BERT: ``load_text``; released FLM checkpoints: model/weights/released.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model.config import TextConfig, VisionConfig
from model.layers import PAD_POSITION
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import IMAGE_MEAN, resize_positions

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


def bert_layer(ours: str, foreign: str) -> Rules:
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


ROBERTA_KIND = ("roberta", "xlm-roberta", "camembert")
FOREIGN_POSITIONS = "embeddings.position_embeddings.weight"

# RoBERTa and BERT as transformers names them; of token_type, a table there, the first row is a vector here.
ROBERTA_RULES: Rules = (
    (r"embedding\.word\.weight", ("embeddings.word_embeddings.weight",)),
    (r"embedding\.position\.weight", (FOREIGN_POSITIONS,)),
    (r"embedding\.token_type", ("embeddings.token_type_embeddings.weight",)),
    (r"embedding\.norm\.(weight|bias)", (r"embeddings.LayerNorm.\1",)),
    *bert_layer(r"bottom\.(\d+)", r"encoder.layer.\1"),
)


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


def load_vision(tower: nn.Module, config: VisionConfig) -> list[str]:
    """Loads CLIP weights into a vision tower: a local safetensors or PyTorch file, else an open_clip tag (hub).

    Returns:
        Keys of the image encoder that are left out: the dropped block and the output projection.

    Raises:
        ValueError: the file or tag does not fit the tower.
    """
    path = Path(config.pretrained)
    if path.is_file():
        state = read_state_dict(path)
    elif config.name is None:
        raise ValueError(f"model.vision.pretrained {path}: no such file (nor a tag, as model.vision.name is null)")
    else:
        ensure_torchvision()
        import open_clip

        refuse_other_network(
            tower.config, config.pretrained, open_clip.get_pretrained_cfg(config.name, config.pretrained)
        )
        try:
            clip = open_clip.create_model(config.name, pretrained=config.pretrained, precision="fp32")
        except (RuntimeError, OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model.vision.pretrained {config.pretrained!r} is neither a file nor a tag of {config.name} that can"
                f" be fetched ({reason}); give a local weights file, or null for random initialisation"
            ) from error
        state = clip.state_dict()
    prefix = "" if "conv1.weight" in state else "visual."  # the image encoder alone, or in a whole CLIP
    visual = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not visual:
        raise ValueError(
            f"{path} holds no visual.* keys (found {', '.join(sorted(state)[:3])} ..); expected the state dict of a"
            " CLIP of OpenAI or open_clip; models of timm and transformers are model.vision.name timm/NAME and hf/NAME"
        )
    with torch.no_grad():
        used = fill(tower, visual, CLIP_RULES, source=f"model.vision.pretrained {config.pretrained}")
    return sorted(set(visual) - {name for names in used.values() for name in names})


def refuse_other_network(config: VisionConfig, tag: str, known: Mapping[str, Any]) -> None:
    """Raises ValueError for published weights (their record in open_clip) that want another activation or other pixels.

    Their names and shapes fit, so nothing else would notice.
    """
    refuse_other_activation(config.name, config.quick_gelu, tag, known)
    if tuple(known.get("mean", IMAGE_MEAN)) != IMAGE_MEAN:
        raise ValueError(
            f"{tag}'s weights want other pixels than CLIP's; use model.vision.name open_clip/{config.name}"
        )


def refuse_other_activation(name: str, quick_gelu: bool, tag: str, known: Mapping[str, Any]) -> None:
    """The first half of :func:`refuse_other_network`; ``quick_gelu`` is what the model named has."""
    if known and known.get("quick_gelu", False) != quick_gelu:
        plain = name.removesuffix("-quickgelu")
        other, wanted = (plain, "GELU") if quick_gelu else (f"{plain}-quickgelu", "QuickGELU")
        raise ValueError(f"{tag}'s weights want {wanted}, which {name} has not; use model.vision.name {other}")


def load_text(net: nn.Module, config: TextConfig) -> list[str]:
    """Loads RoBERTa or BERT weights (Hugging Face name or folder) into the embedding and bottom layers of a network.

    NOTE BERT's LayerNorm adds 1e-12 to the variance, RoBERTa's and ours 1e-5.

    Returns:
        Keys of the foreign model that are left out: its upper layers, pooler and further token types.

    Raises:
        ValueError: no such model, or one of another kind, size or vocabulary.
    """
    ensure_torchvision()
    import transformers

    source = f"model.text.pretrained {config.pretrained}"
    try:
        foreign = transformers.AutoModel.from_pretrained(config.pretrained, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.text.pretrained {config.pretrained!r} can't be loaded ({reason}); give a folder with a RoBERTa or"
            " BERT model in safetensors, or null for random initialisation"
        ) from error
    _refuse_other_text_model(foreign.config, config, source)
    state = dict(foreign.state_dict())
    state[FOREIGN_POSITIONS] = _positions_from_ours(state[FOREIGN_POSITIONS], _first_position(foreign.config))
    half = nn.ModuleDict({"embedding": net.embedding, "bottom": net.bottom})
    with torch.no_grad():
        used = fill(half, state, ROBERTA_RULES, source=source)
    return sorted(set(state) - {name for names in used.values() for name in names})


def _refuse_other_text_model(foreign: Any, config: TextConfig, source: str) -> None:
    """Raises ValueError for a model that computes something else with tensors of the same names and shapes."""
    if foreign.model_type not in ("bert", *ROBERTA_KIND):
        raise ValueError(f"{source} is of type {foreign.model_type}, expected roberta or bert; name one of these")
    if foreign.num_attention_heads != config.heads:
        raise ValueError(
            f"{source} has {foreign.num_attention_heads} attention heads, the model {config.heads}; set"
            f" --model.text.heads {foreign.num_attention_heads}"
        )
    positions = getattr(foreign, "position_embedding_type", "absolute")
    if foreign.hidden_act != "gelu" or positions != "absolute":
        raise ValueError(
            f"{source} has activation {foreign.hidden_act} and {positions} positions, expected gelu and absolute;"
            " name another model"
        )


def _first_position(foreign: Any) -> int:
    """Row of a foreign position table where the first token stands: RoBERTa counts on from its padding, BERT from 0."""
    return foreign.pad_token_id + 1 if foreign.model_type in ROBERTA_KIND else 0


def _positions_from_ours(table: Tensor, first: int) -> Tensor:
    """A position table whose first token stands at row ``first`` as one of ours, where it stands behind the padding."""
    ours = PAD_POSITION + 1
    return table if first == ours else torch.cat([table.new_zeros(ours, table.shape[1]), table[first:]])


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """A state dict from a safetensors file, or a PyTorch file without executing anything in it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return plain_names(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({error}); fetch it again") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean that the file can't be used
        raise ValueError(
            f"{path} is not a plain weights file ({type(error).__name__}); expected safetensors or a state dict saved"
            " by torch.save"
        ) from error
    tensors = plain_names(loaded) if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name; expected a state dict")
    return tensors


def plain_names(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict without what training programs wrap it in: {"model": ..}, "module.", "_orig_mod."."""
    inner = next((found[key] for key in ("state_dict", "model", "module") if isinstance(found.get(key), Mapping)), None)
    if inner is not None:
        return plain_names(inner)
    tensors = {key.replace("_orig_mod.", ""): value for key, value in found.items() if isinstance(value, Tensor)}
    return {re.sub(r"^(module\.)+", "", key): value for key, value in tensors.items()}


def fill(
    module: nn.Module, state: Mapping[str, Tensor], rules: Rules, leave: Collection[str] = (), source: str = "weights"
) -> dict[str, tuple[str, ...]]:
    """Copies foreign tensors into every parameter of ``module`` but those to ``leave``, or into none; images' position
    tables are resized. Returns our names with the foreign ones; raises ValueError that begins with ``source``."""
    used, values = {}, []
    for name, parameter in module.named_parameters():
        if name in leave:
            continue
        try:
            names = foreign_names(name, rules)
        except KeyError:
            raise ValueError(
                f"{source}: the model has {name}, which the weights' layout does not know; released checkpoints need"
                " model.behaviour released"
            ) from None
        try:
            value = joined(name, names, state)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if name.endswith("position_embedding"):
            value = resize_positions(value, round((parameter.shape[0] - 1) ** 0.5))
        if value.shape != parameter.shape:
            raise ValueError(
                f"{source}: {names[0]} has shape {tuple(value.shape)}, the model's {name} {tuple(parameter.shape)};"
                " width, patches and number of positions are options of the model, set them to the weights' sizes; the"
                " vocabulary is that of data.tokenizer, name the weights' own"
            )
        values.append((parameter, value))
        used[name] = names
    for parameter, value in values:
        parameter.copy_(value)
    return used


def joined(name: str, foreign: tuple[str, ...], state: Mapping[str, Tensor]) -> Tensor:
    """The value of our parameter ``name``, made of the tensors named in ``foreign``; raises ValueError if one lacks."""
    missing = [key for key in foreign if key not in state]
    if missing:
        raise ValueError(f"weights lack {missing[0]}, needed for {name}; are they of this kind of model and depth?")
    value = torch.cat([state[key] for key in foreign]) if len(foreign) > 1 else state[foreign[0]]
    return value[0] if name.endswith("token_type") and value.ndim == 2 else value
