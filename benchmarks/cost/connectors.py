"""What an image costs EVLGen at the paper's size with each connector, counted: no weights, no time, any machine.

    python -m benchmarks.cost.connectors [--words 16] [--tower-cached]

EVA-CLIP's ViT-g at 224 px, frozen (forward); a connector to OPT-2.7B, trained (forward and twice that backward);
OPT-2.7B, frozen (forward and the gradients of its inputs) behind an image with one caption. Matrix products only, of
which a multiply-accumulate is two operations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from model.config import ConnectorConfig, VisionConfig
from model.connectors.connector import Connector
from model.language.causal_lm import LanguageModel
from model.torchvision_shim import ensure_torchvision
from model.vision.tower import build_tower, grid_of

TOKENS = 29  # that the release leaves of 257
MLP = {"width": 2560, "heads": 20}  # between two linear layers, that of OPT-2.7B
CONNECTORS = {
    "tomeformer, as released (19 merges a layer)": {"merges_per_layer": 19, "merging": "plain"},
    "the same without merging": {"merges_per_layer": 0},
    "qformer": {"name": "qformer", "num_tokens": TOKENS},
    "perceiver, 6 layers": {"name": "perceiver", "num_tokens": TOKENS, "layers": 6},
    "tome": {"name": "tome", "num_tokens": TOKENS, "layers": 4, **MLP},
    "pooling": {"name": "pooling", "num_tokens": 32, **MLP},
}


class Cost(NamedTuple):
    """Of one image: ``tokens`` that OPT reads of it, trained ``parameters``, operations of a training step."""

    tokens: int
    parameters: int
    connector: int
    language: int
    tower: int

    @property
    def step(self) -> int:
        return self.connector + self.language + self.tower


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.connectors", description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=16, help="tokens of the caption (default: 16)")
    parser.add_argument("--tower-cached", action="store_true", help="features of the tower are read, not computed")
    arguments = parser.parse_args(argv)
    print("| connector | image tokens | trained, M | connector, GFLOP | language model | tower | step |")
    print("|---|---|---|---|---|---|---|")
    for name, one in costs(arguments.words, arguments.tower_cached).items():
        parts = (one.connector, one.language, one.tower, one.step)
        figures = " | ".join(f"{part / 1e9:,.0f}" for part in parts)
        print(f"| {name} | {one.tokens} | {one.parameters / 1e6:.1f} | {figures} |")
    return 0


def costs(num_words: int, tower_cached: bool = False) -> dict[str, Cost]:
    """Each connector's, by its name here."""
    ensure_torchvision()
    import transformers

    sizes = {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
    found = {}
    with torch.device("meta"):
        tower = build_tower(VisionConfig(name="eva-vit-g", image_size=224))
        language = LanguageModel(transformers.OPTConfig(word_embed_proj_dim=2560, vocab_size=50272, **sizes))
        for name, options in CONNECTORS.items():
            around = (tower.num_tokens, tower.width, grid_of(tower), language.width)
            connector = Connector(ConnectorConfig(**options), *around)
            read = language.macs(1, connector.num_tokens + num_words) + num_words * language.num_tokens * language.width
            found[name] = Cost(
                tokens=connector.num_tokens,
                parameters=sum(parameter.numel() for parameter in connector.parameters()),
                connector=6 * connector.macs(),
                language=4 * read,
                tower=0 if tower_cached else 2 * tower.macs,
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
