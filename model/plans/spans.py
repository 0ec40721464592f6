"""Hidden spans of reconstruction targets: their sizes and places, drawn from the row's own generator.

Legend: n a row's length, k = n-2 its words.
"""

from __future__ import annotations

import numpy as np


def uniform_spans(length: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Hidden spans (lo, hi) of the word targets 1..n-2, placed uniformly inside the caption.

    A span's size is 1 + Binomial(k-1, p) with p such that its mean is max(rate*k, 1); its place is uniform among those
    that contain the target and stay within the words, so the hidden share equals ``rate`` at every position.

    # NOTE release: spans are centred and lose what sticks out beyond the end; here they move inside, so that targets at
    the ends are corrupted as much as those in the middle.

    Returns:
        int64 [k, 2].
    """
    num_words = length - 2
    target = np.arange(1, length - 1)
    size = _span_sizes(num_words, rate, generator)
    first = np.maximum(1, target - size + 1)
    last = np.minimum(target, num_words - size + 1)
    lo = first + np.floor(generator.random(num_words) * (last - first + 1)).astype(np.int64)
    return np.stack([lo, lo + size - 1], axis=1)


def centred_word_spans(length: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Hidden spans of the word targets 1..n-2, of the sizes of :func:`uniform_spans` but centred on their target.

    Left and right differ by at most one; what would stick out at an end of the words moves inside.

    Returns:
        int64 [k, 2].
    """
    num_words = length - 2
    target = np.arange(1, length - 1)
    size = _span_sizes(num_words, rate, generator)
    left = (size - 1) // 2 + (size - 1) % 2 * generator.integers(0, 2, num_words)
    lo = np.clip(target - left, 1, num_words - size + 1)
    return np.stack([lo, lo + size - 1], axis=1)


def _span_sizes(num_words: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """1 + Binomial(k-1, p) for each word, its mean max(rate*k, 1)."""
    if num_words < 2 or rate * num_words <= 1:
        return np.ones(num_words, dtype=np.int64)
    probability = min((rate * num_words - 1) / (num_words - 1), 1.0)
    return 1 + generator.binomial(num_words - 1, probability, num_words)


def centred_spans(length: int, max_length: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Hidden spans of the targets 1..n-1 as the release draws them (specification section 3.1).

    Returns:
        int64 [n-1, 2].
    """
    target = np.arange(1, length)
    if rate <= 0:
        return np.stack([target, target], axis=1)
    candidates = length - 1
    probability = max(0.0, (rate * candidates - 1) / (candidates - 1 + 1e-5))
    extra = generator.binomial(candidates - 1, min(probability, 1.0), candidates)
    left = extra // 2 + (extra % 2) * generator.integers(0, 2, candidates)
    lo = np.maximum(target - left, 0)
    hi = np.minimum(lo + extra, max_length - 1)
    # Own position is hidden in both halves whatever the clipping did.
    return np.stack([np.minimum(lo, target), np.maximum(hi, target)], axis=1)
