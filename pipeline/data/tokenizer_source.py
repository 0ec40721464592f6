"""Which tokenizer a run's texts are read by."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.options import Config, ConfigError, reads_by_language_model, weighted_paths


def tokenizer_source(config: Config) -> str | Path:
    """``data.tokenizer``, or the language model's own (evlgen), or the folder ``tokenizer`` at the first data path."""
    if config.data.tokenizer:
        return config.data.tokenizer
    if reads_by_language_model(config):
        if config.model.language.name is None:
            raise ConfigError(
                "objective.name evlgen needs a language model, found model.language.name null; name its folder:"
                " --model.language.name FOLDER"
            )
        return config.model.language.name
    first = weighted_paths(config.data)[0][0]
    for folder in (first, first.resolve().parent, first.resolve().parent.parent):
        if (folder / "tokenizer").is_dir():
            return folder / "tokenizer"
    raise ConfigError(
        f"{first / 'tokenizer'}: no such folder; run `python -m data_prep tokenizer --data {first} "
        f"--output {first}/tokenizer`, or name a Hugging Face "
        "tokenizer by --data.tokenizer roberta-base"
    )
