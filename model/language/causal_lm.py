"""Language models of transformers that read image tokens before text: which one, how it is built, what it is asked.

Legend: R rows, L length of a sequence, D width, M states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.language import attention
from model.language.lora import adapter_macs
from model.recomputing import run
from model.torchvision_shim import ensure_torchvision

# What some models do to logits behind their last layer, by the setting that says so.
_CHANGES_LOGITS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def language_settings(name: str) -> Any:
    """The configuration of the language model in a folder, or of that name on the Hugging Face hub.

    Raises:
        ValueError: there is none, or the model is not one that predicts the next token by its last layer alone.
    """
    ensure_torchvision()
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # settings of others make transformers raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        where = (
            "no folder, nor to be had from the hub" if not Path(name).is_dir() else "its config.json is not readable"
        )
        raise ValueError(f"model.language.name {name}: {where} ({reason}); give a folder of a causal LM") from error
    settings = getattr(settings, "text_config", settings)
    if type(settings) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model.language.name {name} is of type {settings.model_type}, which transformers has no causal LM of;"
            " name an OPT, Llama, Qwen or the like"
        )
    changed = [
        key for key, neutral in _CHANGES_LOGITS.items() if getattr(settings, key, neutral) not in (neutral, None)
    ]
    if changed:
        raise ValueError(f"model.language.name {name}: its logits are changed by {changed[0]}, which is not known here")
    return settings


class LanguageModel(nn.Module):
    """A causal LM, reached by its three parts: embeddings of tokens, states of a sequence, logits of states.

    ``llm`` is a module of transformers, whose names its weights keep.
    """

    def __init__(self, settings: Any) -> None:
        """``settings``: of transformers; random weights."""
        super().__init__()
        ensure_torchvision()
        import transformers

        self.llm = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.get_default_dtype())
        attention.use_it(self.llm)
        self.width = self.llm.get_input_embeddings().embedding_dim
        self.num_tokens = self.llm.get_input_embeddings().num_embeddings
        self.max_length = getattr(settings, "max_position_embeddings", None)  # None: as long as you like
        self.adapted: list[str] = []  # linear layers of the body that have an adapter (model/language/lora.py)

    def macs(self, num_rows: int, length: int) -> int:
        """Multiply-accumulates of the states of so many sequences of this length: of its matrix products."""
        settings = self.llm.config
        inside = set(self.llm.base_model.modules()) - {self.llm.get_input_embeddings()}
        linear = sum(one.weight.numel() for one in inside if isinstance(one, nn.Linear))
        attention = 2 * length * settings.num_hidden_layers * settings.hidden_size
        return num_rows * length * (linear + attention)

    def adapter_macs(self, num_rows: int, length: int) -> int:
        """Of these, those of adapters, whose weights are trained."""
        return num_rows * length * adapter_macs(self.llm)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        return self.llm.get_input_embeddings()(ids)

    def states(
        self, inputs: Tensor, kept: Any = None, added: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        """Embeddings [R, L, D] -> states [R, L, D], each of which sees those before it.

        Keys and values of earlier ones are ``kept`` (``new_memory``), if given. ``added`` to the scores, [R, 1, L, L],
        with the ``places`` of the tokens, int64 [R, L]: where some of those before are not to be seen.
        """
        found = self.llm.base_model(
            inputs_embeds=inputs,
            attention_mask=added,
            position_ids=places,
            past_key_values=kept,
            use_cache=kept is not None,
        )
        return found.last_hidden_state

    def new_memory(self) -> Any:
        """Where ``states`` keeps keys and values: transformers' cache, whose rows ``reorder_cache`` selects."""
        import transformers

        return transformers.DynamicCache(config=self.llm.config)

    def recompute_layers(self) -> None:
        """From now on a layer keeps its inputs only for backward and runs again there (:mod:`model.recomputing`).

        transformers' own switch works in training mode, which a frozen model is never in.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in self.llm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(_again, layer.forward)

    def logits(self, states: Tensor) -> Tensor:
        """[M, D] -> [M, V]."""
        return self.llm.get_output_embeddings()(states)


def _again(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return run(partial(forward, **options), *inputs, recompute=True)
