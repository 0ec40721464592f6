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
from model.merge.schedule import clamped_merges, merges_to_budget, sloped_merges, tokens_after
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
                f" into one; expected {self._fewer_merges()}"
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
        if num_tokens is None and config.merges_per_layer is not None:
            return self._merges_by(config.merges_per_layer)
        try:
            return merges_to_budget(
                self.num_image_tokens, config.layers, num_tokens or config.num_tokens, self.has_class_token
            )
        except ValueError as error:
            raise ValueError(f"model.connector.num_tokens: {error}") from None

    def _merges_by(self, per_layer: int | Sequence[int]) -> Sequence[int]:
        """The merges of each layer where options ask for so many."""
        if isinstance(per_layer, int):
            per_layer = sloped_merges(self.config.layers, per_layer, self.config.merges_slope)
        return clamped_merges(self.num_image_tokens, per_layer, self.has_class_token)

    def _fewer_merges(self) -> str:
        """What ``merges_per_layer`` may be for more than one token to remain, and the class token."""
        if not isinstance(self.config.merges_per_layer, int):
            return "smaller numbers"
        left = lambda number: self.num_image_tokens - sum(self._merges_by(number))  # noqa: E731
        return f"at most {max(n for n in range(self.num_image_tokens) if n == 0 or left(n) > 1 + self.has_class_token)}"


def _regroup(config: ConnectorConfig, grid: Grid | None) -> Pooling | PixelShuffle | TokenMerging | None:
    if config.name == "tome":
        return TokenMerging(config.merging == "weighted")
    on_grid = {"pooling": Pooling, "pixel_shuffle": PixelShuffle}.get(config.name)
    return None if on_grid is None else on_grid(grid, config.num_tokens)


def _check(config: ConnectorConfig, num_tokens: int, grid: Grid | None) -> None:
    """Raises ValueError for what does not fit, by the first reason."""
    merges, on_grid = config.name in MERGING, config.name in ("pooling", "pixel_shuffle")
    own = [name for name in ("merges_per_layer", "fewest_tokens") if getattr(config, name) is not None]
    fewest, most = config.fewest_tokens or 1, config.max_positions
    per_layer = config.merges_per_layer
    of_each = per_layer if isinstance(per_layer, list) else [per_layer or 0] * config.layers
    refusals = [
        (config.width % config.heads, f"width {config.width} is not a multiple of heads {config.heads}; change either"),
        (config.num_tokens < 1, f"num_tokens is {config.num_tokens}, expected 1 or more"),
        (own and not merges, f"{''.join(own[:1])} is of tomeformer and tome; leave it null with {config.name}"),
        (min(of_each, default=0) < 0, f"merges_per_layer is {per_layer}, expected 0 or more"),
        (
            len(of_each) != config.layers,
            f"merges_per_layer is {per_layer}, expected a number for each of {config.layers} layers",
        ),
        (not -1 <= config.merges_slope <= 1, f"merges_slope is {config.merges_slope}, expected -1 to 1"),
        (
            config.merges_slope and not isinstance(per_layer, int),
            f"merges_slope {config.merges_slope} needs one number in merges_per_layer; found {per_layer}",
        ),
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
