"""A language model in a GGUF file as a folder of transformers, which trains and reads nothing but plain tensors."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.torchvision_shim import ensure_torchvision
from model.weights.start import named_tensors
from pipeline.config.options import ConfigError

NEEDED = {"gguf": "gguf==0.19.0", "accelerate": "accelerate==1.15.0"}  # by transformers' own reader
MAGIC = b"GGUF"


def import_gguf(file: Path, folder: Path) -> None:
    """Make ``folder`` of ``file``: config.json, model.safetensors (fp16, out of whatever quantization), the tokenizer.

    Raises:
        ValueError: the packages that read it are missing, it is no such file or of no causal LM that transformers has;
            nothing is left.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another name or remove it")
    with open(file, "rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{file} is no GGUF file; expected one that begins with {MAGIC.decode()}")
    missing = [wanted for name, wanted in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{file}: reading GGUF needs packages that are not here; run: pip install {' '.join(missing)}")
    ensure_torchvision()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # settings of others make it raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file}: transformers can't read it ({reason}); give another file, or a folder") from error
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings = {n: v for n, v in model.config.to_dict().items() if n != "quantization_config" and not n.startswith("_")}
    (partial / "config.json").write_text(json.dumps(settings | {"dtype": "float16"}, indent=1) + "\n")
    tensors = {name: value.detach().half().contiguous() for name, value in named_tensors(model)}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(partial)
    os.rename(partial, folder)
    size = sum(value.numel() for value in tensors.values())
    print(f"{file}: {settings['model_type']}, {size / 1e6:,.1f} M weights, {len(tokenizer)} tokens in {folder}")
