"""The tokenizer of an exported model, as transformers saves one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model.torchvision_shim import ensure_torchvision
from pipeline.config.options import ConfigError, reads_by_language_model
from pipeline.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pipeline.exporting.source import Source


def write_tokenizer(source: Source, folder: Path) -> None:
    """tokenizer.json and what goes with it; raises ConfigError where it would read texts otherwise than the run's."""
    ensure_torchvision()
    from transformers import AutoTokenizer

    place = source.tokenizer_folder
    local = Path(place).is_dir()
    AutoTokenizer.from_pretrained(place, local_files_only=local, trust_remote_code=False).save_pretrained(folder)
    if load_tokenizer(folder, reads_by_language_model(source.config)).fingerprint != source.tokenizer.fingerprint:
        raise ConfigError(f"the tokenizer {place} reads other tokens once transformers has saved it; use a newer one")
