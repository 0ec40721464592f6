"""Which tokenizer a run's texts are read by."""

from __future__ import annotations

from pathlib import Path

from data_prep.stores.address import Address, data_path
from data_prep.stores.local_copies import fetch_small_files
from pipeline.config.options import Config, ConfigError, reads_by_language_model, weighted_paths

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "vocab.txt", "config.json")


def tokenizer_source(config: Config) -> str | Path:
    """``data.tokenizer``, or the language model's own (evlgen), or the folder ``tokenizer`` at the first data path."""
    if config.data.tokenizer:
        named = config.data.tokenizer
        return named if "://" not in named else _on_this_node(data_path(named))
    if reads_by_language_model(config):
        if config.model.language.name is None:
            raise ConfigError(
                "objective.name evlgen needs a language model, found model.language.name null; name its folder:"
                " --model.language.name FOLDER"
            )
        return config.model.language.name
    first = weighted_paths(config.data)[0][0]
    for folder in (first, first.resolve().parent, first.resolve().parent.parent):
        tokenizer = folder / "tokenizer"
        if isinstance(tokenizer, Address):
            if (tokenizer / "tokenizer.json").is_file():
                return _on_this_node(tokenizer)
        elif tokenizer.is_dir():
            return tokenizer
    raise ConfigError(
        f"{first / 'tokenizer'}: no such folder; run `python -m data_prep tokenizer --data {first} "
        f"--output {first}/tokenizer`, or name a Hugging Face "
        "tokenizer by --data.tokenizer roberta-base"
    )


def _on_this_node(tokenizer: Path | Address) -> Path:
    return fetch_small_files(tokenizer, TOKENIZER_FILES) if isinstance(tokenizer, Address) else tokenizer
