"""Random frozen parts for tiny recipes, as files: the image encoder of a CLIP, a language model with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from model.torchvision_shim import ensure_torchvision

BLOCKS = 2


def write_clip(path: Path, width: int = 32, seed: int = 0) -> Path:
    """The image encoder of a random CLIP of flm_tiny's sizes, as open_clip names its tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv1.weight": (width, 3, 8, 8), "class_embedding": (width,), "positional_embedding": (17, width)}
    shapes |= {f"{name}.{kind}": (width,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    for block in range(BLOCKS):
        for name, (rows, columns) in {
            "attn.in_proj_": (3 * width, width),
            "attn.out_proj.": (width, width),
            "mlp.c_fc.": (4 * width, width),
            "mlp.c_proj.": (width, 4 * width),
        }.items():
            shapes |= {f"transformer.resblocks.{block}.{name}weight": (rows, columns)}
            shapes |= {f"transformer.resblocks.{block}.{name}bias": (rows,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"transformer.resblocks.{block}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    state = {f"visual.{name}": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    save_file(state, path)
    return path


def write_language_model(folder: Path, kind: str = "llama", seed: int = 0, width: int = 32) -> Path:
    """A random language model of some words with its own tokenizer, which has a line break and no mask, no pad."""
    ensure_torchvision()
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", *alphabet]
    engine = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(words), hidden_size=width, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if kind == "opt":
        settings = transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=width, **sizes)
    else:
        settings = transformers.LlamaConfig(intermediate_size=64, tie_word_embeddings=True, **sizes)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder
