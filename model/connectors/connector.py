"""From the tokens of a vision tower to those that a language model reads: one module for all ways that are compared.

Legend: B images, P tokens of the tower, W their channels, Q tokens that are left, L width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.config import ConnectorConfig
from model.connectors.queries import Perceiver, QFormer
from model.connectors.regroup import PixelShuffle, Pooling
from model.connectors.tome import Merged, TokenMerging
from model.connectors.tomeformer import TomeFormer
from model.layers import initial_std
from model.merge.schedule import constant_merges, merges_to_budget, tokens_after
from model.vision.channel_norm import ChannelNorm
from model.vision.tower import Grid

MERGING = ("tomeformer", "tome")


class Connector(nn.Module):
    """Norm, regrouping of tokens (pooling, pixel_shuffle, tome), linear layer, body, linear layer.

    The body is an encoder that merges tokens, one of queries, or a GELU.
    """

    def __init__(
        self, config: ConnectorConfig, num_tokens: int, width: int, grid: Grid | None, language_width: int | None
    ) -> None:
        """
        Args:
            config: options.
            num_tokens: P.
            width: W.
            grid: where the tower's tokens stand, None where it is not known.
            language_width: L; None without a last linear layer, as no language model reads what is left (``trace``).

        Raises:
            ValueError: options that do not fit each other or the tower.
        """
        super().__init__()
        _check(config, num_tokens, grid)
        self.config, self.num_image_tokens = config, num_tokens
        self.has_class_token = grid is not None and grid.leading > 0
        self.norm = ChannelNorm(width)
        self.regroup = _regroup(config, grid)
        self.input = nn.Linear(width if self.regroup is None else self.regroup.width(width), config.width)
        bodies = {"tomeformer": TomeFormer, "qformer": QFormer, "perceiver": Perceiver}
        self.body = bodies[config.name](config) if config.name in bodies else nn.GELU()
        self.output = None if language_width is None else nn.Linear(config.width, language_width)
        self.merges = self._merges_to(None) if config.name in MERGING else ()
        self.num_tokens = tokens_after(num_tokens, self.merges)[-1] if self.merges else config.num_tokens
        if config.merges_per_layer and self.num_tokens <= 1 + self.has_class_token:
            raise ValueError(
                f"model.connector.merges_per_layer {config.merges_per_layer} merges all {num_tokens} tokens of an image"
                f" into one; expected at most {_most_merges_per_layer(config, num_tokens, self.has_class_token)}"
            )
        if config.fewest_tokens is not None:
            self._merges_to(config.fewest_tokens)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``initial_std`` for weights and tables, zeros for biases; a TomeFormer begins as merging alone."""
        std = initial_std(self.config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for name in ("token_type", "queries"):
            if hasattr(self.body, name):
                nn.init.normal_(getattr(self.body, name), std=std)
        if isinstance(self.body, TomeFormer):
            self.body.begin_as_merging()

    def forward(self, tokens: Tensor, num_tokens: int | None = None) -> Tensor:
        """[B, P, W] -> [B, Q, L]; where tokens are merged, any number of them is left that ``num_tokens`` asks for."""
        return self.output(self.trace(tokens, num_tokens).tokens)

    def trace(self, tokens: Tensor, num_tokens: int | None = None) -> Merged:
        """The same before the last linear layer, with what was merged."""
        tokens = self.norm(tokens)
        merges = self.merges if num_tokens is None else self._merges_to(num_tokens)
        if isinstance(self.body, TomeFormer):
            return self.body(self.input(tokens), merges, protect_first=self.has_class_token)
        if isinstance(self.regroup, TokenMerging):
            merged = self.regroup(tokens, merges, protect_first=self.has_class_token)
            return merged._replace(tokens=self.body(self.input(merged.tokens)))
        return Merged(self.body(self.input(tokens if self.regroup is None else self.regroup(tokens))), None, ())

    def macs(self, num_tokens: int | None = None) -> int:
        """Multiply-accumulates for one image (:mod:`model.flops`)."""
        num_in, num_out = self.num_image_tokens, num_tokens or self.num_tokens
        if isinstance(self.body, TomeFormer):
            inside = self.body.macs(num_in, self.merges if num_tokens is None else self._merges_to(num_tokens))
        else:
            num_in = num_out if self.regroup is not None else num_in
            inside = 0 if self.regroup is not None else self.body.macs(num_in)
        return num_in * self.input.weight.numel() + inside + num_out * self.output.weight.numel()

    def _merges_to(self, num_tokens: int | None) -> Sequence[int]:
        """The merges of each layer that leave ``num_tokens``, or as many as the options say."""
        config = self.config
        around = (self.num_image_tokens, config.layers)
        if num_tokens is None and config.merges_per_layer is not None:
            return constant_merges(*around, config.merges_per_layer, self.has_class_token)
        try:
            return merges_to_budget(*around, num_tokens or config.num_tokens, self.has_class_token)
        except ValueError as error:
            raise ValueError(f"model.connector.num_tokens: {error}") from None


def _regroup(config: ConnectorConfig, grid: Grid | None) -> Pooling | PixelShuffle | TokenMerging | None:
    if config.name == "tome":
        return TokenMerging(config.merging == "weighted")
    on_grid = {"pooling": Pooling, "pixel_shuffle": PixelShuffle}.get(config.name)
    return None if on_grid is None else on_grid(grid, config.num_tokens)


def _most_merges_per_layer(config: ConnectorConfig, num_tokens: int, protect_first: bool) -> int:
    """The largest number of merges that leaves more than one token, and the class token."""
    left = lambda number: tokens_after(num_tokens, constant_merges(num_tokens, config.layers, number, protect_first))  # noqa: E731
    return max((n for n in range(num_tokens) if left(n)[-1] > 1 + protect_first), default=0)


def _check(config: ConnectorConfig, num_tokens: int, grid: Grid | None) -> None:
    """Raises ValueError for what does not fit, by the first reason."""
    merges, on_grid = config.name in MERGING, config.name in ("pooling", "pixel_shuffle")
    own = [name for name in ("merges_per_layer", "fewest_tokens") if getattr(config, name) is not None]
    fewest, most = config.fewest_tokens or 1, config.max_positions
    refusals = [
        (config.width % config.heads, f"width {config.width} is not a multiple of heads {config.heads}; change either"),
        (config.num_tokens < 1, f"num_tokens is {config.num_tokens}, expected 1 or more"),
        (own and not merges, f"{''.join(own[:1])} is of tomeformer and tome; leave it null with {config.name}"),
        ((config.merges_per_layer or 0) < 0, f"merges_per_layer is {config.merges_per_layer}, expected 0 or more"),
        (len(own) == 2, "fewest_tokens has no effect beside merges_per_layer; set num_tokens instead of that"),
        (not 1 <= fewest <= config.num_tokens, f"fewest_tokens is {fewest}, expected 1 to num_tokens"),
        (
            config.name == "tomeformer" and num_tokens > most,
            f"max_positions {most} is less than the tower's {num_tokens} tokens; raise it",
        ),
        (on_grid and grid is None, f"name {config.name} needs a tower whose grid is known; use another one"),
    ]
    for applies, reason in refusals:
        if applies:
            raise ValueError(f"model.connector.{reason}")
