"""Weights of what is EVLGen's own: its language model, and a BERT that its connector begins with."""

from __future__ import annotations

import re

import torch

from model.connectors.connector import Connector
from model.language.causal_lm import LanguageModel
from model.language.lora import ADAPTER
from model.torchvision_shim import ensure_torchvision
from model.weights.connectors import QFORMER_FRESH, bert_of_connector
from model.weights.start import Loaded, named_tensors, start_from
from pipeline.language_weights.files import copy_weights, weight_files


def load_language(language: LanguageModel, name: str) -> Loaded:
    """Gives ``language`` the weights that ``model.language.name`` names, in safetensors; no code of the folder runs.

    Raises:
        ValueError: they can't be had, or are of another model.
    """
    source = f"model.language.name {name}"
    fresh = frozenset(one for one, _ in named_tensors(language.llm) if re.fullmatch(ADAPTER, one))
    try:
        loaded = copy_weights(language.llm, weight_files(name), fresh)
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error
    return _by_transformers(language, name, source) if loaded is None else loaded


def _by_transformers(language: LanguageModel, name: str, source: str) -> Loaded:
    """From files whose names transformers knows to change; it holds a second model meanwhile."""
    ensure_torchvision()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # settings of others make it raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{source}: transformers can't read its weights ({reason}); give safetensors") from error
    if info["missing_keys"]:
        raise ValueError(f"{source}: its weights lack {sorted(info['missing_keys'])[0]}; fetch the folder again")
    return start_from(language.llm, dict(named_tensors(model)), source=source, fresh=(ADAPTER,))


def load_connector(connector: Connector, name: str) -> Loaded:
    """Gives the body of a connector the layers of a BERT (folder or name on the hub), in safetensors.

    Raises:
        ValueError: there is none, it is of another kind or size, or the connector has no such layers.
    """
    ensure_torchvision()
    import transformers

    source, config = f"model.connector.pretrained {name}", connector.config
    if config.name not in ("tomeformer", "qformer"):
        raise ValueError(f"{source}: a {config.name} has no layers of BERT; use model.connector.pretrained null")
    try:
        bert = transformers.AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # settings of others make it raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{source} can't be loaded ({reason}); give a folder with a BERT in safetensors") from error
    try:
        foreign = bert_of_connector(bert.state_dict(), bert.config, config)
    except ValueError as error:
        raise ValueError(f"{source} {error}") from error
    fresh = QFORMER_FRESH if config.name == "qformer" else ()
    return start_from(connector.body, foreign.state, foreign.rules, source, fresh, foreign.dropped)
