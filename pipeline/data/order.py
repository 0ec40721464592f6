"""The sample order: which sample stands at a position, as a pure function of seed, epoch and corpus sizes, in O(1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

ORDER_VERSION = 1  # part of a run's fingerprint: raise it with any change that moves a sample
BLOCK_SIZE = 1024  # positions per block of a weighted mix; every block holds each corpus by its weight
_FEISTEL_ROUNDS = 8
_MASK_64 = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SampleRef(NamedTuple):
    """Which sample: corpus number, row of that corpus, and the epoch in which it is seen."""

    corpus: int
    index: int
    epoch: int


class SampleOrder:
    """An endless stream of samples over one or more corpora.

    Without ``weights`` the corpora are concatenated and an epoch holds each sample exactly once. With them, every block
    of 1024 positions holds each corpus in proportion to its weight (largest remainder), and each corpus has epochs of
    its own, each without repeats.

    ``shuffle`` "full" permutes an epoch by a keyed Feistel network with cycle walking (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002): no table, a new key per epoch. "blocks" is for storage where random reads are
    expensive: blocks of ``block_rows`` consecutive rows are permuted, and the rows of ``window_blocks`` of them are
    shuffled together (``permute_blocks`` says what randomness that gives up). "none" keeps the order of the corpora.

    Raises ValueError for empty corpora, and for weights that are not positive or too small to appear in a block.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: Literal["full", "blocks", "none"] = "full",
        block_rows: int = 1024,
        window_blocks: int = 32,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"corpora of {list(sizes)} samples: expected at least one corpus and none empty")
        if shuffle not in ("full", "blocks", "none"):
            raise ValueError(f"shuffle {shuffle!r}: expected 'full', 'blocks' or 'none'")
        if min(block_rows, window_blocks) < 1:
            raise ValueError(f"blocks of {block_rows} rows, {window_blocks} to a window: expected at least 1 of each")
        self._sizes = np.array(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._seed = seed
        self._shuffle, self._block_rows, self._window_blocks = shuffle, block_rows, window_blocks
        self._block_ends = None if weights is None else np.cumsum(block_counts(weights, len(sizes)))

    @property
    def epoch_size(self) -> int:
        """Positions of one nominal epoch: the number of samples of all corpora together."""
        return int(self._ends[-1])

    def read_together(self, corpus: int, index: int) -> range | None:
        """The rows of the corpus in the same block as row ``index``; None unless the shuffle is "blocks"."""
        if self._shuffle != "blocks":
            return None
        first_place = 0 if self._block_ends is not None else int(self._ends[corpus] - self._sizes[corpus])
        start = (first_place + index) // self._block_rows * self._block_rows - first_place
        return range(max(start, 0), min(start + self._block_rows, int(self._sizes[corpus])))

    def at(self, position: int) -> SampleRef:
        """The sample at ``position`` (0, 1, ...) of the stream."""
        corpus, index, epoch = self.at_many([position])
        return SampleRef(int(corpus[0]), int(index[0]), int(epoch[0]))

    def at_many(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(corpus, index, epoch) of many positions, each int64 of the same length."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()}: expected 0 or more")
        return self._concatenated(positions) if self._block_ends is None else self._mixed(positions)

    def _concatenated(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        epoch, within = np.divmod(positions, self._ends[-1])
        place = self._permuted(within, np.full_like(positions, self._ends[-1]), "epoch", epoch)
        corpus = np.searchsorted(self._ends, place, side="right")
        return corpus, place - (self._ends[corpus] - self._sizes[corpus]), epoch

    def _mixed(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts, counts = np.roll(self._block_ends, 1), np.diff(self._block_ends, prepend=0)
        starts[0] = 0
        blocks, row = np.unique(positions // BLOCK_SIZE, return_inverse=True)
        slots = np.tile(np.arange(BLOCK_SIZE), (len(blocks), 1))
        if self._shuffle != "none":
            keys = self._keys("block", np.repeat(blocks, BLOCK_SIZE))
            slots = permute(slots.ravel(), np.full(slots.size, BLOCK_SIZE), keys).reshape(slots.shape)
        corpora = np.searchsorted(self._block_ends, slots, side="right")
        in_turn = np.argsort(corpora, axis=1, kind="stable")  # so that each corpus finishes an epoch before the next
        turns = np.empty_like(in_turn)
        np.put_along_axis(turns, in_turn, np.arange(BLOCK_SIZE)[None].repeat(len(blocks), 0), axis=1)
        within = positions % BLOCK_SIZE
        corpus = corpora[row, within]
        nth = blocks[row] * counts[corpus] + turns[row, within] - starts[corpus]
        epoch, local = np.divmod(nth, self._sizes[corpus])
        return corpus, self._permuted(local, self._sizes[corpus], "corpus", epoch, corpus), epoch

    def _permuted(
        self, values: np.ndarray, sizes: np.ndarray, purpose: str, epoch: np.ndarray, corpus: np.ndarray | None = None
    ) -> np.ndarray:
        if self._shuffle == "none":
            return values
        keys = self._keys(purpose, epoch, corpus)
        if self._shuffle == "full":
            return permute(values, sizes, keys)
        return permute_blocks(values, sizes, keys, self._block_rows, self._window_blocks)

    def _keys(self, purpose: str, number: np.ndarray, corpus: np.ndarray | None = None) -> np.ndarray:
        base = np.full(number.shape, mix_words(self._seed, purpose), dtype=np.uint64)
        return _mix64(_mix64(base ^ number.astype(np.uint64)) + (0 if corpus is None else corpus.astype(np.uint64)))


def block_counts(weights: Sequence[float], num_corpora: int) -> np.ndarray:
    """How many of a block's positions each corpus gets: shares of 1024 by the largest remainder, int64."""
    if len(weights) != num_corpora:
        raise ValueError(f"{len(weights)} weights for {num_corpora} corpora: expected one each")
    shares = np.array(weights, dtype=np.float64)
    if not np.isfinite(shares).all() or shares.min() <= 0:
        raise ValueError(f"weights {list(weights)}: expected positive numbers")
    exact = shares / shares.sum() * BLOCK_SIZE
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: BLOCK_SIZE - int(counts.sum())]] += 1
    if counts.min() == 0:
        smallest = weights[int(counts.argmin())]
        raise ValueError(f"weight {smallest} of {list(weights)} is below 1/{BLOCK_SIZE} of the mix: leave it out")
    return counts


def permute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Each of ``values`` permuted within 0..size-1 by the permutation that its key selects, int64.

    A Feistel network permutes the next power of two; a result outside 0..size-1 is permuted again until it is inside
    (cycle walking), less than two rounds on average.
    """
    sizes = sizes.astype(np.uint64)
    bits = np.ceil(np.log2(np.maximum(sizes, 1).astype(np.float64))).astype(np.uint64)
    bits += (np.uint64(1) << bits) < sizes  # guard against rounding of the logarithm
    result = values.astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        result[walking] = _feistel(result[walking], bits[walking], keys[walking])
        walking = walking[result[walking] >= sizes[walking]]
    return result.astype(np.int64)


def permute_blocks(
    values: np.ndarray, sizes: np.ndarray, keys: np.ndarray, block_rows: int, window_blocks: int
) -> np.ndarray:
    """Like ``permute``, but neighbouring rows stay near each other in the order, int64.

    The rows 0..size-1 are divided into blocks of ``block_rows``, the last block may be shorter. The blocks are permuted
    (the key places the short one), the result is divided into windows of ``window_blocks`` blocks, and the rows of each
    window are permuted. So a window reads ``window_blocks`` runs of consecutive rows (one more where the short block
    shifts it) and nothing else.

    What that gives up: two samples of one block are always at most a window apart; samples of a window meet in a batch
    far more often than others do; a corpus whose neighbours are alike (five captions of an image, one web site) has
    batches that are alike wherever a window holds few blocks. Which blocks share a window, and the order inside it,
    are as random as in ``permute`` and new in each epoch; the cuts between blocks are the same in all.
    """
    window = block_rows * window_blocks
    number = values // window
    start = number * window
    in_window = _mix64(keys ^ _mix64(number.astype(np.uint64)))
    place = start + permute(values - start, np.minimum(sizes - start, window), in_window)

    num_whole = sizes // block_rows
    short_rows = sizes - num_whole * block_rows
    short_start = (_mix64(keys) % (num_whole + 1).astype(np.uint64)).astype(np.int64) * block_rows
    beyond = place - short_start
    in_short = (beyond >= 0) & (beyond < short_rows)
    result = num_whole * block_rows + beyond  # correct where the place is inside the short block
    place = np.where(beyond >= short_rows, place - short_rows, place)[~in_short]
    block = permute(place // block_rows, num_whole[~in_short], keys[~in_short])
    result[~in_short] = block * block_rows + place % block_rows
    return result


def _feistel(values: np.ndarray, bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of 0..2^bits-1; the halves may differ by a bit, each round rewrites one from the other."""
    right_bits = bits >> np.uint64(1)
    right_mask = (np.uint64(1) << right_bits) - np.uint64(1)
    left_mask = (np.uint64(1) << (bits - right_bits)) - np.uint64(1)
    left, right = values >> right_bits, values & right_mask
    for number in range(_FEISTEL_ROUNDS):
        round_keys = keys + np.uint64((number + 1) * int(_GOLDEN) & _MASK_64)
        if number % 2:
            right = right ^ (_mix64(left ^ _mix64(round_keys)) & right_mask)
        else:
            left = left ^ (_mix64(right ^ _mix64(round_keys)) & left_mask)
    return (left << right_bits) | right


def _mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014), elementwise on uint64."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mix_words(*words: int | str) -> int:
    """A 64-bit unsigned integer that depends on every bit of every word (BLAKE2b), equal on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little")


def sample_seed(seed: int, epoch: int, corpus: int, index: int) -> int:
    """The 64-bit seed of all random draws for one sample in one epoch, independent of ranks and workers."""
    return mix_words(seed, epoch, corpus, index)


def micro_batch_positions(step: int, micro: int, rank: int, world: int, micro_batch: int, accumulation: int) -> range:
    """Positions of micro-batch ``micro`` (0..accumulation-1) of ``rank`` at optimizer step ``step``.

    Step s covers positions [s*G, (s+1)*G) with G = world * accumulation * micro_batch, whatever the topology.
    """
    if not 0 <= rank < world or not 0 <= micro < accumulation:
        raise ValueError(f"rank {rank} of {world}, micro-batch {micro} of {accumulation}: out of range")
    start = step * world * accumulation * micro_batch + (micro * world + rank) * micro_batch
    return range(start, start + micro_batch)
