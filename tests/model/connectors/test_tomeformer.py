"""TomeFormer: the release's numbers, BERT's where nothing is merged, and one answer whatever is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

from model.config import ConnectorConfig
from model.connectors.queries import QFormer
from model.connectors.tomeformer import TomeFormer
from model.merge.apply import membership
from model.merge.schedule import clamped_merges, merges_to_budget
from model.torchvision_shim import ensure_torchvision
from model.weights.connectors import QFORMER_FRESH, bert_of_connector
from model.weights.start import start_from
from tests.oracle import GRADIENT, assert_near, load_oracle
from tests.rounding import DOUBLE


def config_of(sizes: dict[str, Any], **options: Any) -> ConnectorConfig:
    """The options of a TomeFormer with the sizes of a BERT."""
    return ConnectorConfig(
        width=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        ffn_width=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        max_positions=sizes["max_position_embeddings"],
        dropout=sizes["hidden_dropout_prob"],
        **{"merging": "plain", **options},
    )


def load(body: nn.Module, state: dict[str, Tensor], sizes: dict[str, Any], config: ConnectorConfig) -> None:
    foreign = bert_of_connector(state, BertConfig(**sizes), config)
    start_from(body, foreign.state, foreign.rules, "BERT", QFORMER_FRESH, foreign.dropped)


@pytest.mark.parametrize("name", ["02_tomeformer_65tok_r8_6l.pt", "05_tomeformer_r0_bert_parity.pt"])
def test_equal_to_the_release(name: str) -> None:
    """Plans of every layer, what is left, and all gradients."""
    dump = load_oracle(name, "evlgen")
    config = config_of(dump["config"])
    model = TomeFormer(config)
    load(model, dump["state_dict"], dump["config"], config)
    inputs = dump["inputs_embeds"].clone().requires_grad_()
    merges = clamped_merges(inputs.shape[1], [dump["config"]["r"]] * config.layers)
    model.eval()
    found = model(inputs, merges)
    assert found.sizes is None
    assert_near(found.tokens, dump["last_hidden_state"])
    for plan, layer in zip(found.plans, dump["layers"], strict=True):
        if not layer["r_used"]:
            assert plan is None
            continue
        num_even = layer["unm_idx"].shape[1]
        assert torch.equal(plan.kept[:, :num_even], 2 * layer["unm_idx"])
        assert torch.equal(plan.merged, 2 * layer["src_idx"]) and torch.equal(plan.into, num_even + layer["dst_idx"])
    assert torch.equal(membership(found.plans, *inputs.shape[:2]), dump["final_assign"])
    (found.tokens * dump["probe_weight"]).sum().div(found.tokens.numel()).backward()
    assert_near(inputs.grad, dump["grad_inputs_embeds"], GRADIENT)
    gradients = TomeFormer(config)
    for parameter in gradients.parameters():
        nn.init.zeros_(parameter)
    load(gradients, dump["grad_params"], dump["config"], config)
    expected = dict(gradients.named_parameters())
    for parameter, gradient in ((name, parameter.grad) for name, parameter in model.named_parameters()):
        assert_near(gradient, expected[parameter], GRADIENT)


SIZES = dict(
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    num_hidden_layers=3,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    vocab_size=11,
)


def a_bert() -> nn.Module:
    ensure_torchvision()
    from transformers import BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()


def test_without_merges_it_is_bert() -> None:
    bert, config = a_bert().double(), config_of(SIZES)
    model = TomeFormer(config).eval().double()
    load(model, bert.state_dict(), SIZES, config)
    inputs = torch.randn(2, 21, 32, dtype=torch.float64)
    mine = model(inputs, [0, 0, 0])
    theirs = bert(inputs_embeds=inputs).last_hidden_state
    torch.testing.assert_close(mine.tokens, theirs, rtol=0, atol=DOUBLE)
    assert mine.plans == (None,) * 3


def test_sizes_of_one_change_nothing() -> None:
    """Weighted merging with nothing merged is the plain encoder: log 1 = 0 is added to every score."""
    config = config_of(SIZES, merging="weighted")
    weighted, plain = TomeFormer(config).eval().double(), TomeFormer(config_of(SIZES)).eval().double()
    plain.load_state_dict(weighted.state_dict())
    inputs = torch.randn(2, 21, 32, dtype=torch.float64)
    mine, theirs = weighted(inputs, [0, 0, 0]), plain(inputs, [0, 0, 0])
    torch.testing.assert_close(mine.tokens, theirs.tokens, rtol=0, atol=DOUBLE)
    assert torch.equal(mine.sizes, torch.ones(2, 21))


def test_a_merged_token_counts_as_its_copies() -> None:
    """Attention to n equal tokens is attention to one of them that stands for n."""
    torch.manual_seed(0)
    attention = TomeFormer(config_of(SIZES, merging="weighted")).eval().double().layers[0].attention
    distinct, counts = torch.randn(1, 5, 32, dtype=torch.float64), torch.tensor([3, 1, 2, 4, 1])
    copies, _ = attention(distinct.repeat_interleave(counts, dim=1), None)
    merged, _ = attention(distinct, counts[None].double())
    first = torch.cat([torch.tensor([0]), counts.cumsum(0)[:-1]])
    torch.testing.assert_close(merged, copies[:, first], rtol=0, atol=DOUBLE)


@pytest.mark.parametrize("merging", ["plain", "weighted"])
def test_recomputing_gives_the_same_gradients(merging: str) -> None:
    config = config_of(SIZES, merging=merging)
    config.dropout = 0.1
    model = TomeFormer(config).train()
    inputs, merges = torch.randn(2, 21, 32), merges_to_budget(21, 3, 6)
    gradients = []
    for model.recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model(inputs, merges).tokens.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients))


def test_the_cost_is_that_of_the_paper() -> None:
    """Linear layers of the paper's connector: 11.877 GMAC with r = 19, 21.8 without (specification sections 8, 9)."""
    with torch.device("meta"):
        model = TomeFormer(ConnectorConfig())
    merges = clamped_merges(257, [19] * 12)
    lengths = [257 - 19 * layer for layer in range(12)]
    attention = sum(2 * length**2 * 768 for length in lengths)
    assert round((model.macs(257, merges) - attention) / 1e9, 3) == 11.877
    assert round((model.macs(257, [0] * 12) - 12 * 2 * 257**2 * 768) / 1e9, 1) == 21.8


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_act": "relu"}, "is of type bert with relu, expected bert with gelu"),
        ({"num_attention_heads": 2}, "has 2 attention heads, the connector 4; set --model.connector.heads 2"),
    ],
)
def test_another_bert_is_refused(change: dict[str, Any], error: str) -> None:
    config = config_of(SIZES)
    with pytest.raises(ValueError, match=error):
        bert_of_connector({}, BertConfig(**SIZES | change), config)


def test_a_qformer_takes_the_layers_of_bert() -> None:
    bert, config = a_bert(), config_of(SIZES, name="qformer")
    config.layers = 2  # the third is left out
    model = QFormer(config)
    load(model, bert.state_dict(), SIZES, config)
    theirs = bert.encoder.layer[1]
    assert torch.equal(model.layers[1].ffn.up.weight, theirs.intermediate.dense.weight)
    assert torch.equal(model.layers[1].attention.qkv.weight[32:64], theirs.attention.self.key.weight)
