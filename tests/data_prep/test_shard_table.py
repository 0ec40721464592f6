"""Shards as columns: what went in comes out, equal bytes are hashed, and what no column can hold is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.manifest import Manifest, Shard
from data_prep.shard_table import ShardTable

NAMES = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)
HASHES = st.text("0123456789abcdef", max_size=64)
COUNTS = st.integers(0, 2**63 - 1)
SHARDS = st.lists(st.builds(Shard, NAMES, NAMES, COUNTS, COUNTS, COUNTS, HASHES, HASHES), max_size=5)


@given(SHARDS)
def test_what_goes_in_comes_out(shards: list[Shard]) -> None:
    table = ShardTable.of(shards)
    assert list(table) == shards and len(table) == len(shards)
    assert [table[number] for number in range(-len(shards), len(shards))] == [*shards, *shards]
    assert list(table.among(range(len(shards))[1::2])) == shards[1::2]
    assert table == pickle.loads(pickle.dumps(table)) == ShardTable.of(table)
    with pytest.raises(IndexError):
        table[len(shards)]


@given(st.text(), st.text(), SHARDS, st.sampled_from([1, 2, 1000]))
def test_a_fingerprint_is_what_runs_have_in_their_checkpoints(corpus, split, shards, at_a_time) -> None:
    """The hash of the whole list as one JSON text, however few shards are objects at a time."""
    fields = ("image", "text", "meta")
    content = {"corpus": corpus, "split": split, "fields": fields, "shards": [asdict(shard) for shard in shards]}
    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.shard_table._AT_A_TIME", at_a_time)
        assert Manifest(corpus, split, fields, shards).fingerprint() == expected


def test_a_hundred_thousand_shards_take_little_memory() -> None:
    """Names and hashes as bytes: the two hashes are 128 bytes of a shard, the rest of it less than 60."""
    shard = Shard("00000.tar", "00000.index.npy", 1, 1, 1024, "a" * 64, "b" * 64)
    table = ShardTable.of(replace(shard, file=f"{number:05d}.tar") for number in range(1000))
    assert len(pickle.dumps(table)) < 1000 * (128 + 60)


SOUND = asdict(Shard("a.tar", "a.npy", 3, 2, 1024, "a" * 64, "b" * 64))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"file": "x" * 256}, ValueError, "plain file name"),
        ({"index_file": "a/b"}, ValueError, "plain file name"),
        ({"file": "\ud800"}, ValueError, "surrogates"),
        ({"file": None}, ValueError, "None is not a plain file name"),
        ({"sha256": 5}, ValueError, "found 5"),
        ({"sha256": "a" * 10**6}, ValueError, "1000000 bytes"),
        ({"index_sha256": "a\0"}, ValueError, "found"),
        ({"rows": True}, ValueError, "rows True"),
        ({"rows": -1}, ValueError, "rows -1"),
        ({"samples": 2**63}, ValueError, "samples 9223372036854775808"),
        ({"bytes": 1e3}, ValueError, "bytes 1000.0"),
    ],
)
def test_what_no_column_can_hold_is_refused(changes: dict, error: type[Exception], words: str) -> None:
    ShardTable([SOUND])
    with pytest.raises(error, match=words) as caught:
        ShardTable([SOUND, SOUND | changes])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("shard", [{}, [], 7, "file", None, {**SOUND, "rows": {}}])
def test_what_is_no_shard_is_refused(shard: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        ShardTable([shard])
