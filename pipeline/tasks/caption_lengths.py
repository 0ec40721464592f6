"""Caption lengths to try with a model that must know them before it writes: quantiles of its training data."""

from __future__ import annotations

import numpy as np

from data_prep.manifest import find_manifests
from pipeline.config.options import Config, weighted_paths
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
MAX_CAPTIONS = 2000


def training_lengths(config: Config, tokenizer: TextTokenizer, full_stop: bool) -> list[int]:
    """Distinct quantiles of the number of words (tokens without `<s>` and `</s>`) of a run's training captions.

    Up to ``MAX_CAPTIONS`` captions, evenly spaced over all corpora, prepared as in training: ``full_stop`` is the
    planner's.

    Raises:
        ValueError: the training data is not there any more, or holds no caption.
    """
    split = config.data.train_split  # files are opened as captions are read, not looked at all before
    found = [one for path, _ in weighted_paths(config.data) for one in find_manifests(path, split)]
    corpora = [Corpus(*one) for one in found]
    longest = config.data.max_text_length
    texts = (clean_caption(text, full_stop) for corpus in corpora for text in _captions(corpus, len(corpora)))
    counts = [len(tokenizer.encode(text, longest)) - 2 for text in texts if text]
    if not counts:
        raise ValueError(f"{', '.join(config.data.paths)}: no usable caption in the split {config.data.train_split}")
    return np.unique(np.quantile(counts, QUANTILES, method="nearest")).tolist()


def _captions(corpus: Corpus, num_corpora: int) -> list[str]:
    """This corpus's part of the captions, what cannot be read left out."""
    count = min(len(corpus), -(-MAX_CAPTIONS // num_corpora))
    texts = []
    for number in range(count):
        try:
            texts.append(corpus.read_text(number * len(corpus) // count))
        except UnusableSample:
            continue
    return texts
