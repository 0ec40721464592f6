"""LoRA beside a frozen language model: peft's numbers, what is adapted, what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model.config import LanguageConfig
from model.frozen import freeze, frozen_tensors
from model.language.causal_lm import LanguageModel
from model.language.lora import adapters_of, add_adapters, check_lora, train_adapters
from model.torchvision_shim import ensure_torchvision
from tests.rounding import DOUBLE

ensure_torchvision()
SIZES = dict(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)


def language_of(kind: str) -> LanguageModel:
    import transformers

    torch.manual_seed(0)
    if kind == "opt":
        return LanguageModel(transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SIZES))
    settings = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
    return LanguageModel(settings(intermediate_size=64, num_key_value_heads=2, **SIZES))


def adapted(kind: str, **options: Any) -> LanguageModel:
    """In double, frozen but for its adapters."""
    language = language_of(kind).double()
    config = LanguageConfig(name="LLM", **dict(lora_rank=4) | options)
    language.adapted = add_adapters(language.llm.base_model, config)
    freeze(language, "random")
    train_adapters(language)
    return language.double()


@pytest.mark.parametrize("kind", ["opt", "llama", "qwen2"])
def test_equal_to_peft(kind: str) -> None:
    """States and gradients of all adapters, with weights that are no longer those of the beginning."""
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements.txt)")
    modules = ["q_proj", "v_proj", "fc1"] if kind == "opt" else ["q_proj", "v_proj", "down_proj"]
    mine = adapted(kind, lora_alpha=12.0, lora_modules=modules)
    body = language_of(kind).double().llm.base_model
    inside = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=12, target_modules=modules), body)
    inside.double().eval()
    theirs = {name: p for name, p in inside.named_parameters() if "lora_" in name}
    own = {name: p for name, p in mine.llm.base_model.named_parameters() if p.requires_grad}
    pairs = [(own[name], theirs[_peft_name(name)]) for name in own]
    assert len(pairs) == len(theirs) == 2 * 2 * 3
    with torch.no_grad():
        for one, other in pairs:
            other.copy_(one.normal_())
    inputs = torch.randn(2, 7, 32, dtype=torch.float64)
    found = mine.eval().states(inputs)
    expected = inside(inputs_embeds=inputs, attention_mask=None, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=DOUBLE)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=DOUBLE, atol=DOUBLE)


def _peft_name(name: str) -> str:
    return name.replace("adapter.down", "lora_A.default").replace("adapter.up", "lora_B.default")


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_it_begins_as_the_model_and_names_stay(kind: str) -> None:
    """Nothing is added at first, to the bit; a frozen weight has the name that it has without adapters."""
    plain, with_adapters = language_of(kind).double().eval(), adapted(kind)
    inputs = torch.randn(2, 7, 32, dtype=torch.float64)
    assert torch.equal(plain.states(inputs), with_adapters.states(inputs))
    assert sorted(frozen_tensors(with_adapters)) == sorted(name for name, _ in plain.named_parameters())
    assert with_adapters.adapted == [
        name
        for name, module in plain.llm.base_model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "v_proj"))
    ]
    assert len(with_adapters.adapted) == 4
    extra = with_adapters.macs(3, 5) - plain.macs(3, 5)
    by_hand = 3 * 5 * sum(4 * (m.in_features + m.out_features) for m in _linear(with_adapters))
    assert extra == by_hand == with_adapters.adapter_macs(3, 5) and plain.adapter_macs(3, 5) == 0


def _linear(language: LanguageModel) -> list[nn.Linear]:
    return [language.llm.base_model.get_submodule(name) for name in language.adapted]


def test_dropout_is_the_adapters_only_and_in_training_only() -> None:
    """The frozen model stays in evaluation mode, its adapters follow the mode of what is around it."""
    language = adapted("opt", lora_dropout=0.5)
    assert language.llm.config.dropout > 0
    for adapter in adapters_of(language):
        nn.init.normal_(adapter.up.weight)
    outer, inputs = nn.ModuleList([language]), torch.randn(2, 7, 32, dtype=torch.float64)
    outer.eval()
    still = language.states(inputs)
    outer.train()
    assert [name for name, m in language.named_modules() if m.training and ".adapter" not in name] == []
    assert all(adapter.training for adapter in adapters_of(language))
    first, second = language.states(inputs), language.states(inputs)
    assert not torch.equal(first, second)
    outer.eval()
    assert torch.equal(language.states(inputs), still)


def test_names_that_match_nothing_are_refused() -> None:
    """One wrong name among right ones too; a part of a name is no name."""
    for modules, wrong in ((["q_proj", "qproj"], "qproj"), (["proj"], "proj"), (["lm_head"], "lm_head")):
        with pytest.raises(ValueError, match=rf"no linear layer of .*LLM is called {wrong}; expected of k_proj"):
            adapted("opt", lora_modules=modules)
    assert adapted("llama", lora_modules=["self_attn.q_proj"]).adapted[0] == "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(lora_alpha=2.0), "lora_alpha has no effect with model.language.lora_rank 0"),
        (dict(lora_modules=["k_proj"]), "lora_modules has no effect with"),
        (dict(lora_rank=-1), "lora_rank is -1, expected 0 or more"),
        (dict(lora_rank=4, lora_dropout=1.0), "lora_dropout is 1.0, expected 0 to below 1"),
        (dict(lora_rank=4, lora_alpha=float("nan")), "lora_alpha is nan, expected a number above 0"),
        (dict(lora_rank=4, lora_modules=[]), "lora_modules is .., expected names of linear layers"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_lora(LanguageConfig(**options))
