"""Attention of language models in bf16 on a CPU, against double precision and against PyTorch's fused kernel."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from model.cpu import door
from model.language import attention
from model.language.causal_lm import LanguageModel

ROUNDING = 2.0**-8  # of bf16: two numbers beside each other differ by up to so much of their size


def inputs(heads: int, kept_heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * keys)
    query, key, value = (
        torch.randn(3, number, length, 8, generator=generator).bfloat16().requires_grad_()
        for number, length in ((heads, queries), (kept_heads, keys), (kept_heads, keys))
    )
    hidden = torch.rand(3, 1, queries, keys, generator=generator) < 0.4
    hidden[..., 0] = False
    return query, key, value, torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.bfloat16).min).bfloat16()


def exact(query: Tensor, key: Tensor, value: Tensor, added: Tensor, scale: float) -> Tensor:
    """In double precision, head by head."""
    each = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // each].transpose(-1, -2) * scale + added[:, 0]
        heads.append(scores.softmax(-1) @ value[:, head // each])
    return torch.stack(heads, 1)


@pytest.mark.parametrize(("heads", "kept_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("queries", [7, 1])
def test_it_is_attention(heads: int, kept_heads: int, queries: int) -> None:
    """Values and gradients: what is rounded are weights of at most 1 in sum, the result, and gradients of this size."""
    given = inputs(heads, kept_heads, queries, 7)
    doubles = [one.detach().double().requires_grad_() for one in given[:3]]
    found = door.half_attention(*given, 0.3)
    expected = exact(*doubles, given[3].double(), 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=ROUNDING, atol=ROUNDING * given[2].abs().max().item())
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found.backward(slope)
    expected.backward(slope.double())
    for one, other in zip(given[:3], doubles):
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=ROUNDING, atol=4 * ROUNDING * largest)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of each time that our own attention ran."""
    found: list[torch.dtype] = []

    def half_attention(*given: object) -> Tensor:
        found.append(given[0].dtype)
        return original(*given)

    original = door.half_attention
    monkeypatch.setattr(door, "half_attention", half_attention)
    return found


def language_model(kind: str, **options: float) -> LanguageModel:
    torch.manual_seed(3)
    sizes = dict(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    if kind == "opt":
        settings = transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes, **options)
    else:
        settings = transformers.LlamaConfig(intermediate_size=64, num_key_value_heads=2, **sizes, **options)
    return LanguageModel(settings).eval()


def states(language: LanguageModel, dtype: torch.dtype) -> Tensor:
    length = 9
    embeddings = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    added = torch.zeros(2, 1, length, length, dtype=dtype)
    added.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), torch.finfo(dtype).min)
    return language.states(embeddings, added=added, places=torch.arange(length).expand(2, -1))


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_language_model_runs_it_in_bf16_alone(kind: str, used: list[torch.dtype]) -> None:
    language = language_model(kind)
    assert language.llm.config._attn_implementation == attention.NAME
    expected = states(language, torch.float32)
    assert used == []
    found = states(language.to(torch.bfloat16), torch.bfloat16)
    assert used == [torch.bfloat16] * 2, "once in each layer"
    with door.shut():
        fused = states(language, torch.bfloat16)
    assert len(used) == 2
    error, other = ((one.float() - expected).abs().mean().item() for one in (found, fused))
    assert error < 1.5 * other, "as near to fp32 as PyTorch's kernel"


def test_dropout_of_the_weights_is_left_to_pytorch(used: list[torch.dtype]) -> None:
    language = language_model("opt", attention_dropout=0.5).to(torch.bfloat16).train()
    states(language, torch.bfloat16)
    assert used == []


def test_what_pytorchs_attention_refuses_is_refused(used: list[torch.dtype]) -> None:
    query, key, value, added = inputs(4, 4, 7, 7)
    with pytest.raises(ValueError, match="softcap"):
        attention.attention(torch.nn.Module(), query, key, value, added, softcap=30.0)
    assert used == []
