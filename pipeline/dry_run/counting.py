"""A run's objective without values, and the work of a micro-batch of it."""

from __future__ import annotations

import torch
from torch import nn

from model.config import Vocabulary
from pipeline.config.options import Config, ConfigError
from pipeline.data.tokenizer import tokenizer_of
from pipeline.finetuning.table import task_of
from pipeline.planning.activations import DeviceKind
from pipeline.planning.counts import Work, count_work, example_batch, text_lengths, texts_of

ROBERTA_TOKENS = 50_265  # roberta-base's vocabulary, the paper's
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def known_vocabulary(config: Config) -> tuple[Vocabulary, str]:
    """The vocabulary of the run's tokenizer, or of the paper's where nothing is prepared; and which, in words."""
    try:
        vocabulary = tokenizer_of(config).vocabulary
        return vocabulary, f"the tokenizer's {vocabulary.size:,} tokens"
    except ConfigError:  # nothing prepared yet
        vocabulary = Vocabulary(ROBERTA_TOKENS, bos_id=0, pad_id=1, eos_id=2, mask_id=ROBERTA_TOKENS - 1)
        return vocabulary, f"roberta-base's {vocabulary.size:,} tokens, as there is no tokenizer yet"


def valueless(config: Config, vocabulary: Vocabulary, precision: str) -> nn.Module:
    """The objective of a run on the meta device, in the precision it trains in.

    Raises:
        ValueError: options that do not fit each other, or a batch that cannot be known before.
    """
    if getattr(config.task, "self_critical", False):
        raise ConfigError(
            "task.self_critical true samples its captions while it trains, so that a step can't be counted before;"
            " plan --task.self_critical false, and expect longer steps"
        )
    with torch.device("meta"):
        objective = task_of(config).build(config, vocabulary)
    return objective.to(DTYPES[precision]).train()


def counted(
    objective: nn.Module,
    config: Config,
    samples: int,
    text_tokens: float,
    kind: DeviceKind = "cuda",
    large_bytes: int = 1 << 62,
) -> Work:
    """The work of a micro-batch of ``samples``, texts of ``text_tokens`` tokens on average; ``objective`` as of
    :func:`valueless`, the rest as of ``count_work``."""
    data, size = config.data, config.model.vision.image_size
    count = texts_of(objective, config.task, samples, data.texts_per_image)
    lengths = text_lengths(count, text_tokens, data.max_text_length)
    shape = data.frames or task_of(config).num_images, 3, size, size
    batch = example_batch(objective, config.task, shape, samples, lengths, data.texts_per_image)
    return count_work(objective, batch, kind, objective.net.recompute, large_bytes)
