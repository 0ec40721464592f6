"""The corpora that the tests of this folder share."""

from __future__ import annotations

import pytest

from model.plans.flm import FLMPlanner
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import load_tokenizer
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.pipeline.loading.loader_data import Data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    corpora = [
        Corpus(write_split(folder / "a" / "train", records(9, captions=2), corpus="a")),
        Corpus(write_split(folder / "b" / "train", records(13), corpus="b")),
    ]
    tokenizer = load_tokenizer(write_tokenizer(folder / "tokenizer"))
    return Data(corpora, tokenizer, FLMPlanner(tokenizer.vocabulary, 0.3, negative_share=0.5))
