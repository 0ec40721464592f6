"""Wrong captions of a ranking: by the seed, of other images, and the most alike where they are mined."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.tokenizer import train_tokenizer
from model.plans.hard_negatives import resemblance
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.data.transforms import UnusableSample
from pipeline.finetuning.ranking_rows import RankingRows
from pipeline.loading.datasets import OtherRows
from tests.gallery import write_gallery


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(write_gallery(tmp_path_factory.mktemp("data") / "toy" / "train", 12))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> TextTokenizer:
    train_tokenizer([corpus.split_dir], corpus.split_dir.parents[1] / "tokenizer", 300)
    return load_tokenizer(corpus.split_dir.parents[1] / "tokenizer")


def texts(rows, tokenizer: TextTokenizer) -> list[str]:
    return [tokenizer.decode(row.token_ids) for row in rows]


def others(corpus: Corpus, row: int) -> OtherRows:
    return OtherRows(corpus, row, range(len(corpus)))


def test_the_own_caption_first_then_others_none_of_the_image_none_twice(corpus, tokenizer) -> None:
    maker = RankingRows(tokenizer, 50, num_negatives=15)
    for row in (0, 7, 20):
        sample = corpus.read(row)
        rows = maker.rows(sample, row, others(corpus, row))
        found = texts(rows, tokenizer)
        assert found[0] == sample.text and len(found) == 16 == len(set(found))
        assert not set(found[1:]) & set(sample.meta["captions"])
        assert {(one.role, one.image, one.sample) for one in rows} == {("read", 0, sample.key)}
        assert rows == maker.rows(sample, row, others(corpus, row))
        assert found[1:] != texts(maker.rows(sample, row + 1, others(corpus, row)), tokenizer)[1:]


def test_released_draws_may_be_of_the_same_image_and_end_in_a_stop(corpus, tokenizer) -> None:
    maker = RankingRows(tokenizer, 50, num_negatives=15, released=True)
    collisions = 0
    for row in range(len(corpus)):
        sample = corpus.read(row)
        found = texts(maker.rows(sample, row, others(corpus, row)), tokenizer)
        assert len(found) == 16 and all(one.endswith(".") for one in found)
        collisions += len(set(found[1:]) & {f"{one}." for one in sample.meta["captions"]})
    assert collisions > 0


def test_mined_ones_are_those_of_the_pool_most_like_the_own_caption(corpus, tokenizer) -> None:
    few, pool = (RankingRows(tokenizer, 50, count, of) for count, of in ((4, 20), (20, 0)))
    sample = corpus.read(3)
    drawn = pool.rows(sample, 5, others(corpus, 3))
    mined = few.rows(sample, 5, others(corpus, 3))
    likeness = resemblance([row.token_ids[1:-1] for row in drawn], [0])[0, 1:].tolist()
    best = sorted(range(20), key=lambda number: (-likeness[number], number))[:4]
    assert mined == [drawn[0], *(drawn[1 + number] for number in best)]
    assert min(likeness[number] for number in best) > sorted(likeness)[10]


def test_fewer_where_there_are_no_more(tmp_path: Path, tokenizer) -> None:
    corpus = Corpus(write_gallery(tmp_path / "toy" / "train", 2))
    found = RankingRows(tokenizer, 50, 15).rows(corpus.read(0), 0, others(corpus, 0))
    assert 1 < len(found) <= 1 + len(corpus.read(len(corpus) - 1).meta["captions"])


def test_a_caption_of_blanks_is_unusable(corpus, tokenizer) -> None:
    with pytest.raises(UnusableSample, match="empty caption"):
        RankingRows(tokenizer, 50, 1).rows(corpus.read(0)._replace(text=" \n"), 0, others(corpus, 0))
