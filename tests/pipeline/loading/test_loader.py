"""The loader end to end on real shards: order, topology, restarts, workers, negatives, problems."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections import Counter, deque
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from data_prep.record import Record
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import clean_caption
from pipeline.data.transforms import clip_transform, decode_image
from pipeline.loading.datasets import ALL_TEXTS
from pipeline.loading.loader import LoaderError, LoaderOptions
from tests.pipeline.data.test_reader import jpeg, records, write_split
from tests.pipeline.loading.loader_data import HERE, SIZE, hangs, rows_by_sample, same


def test_a_batch_holds_what_the_shards_hold(data):
    order = SampleOrder([18, 13], seed=5)
    for position, (key, total, rows) in enumerate(rows_by_sample(list(data.train()))):
        corpus, index, _ = order.at(position)
        sample = data.corpora[corpus].read(index)
        assert key == sample.key and rows[0] == tuple(data.tokenizer.encode(sample.text, 12))
        assert total == int(clip_transform(SIZE)(decode_image(sample.images[0])).sum())


@pytest.mark.parametrize("world, accumulation, micro_batch", [(1, 1, 12), (2, 3, 2), (3, 1, 4), (4, 3, 1), (1, 4, 3)])
def test_topology_changes_no_global_batch(data, world, accumulation, micro_batch):
    """Invariant 1: samples, images, texts and negatives of each step, over four epochs and more."""
    expected = rows_by_sample(list(data.train(micro_batch=12, stop=11)))
    assert len(expected) == 132
    loaders = [iter(data.train(world, rank, accumulation, micro_batch, stop=11)) for rank in range(world)]
    joined = [next(loader) for _ in range(11 * accumulation) for loader in loaders]
    assert rows_by_sample(joined) == expected
    assert all(next(loader, None) is None for loader in loaders)


def test_restart_continues_and_workers_change_nothing(data):
    """Invariants 1 and 2: bit-equal batches after a restart at any step, with 0, 1 and 3 workers."""
    straight = list(data.train(accumulation=2, stop=6))
    assert len(straight) == len(data.train(accumulation=2, stop=6)) == 12
    for start in (1, 4):
        resumed = list(data.train(accumulation=2, start=start, stop=6))
        assert len(resumed) == 12 - 2 * start and all(same(a, b) for a, b in zip(straight[2 * start :], resumed))
    for workers in (1, 3):
        parallel = list(data.train(accumulation=2, stop=6, options=LoaderOptions(num_workers=workers, prefetch=2)))
        assert len(parallel) == 12 and all(same(a, b) for a, b in zip(straight, parallel))
    assert list(data.train(start=6, stop=6)) == []


def test_skipped_steps_are_not_loaded(data):
    straight = list(data.train(accumulation=2, stop=6))
    loader = data.train(accumulation=2, start=1, stop=6, skipped=[0, 2, 3, 9], options=LoaderOptions(num_workers=2))
    kept = [straight[2 * step + micro] for step in (1, 4, 5) for micro in range(2)]
    assert len(loader) == len(kept) and all(same(a, b) for a, b in zip(loader, kept, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["iterator", "loader"])
def test_a_rewind_leaves_no_processes_and_no_memory(data, monkeypatch, way):
    """Closed in the middle of a run, also while a worker hangs, and begun again from an earlier step, three times."""
    expected = list(data.train(stop=8))
    options = LoaderOptions(num_workers=2, prefetch=2)
    read = Corpus.read
    gc.collect()
    open_files = len(os.listdir("/proc/self/fd"))
    for start in (0, 3, 2):
        loader = data.train(start=start, stop=8, options=options)
        running = iter(loader)
        assert all(same(next(running), expected[start + step]) for step in range(3))
        running.close() if way == "iterator" else loader.close()
        assert not multiprocessing.active_children()
        del running, loader
        gc.collect()
        deadline = time.monotonic() + 10  # a queue's pipe is closed by a thread of its own, when it gets to it
        while len(os.listdir("/proc/self/fd")) > open_files:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        monkeypatch.setattr(Corpus, "read", hangs if start == 3 else read)
        if start == 3:
            stuck = iter(data.train(stop=8, options=replace(options, timeout_seconds=0.5)))
            with pytest.raises(LoaderError):
                next(stuck)
            monkeypatch.setattr(Corpus, "read", read)
            del stuck
    time.sleep(0.05)  # torch's handler of ended children must have nothing to complain about
    assert same(next(iter(data.train(options=options))), expected[0])


def test_loading_leaves_the_global_generator_alone(data):
    """Invariant 2: else dropout would depend on when a loader was made."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(data.train(options=LoaderOptions(num_workers=1)))
    assert torch.equal(torch.rand(3), expected)


def test_every_epoch_sees_each_row_once(data):
    """Invariant 1."""
    keys = Counter(chain.from_iterable(batch.keys for batch in data.train(micro_batch=31, stop=2)))
    assert sum(keys.values()) == 62 and keys["k0003"] == 2 * (2 + 1) and keys["k0012"] == 2


def test_negatives_are_other_captions_at_the_nominal_share(data):
    planner = replace(data.planner, negative_share=0.4)
    samples = rows_by_sample(list(data.train(planner=planner, micro_batch=31, stop=32)))
    with_negative = [rows for _, _, rows in samples if len(rows) == 2]
    assert abs(len(with_negative) / len(samples) - 0.4) < 4 * np.sqrt(0.24 / len(samples))
    for key, _, rows in samples:
        if len(rows) == 2:
            number = data.tokenizer.decode(list(rows[0])).split()[-1]
            assert int(number) == int(key[1:]) and data.tokenizer.decode(list(rows[1])).split()[-1] != number
    assert len({rows[1] for rows in with_negative}) > 15
    assert all(
        len(rows) == 1 for _, _, rows in rows_by_sample(list(data.train(planner=replace(planner, negative_share=0.0))))
    )


def test_negatives_of_a_block_shuffle_stand_in_the_block(data):
    """Else each would cost a jump of its own."""
    alone, planner = replace(data, corpora=data.corpora[1:]), replace(data.planner, negative_share=1.0)
    order = SampleOrder([13], 5, shuffle="blocks", block_rows=4, window_blocks=2)
    samples = rows_by_sample(list(alone.train(order=order, planner=planner, micro_batch=12)))
    samples = [(int(key[1:]), rows) for key, _, rows in samples if key != "k0012"]  # which is alone in its block
    assert len(samples) > 30
    for number, rows in samples:
        assert int(data.tokenizer.decode(list(rows[1])).split()[-1]) // 4 == number // 4


def test_a_corpus_of_one_caption_has_no_negatives(tmp_path, data):
    same_caption = [Record(f"k{n}", (jpeg(n),), ("always the same",), {}, ("jpg",)) for n in range(5)]
    alone = replace(data, corpora=[Corpus(write_split(tmp_path / "train", same_caption))])
    assert {len(rows) for _, _, rows in rows_by_sample(list(alone.train()))} == {1}


def test_released_captions_end_in_a_full_stop(data):
    planner = replace(data.planner, full_stop=True, negative_share=1.0)
    rows = [row for _, _, rows in rows_by_sample(list(data.train(planner=planner))) for row in rows]
    assert all(data.tokenizer.decode(list(row)).endswith(".") for row in rows)


def damaged(tmp_path) -> list[Record]:
    rows = records(6)
    bad = {1: (b"<html>", "a"), 3: (jpeg(3)[:200], "b"), 4: (jpeg(4), " \n ")}
    return [
        replace(record, images=(bad[n][0],), captions=(bad[n][1],)) if n in bad else record
        for n, record in enumerate(rows)
    ]


def test_unusable_samples_keep_their_slot_and_are_named(tmp_path, data):
    """Invariant 8."""
    alone = replace(data, corpora=[Corpus(write_split(tmp_path / "train", damaged(tmp_path)))])
    for options in (HERE, LoaderOptions(num_workers=1)):
        (batch,) = alone.train(micro_batch=6, stop=1, options=options)
        expected = {("k0001", "not an image"), ("k0003", "truncated image"), ("k0004", "empty caption")}
        assert set(batch.problems) == expected and len(batch.keys) == 6 and batch.images.shape == (6, 1, 3, SIZE, SIZE)
        bad_rows = [batch.keys.index(key) for key, _ in expected]
        assert batch.plan.lengths[bad_rows].tolist() == [2, 2, 2] and batch.images[bad_rows].sum() == 0
        negatives = sum(
            len(batch.plan.text[r])
            for r in range(6, len(batch.plan.text))
            if int(batch.plan.image_of_row[r]) in bad_rows
        )
        assert negatives == 0


def test_pixel_limit_reaches_the_decoder(data):
    """Invariant 7."""
    (batch,) = data.train(stop=1, options=LoaderOptions(num_workers=0, max_pixels=100))
    assert {reason for _, reason in batch.problems} == {"too many pixels"} and len(batch.problems) == 4


@pytest.mark.parametrize("world", [1, 2, 5, 11])
@pytest.mark.parametrize("max_samples", [None, 10, 1])
def test_evaluation_sees_each_sample_once_on_any_number_of_ranks(data, world, max_samples):
    loaders = [data.evaluate(world, rank, max_samples=max_samples) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    whole = rows_by_sample(list(data.evaluate(max_samples=max_samples)))
    assert len(whole) == (max_samples or 31)
    assert sorted(rows_by_sample(list(chain(*batches)))) == sorted(whole)
    assert [len(loader) for loader in loaders] == [len(mine) for mine in batches]
    assert {loader.most_batches for loader in loaders} == {max(len(mine) for mine in batches)}


def test_evaluation_is_the_same_every_time(data):
    loader = data.evaluate(options=LoaderOptions(num_workers=2, prefetch=2))
    first, second = list(loader), list(loader)
    assert all(same(a, b) for a, b in zip(first, second)) and len(first) == len(second) == 8


def test_shuffled_images_are_those_of_others(data):
    own = rows_by_sample(list(data.evaluate()))
    shuffled = rows_by_sample(list(data.evaluate(images="shuffled")))
    assert [rows for _, _, rows in shuffled] == [rows for _, _, rows in own]
    assert Counter(total for _, total, _ in shuffled) == Counter(total for _, total, _ in own)
    moved = [(a[0], a[1] != b[1]) for a, b in zip(own, shuffled)]
    assert all(differs for _, differs in moved), moved
    with pytest.raises(ValueError, match="at least 2 of each"):
        data.evaluate(images="shuffled", max_samples=1)


def test_hidden_images_are_black_and_the_texts_stay(data):
    own, hidden = (rows_by_sample(list(data.evaluate(images=images))) for images in ("own", "hidden"))
    assert [rows for _, _, rows in hidden] == [rows for _, _, rows in own]
    assert {total for _, total, _ in hidden} == {0} and {total for _, total, _ in own} != {0}


def test_evaluation_of_nothing_is_refused(data):
    with pytest.raises(ValueError, match="at least 1"):
        data.evaluate(max_samples=0)


@pytest.mark.slow
@pytest.mark.parametrize("held", [1, 8, 40])
def test_batches_keep_their_pixels_as_long_as_they_are_held(data, held):
    """As many at a time as announced, which costs no descriptors, or more than that."""
    expected = list(data.train(stop=40, micro_batch=3))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    loader = data.train(stop=5, accumulation=8, micro_batch=3, options=LoaderOptions(num_workers=2, prefetch=2))
    loaded, open_files = deque(maxlen=held), []
    for number, batch in enumerate(loader):
        loaded.append(batch)
        open_files.append(len(os.listdir("/proc/self/fd")))
        assert all(same(a, b) for a, b in zip(loaded, expected[max(0, number + 1 - held) : number + 1], strict=True))
    if held <= 8:
        assert max(open_files) == min(open_files)
        assert len(loader) == 40
    del loader, loaded, batch
    gc.collect()
    deadline = time.monotonic() + 10  # a thread of each queue closes its pipe
    while len(os.listdir("/proc/self/fd")) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) == before


def test_slots_are_reused_and_an_iteration_can_be_left_early(data):
    loader = data.evaluate(batch_size=2, options=LoaderOptions(num_workers=2, prefetch=1))
    expected = list(data.evaluate(batch_size=2))
    places = Counter(batch.images.data_ptr() for batch in loader)
    assert len(places) <= 2 * 3 and sum(places.values()) == 16
    for _ in range(4):
        abandoned = iter(loader)
        assert same(next(abandoned), expected[0])
        del abandoned
        assert all(same(a, b) for a, b in zip(loader, expected, strict=True))
        assert {batch.images.data_ptr() for batch in loader} <= set(places)


def test_slow_workers_do_not_overwrite_each_other(data, monkeypatch):
    """One worker is slower than the other: batches arrive out of order and leave in order, pixels intact."""
    expected = list(data.train(stop=24, micro_batch=2))
    read = Corpus.read

    def slow_read(corpus: Corpus, index: int):
        time.sleep(0.02 * torch.utils.data.get_worker_info().id)
        return read(corpus, index)

    monkeypatch.setattr(Corpus, "read", slow_read)
    loaded = list(data.train(stop=24, micro_batch=2, options=LoaderOptions(num_workers=2, prefetch=1)))
    assert all(same(a, b) for a, b in zip(loaded, expected, strict=True))


def test_corpora_of_pairs_and_single_images_do_not_mix(tmp_path, data):
    pairs = Corpus(write_split(tmp_path / "train", records(3, images=2), corpus="pairs"))
    with pytest.raises(ValueError, match="same number in all"):
        replace(data, corpora=[data.corpora[0], pairs]).train()
    (batch,) = replace(data, corpora=[pairs]).train(micro_batch=3, stop=1)
    assert batch.images.shape == (3, 2, 3, SIZE, SIZE)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_leaves_out_what_is_done(data, world: int) -> None:
    """Batches keep their samples whatever is done and however many ranks share what is left."""
    whole = {tuple(batch.positions): batch for batch in data.evaluate(batch_size=3)}
    done = {1, 3, 4, 5}
    left = [list(data.evaluate(world, rank, batch_size=3).without(done)) for rank in range(world)]
    found = sorted(tuple(batch.positions) for part in left for batch in part)
    assert found == sorted(kept for one in whole if (kept := tuple(p for p in one if p not in done)))
    keys = {position: key for one, batch in whole.items() for position, key in zip(one, batch.keys)}
    assert all(keys[p] == key for part in left for b in part for p, key in zip(b.positions, b.keys))
    assert {len(range(rank, len(found), world)) for rank in range(world)} == {len(part) for part in left}


def test_an_evaluation_of_images_sees_each_once_with_its_first_text(data) -> None:
    batches = list(data.evaluate(texts_per_image=1))
    keys = [(position, key) for batch in batches for position, key in zip(batch.positions, batch.keys)]
    expected = []
    for corpus in data.corpora:
        assert [corpus.read(int(row)).number for row in corpus.first_rows()] == [0] * corpus.manifest.samples
        expected += [corpus.read(int(row)).key for row in corpus.first_rows()]
    assert keys == list(enumerate(expected)) and sum(len(corpus) for corpus in data.corpora) > len(keys)


def test_an_evaluation_of_images_may_read_all_their_texts(data) -> None:
    """Those that an evaluation of texts reads, with each image decoded once."""
    own = replace(data, planner=replace(data.planner, negative_share=0.0))
    placeholder = (data.tokenizer.vocabulary.bos_id, data.tokenizer.vocabulary.eos_id)
    together = rows_by_sample(list(own.evaluate(texts_per_image=ALL_TEXTS)))
    assert len(together) == sum(corpus.manifest.samples for corpus in data.corpora)
    texts = [text for _, _, rows in together for text in rows]
    singly = [text for _, _, rows in rows_by_sample(list(own.evaluate())) for text in rows]
    assert Counter(text for text in texts if text != placeholder) == Counter(t for t in singly if t != placeholder)
    assert max(len(rows) for _, _, rows in together) > 1


def test_a_row_says_which_of_its_texts_it_is(data) -> None:
    samples = [corpus.read(row) for corpus in data.corpora for row in range(len(corpus))]
    assert all(one.text == one.meta["captions"][one.number] for one in samples)
    assert max(one.number for one in samples) > 0


@pytest.mark.parametrize("num_texts", [2, 9])
def test_an_image_with_several_of_its_texts_is_one_sample(data, num_texts: int) -> None:
    """Every image once an epoch, up to so many different texts of its own with it, on any topology the same."""
    data = replace(data, corpora=data.corpora[:1])  # two captions an image
    (corpus,), images = data.corpora, [9]
    changes = dict(order=SampleOrder(images, seed=5), num_texts=num_texts, micro_batch=9, stop=1)
    (batch,) = data.train(**changes)
    texts = {corpus.read(int(row)).key: corpus.read(int(row)).meta["captions"] for row in corpus.first_rows()}
    assert sorted(batch.keys) == sorted(texts)
    found: dict[str, list[str]] = {key: [] for key in texts}
    for row, image in enumerate(batch.plan.image_of_row.tolist()):
        ids = batch.plan.text[row, : batch.plan.lengths[row]].tolist()
        found[batch.keys[image]].append(ids)
    for key, captions in texts.items():
        own = [data.tokenizer.encode(clean_caption(text, False), 12) for text in captions]
        mine = [ids for ids in found[key] if ids in own]
        assert len(mine) == min(num_texts, len(captions)) == len({tuple(ids) for ids in mine})
    matched = batch.terms["itm"].target.tolist()
    assert matched.count(0) == matched.count(1) > 0, "a pair for each negative, not each text of its image"
    alone = [one for one in data.train(**changes | dict(micro_batch=1, accumulation=9))]
    assert rows_by_sample(alone) == rows_by_sample([batch])
