"""Vision transformer of CLIP and of EVA-CLIP that returns all tokens (specification section 2.1).

Legend: B images, P = 1 + grid**2 tokens, W width.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import merge_heads, split_heads
from model.config import VisionConfig
from model.recomputing import run
from model.torchvision_shim import ensure_torchvision
from model.vision.temporal import TEMPORAL

# Channel statistics of CLIP's training images (specification section 6.2).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_EPS, EVA_EPS = 1e-5, 1e-6  # of LayerNorms
# EVA-CLIP's ViT-g/14 with 40 blocks, of which EVLGen leaves out the last (its specification, section 2.1).
EVA_VIT_G = {"patch_size": 14, "width": 1408, "layers": 40, "head_width": 88, "mlp_ratio": 4.3637, "quick_gelu": False}


class VisionTower(nn.Module):
    """uint8 pixels -> tokens after ``ln_post``; the last block is left out when ``drop_last_block``.

    EVA-CLIP's ViT (layout eva) is the same without norms before and behind the blocks; its keys have no bias, which
    is a bias of 0 here.
    """

    recompute = False

    def __init__(self, config: VisionConfig) -> None:
        """``config`` must have its sizes resolved (:func:`resolve_sizes`)."""
        super().__init__()
        if config.image_size % config.patch_size:
            raise ValueError(
                f"model.vision.image_size {config.image_size} is not a multiple of the patch size {config.patch_size};"
                f" choose {config.image_size // config.patch_size * config.patch_size or config.patch_size}"
            )
        if config.width % config.head_width:
            raise ValueError(
                f"model.vision.width {config.width} is not a multiple of head_width {config.head_width}; change either"
            )
        self.config = config
        self.grid = config.image_size // config.patch_size
        width, num_blocks = config.width, config.layers - int(config.drop_last_block)
        is_clip = config.layout == "clip"
        self.patch_embedding = PatchEmbedding(3, width, config.patch_size, config.patch_size, bias=not is_clip)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(1 + self.grid**2, width))
        self.ln_pre = nn.LayerNorm(width, eps=CLIP_EPS) if is_clip else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(num_blocks))
        self.ln_post = nn.LayerNorm(width, eps=CLIP_EPS) if is_clip else nn.Identity()
        statistics = torch.tensor([IMAGE_MEAN, IMAGE_STD], dtype=torch.float64) * 255
        self.register_buffer("statistics", in_millionths(statistics).view(2, 3, 1), persistent=False)
        self.width, self.num_tokens = width, 1 + self.grid**2
        self.reset_parameters()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass of one image: of its matrix products (model/flops.py)."""
        width, num_tokens = self.width, self.num_tokens
        linear = num_tokens * (4 * width**2 + 2 * width * int(width * self.config.mlp_ratio))
        attention = 2 * num_tokens**2 * width
        embedding = (num_tokens - 1) * 3 * self.config.patch_size**2 * width
        frames = sum(num_tokens * block.temporal.macs for block in self.blocks if block.temporal is not None)
        return embedding + len(self.blocks) * (linear + attention) + frames

    def reset_parameters(self) -> None:
        """Random initialisation with the standard deviations of CLIP (Radford et al. 2021, released model code)."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.class_embedding, std=width**-0.5)
        nn.init.normal_(self.position_embedding, std=width**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.out.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.up.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.down.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            for linear in (block.qkv, block.out, block.up, block.down):
                nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor, num_frames: int = 1) -> Tensor:
        """uint8 [B, 3, S, S] (or floats already normalised) -> [B, P, W]; normalisation happens here, on the device.

        Each ``num_frames`` images one after another are the frames of a video.
        """
        pixels = self.patch_embedding.cut(images)
        if pixels.dtype == torch.uint8:
            mean, std = (self.statistics.float() / 1e6).unbind(0)
            pixels = (pixels.float() - mean) / std
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        tokens = self.ln_pre(torch.cat([first, patches], dim=1) + self.position_embedding)
        for block in self.blocks:
            tokens = run(block, tokens, num_frames, recompute=self.recompute and self.training)
        return self.ln_post(tokens)


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap, run as the one matrix product that it is; weight [W, 3, p, p]."""

    def cut(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] of any dtype -> the pixels of each patch [B, P-1, 3, p*p]."""
        side = self.kernel_size[0]
        grid = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 3, S/p, p, S/p, p]
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, P-1, 3, p*p] -> [B, P-1, W]."""
        return F.linear(pixels.flatten(2), self.weight.flatten(1), self.bias)


class VisionBlock(nn.Module):
    """Pre-LN transformer block; ``temporal`` lets the frames of a video tell each other what they show."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.num_heads, self.quick_gelu = width // config.head_width, config.quick_gelu
        eps = CLIP_EPS if config.layout == "clip" else EVA_EPS
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.temporal = None if config.temporal is None else TEMPORAL[config.temporal](width)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, num_frames: int = 1) -> Tensor:
        """[B, P, W] -> [B, P, W]."""
        query, key, value = split_heads(self.qkv(self.ln_1(tokens)), self.num_heads, 3)
        tokens = tokens + self.out(merge_heads(F.scaled_dot_product_attention(query, key, value)))
        if self.temporal is not None:
            tokens = self.temporal(tokens, num_frames)
        hidden = self.up(self.ln_2(tokens))
        # x * sigmoid(1.702 x), by an operation that keeps one tensor for backward instead of two
        hidden = F.silu(1.702 * hidden) / 1.702 if self.quick_gelu else F.gelu(hidden)
        return tokens + self.down(hidden)


def in_millionths(values: Tensor) -> Tensor:
    """As int64: casting a module to bf16 rounds its float buffers to 8 bits, integers it leaves."""
    return (values.double() * 1e6).round().long()


def resolve_sizes(config: VisionConfig) -> VisionConfig:
    """Fills the sizes from the architecture named in ``config.name`` (of open_clip, or eva-vit-g), if it names one.

    Raises:
        ValueError: the name is unknown to open_clip, or is not a plain ViT.
    """
    if config.name is None:
        return config
    if config.name == "eva-vit-g":
        return dataclasses.replace(config, layout="eva", **EVA_VIT_G)
    ensure_torchvision()
    import open_clip

    architecture = open_clip.get_model_config(config.name)
    if architecture is None:
        raise ValueError(
            f"model.vision.name {config.name!r} is not an open_clip architecture"
            f"{near(config.name, open_clip.list_models())}; timm/NAME and hf/NAME are models of other libraries, null"
            " takes the sizes given"
        )
    vision = architecture["vision_cfg"]
    layers, patch_size = vision.get("layers"), vision.get("patch_size")
    unsupported = {
        key: value
        for key, value in vision.items()
        if key not in ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio") and value
    }
    if not isinstance(layers, int) or patch_size is None or unsupported:
        raise ValueError(
            f"model.vision.name {config.name!r} is not a plain CLIP ViT (found {unsupported or vision}); use ViT-B-32,"
            f" ViT-B-16, ViT-L-14 or their variants, or open_clip/{config.name}"
        )
    return dataclasses.replace(
        config,
        patch_size=patch_size,
        width=vision.get("width", 768),
        layers=layers,
        head_width=vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        quick_gelu=bool(architecture.get("quick_gelu", False)),
    )


def near(name: str, names: Iterable[str]) -> str:
    """The names most like ``name`` as the end of an error message; empty if none is."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Bicubic resize of a position table [1 + g*g, W] to [1 + grid*grid, W]; the class row is kept.

    align_corners=False, no antialiasing (specification section 2.1).
    """
    source = round((table.shape[0] - 1) ** 0.5)
    if source * source + 1 != table.shape[0]:
        raise ValueError(
            f"position table has {table.shape[0]} rows, expected 1 + a square; is this a ViT with a class token?"
        )
    if source == grid:
        return table
    square = table[1:].float().T.reshape(1, -1, source, source)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], resized.flatten(2)[0].T.to(table.dtype)])
