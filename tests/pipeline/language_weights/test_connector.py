"""A Q-Former begins with a BERT's layers: those of its queries, and in its first stage those of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.build import build_objective
from model.config import ConnectorConfig, ModelConfig, QFormerStage1Options, VisionConfig
from model.torchvision_shim import ensure_torchvision
from pipeline.distributed.ranks import Agreement
from pipeline.weights.starting import load_starting_weights
from tests.model.test_qformer_stage1 import VOCABULARY, images_of, rows_of
from tests.pipeline.weights.test_starting_weights import ALONE
from tests.rounding import rounding

ensure_torchvision()


@pytest.mark.slow
def test_a_text_alone_has_the_states_of_bert(tmp_path: Path) -> None:
    """Of its layers, on the embeddings that are ours; a fourth layer is left out."""
    import transformers

    sizes = dict(vocab_size=30, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=4)
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=40)).eval()
    bert.save_pretrained(tmp_path / "bert")
    vision = VisionConfig(None, image_size=16, patch_size=8, width=16, layers=2, head_width=8)
    connector = ConnectorConfig("qformer", str(tmp_path / "bert"), 3, width=16, heads=2, ffn_width=32, layers=3)
    config = ModelConfig(vision=vision, connector=connector)
    objective = build_objective(config, QFormerStage1Options(), VOCABULARY, 30).eval()
    started = load_starting_weights(objective, config, None, ALONE, Agreement())
    assert set(started) == {"vision", "connector"}
    fresh = started["connector"]["names"]["fresh"]
    assert all(name == "queries" or ".cross_" in name for name in fresh) and len(fresh) > 1

    rows = rows_of([5, 6, 7], [8])
    with torch.no_grad():
        found = objective.net(objective.planner(images_of(2), rows)).first
        for row, state in zip(rows, found, strict=True):
            states, _ = objective.net.text(torch.tensor([row.token_ids]))
            for layer in list(bert.encoder.layer)[:3]:
                states = layer(states)
                states = states if isinstance(states, torch.Tensor) else states[0]
            torch.testing.assert_close(state, states[0, 0], rtol=0, atol=rounding(*[16 * 4 + 32 + 8] * 3))
