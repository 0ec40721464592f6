"""What self-critical training is paid for: CIDEr-D of a caption by fixed document frequencies, its end a word of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from data_prep.manifest import find_manifests
from pipeline.config.options import Config, weighted_paths
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.metrics.cider import CiderD, DocumentFrequencies, plain_words

KEPT_VECTORS = 100_000


def texts_of(sample: RawSample, full_stop: bool = False) -> list[str]:
    """All captions of a sample's image, clean, those without a word left out."""
    texts = sample.meta.get("captions")
    texts = [one for one in texts if isinstance(one, str)] if isinstance(texts, list) else [sample.text]
    return [text for text in (clean_caption(one, full_stop) for one in texts) if text]


class CiderReward:
    """A :data:`~model.objectives.self_critical.Reward`: CIDEr-D, 0 to 10.

    Document frequencies are those of ``task.document_frequencies`` or, without, of the references of the training
    images, counted when the first caption is scored; they hold the end of a caption as a word, as references and
    captions do, or else captions learn to end in "with a".
    """

    def __init__(self, config: Config, tokenizer: TextTokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._vector = lru_cache(KEPT_VECTORS)(self._computed)

    def __call__(self, captions: Sequence[Sequence[int]], references: Sequence[Sequence[Sequence[int]]]) -> list[float]:
        vector = lambda words: self._vector(tuple(words))  # noqa: E731
        return [
            self._scorer.score(vector(caption), [vector(reference) for reference in of_image]) if of_image else 0.0
            for caption, of_image in zip(captions, references, strict=True)
        ]

    def _computed(self, words: tuple[int, ...]):
        end = self._tokenizer.vocabulary.eos_id
        text = self._tokenizer.decode([word for word in words if word != end])
        return self._scorer.vector(plain_words(text), ended=end in words)

    @cached_property
    def _scorer(self) -> CiderD:
        return CiderD(document_frequencies(self._config))


def document_frequencies(config: Config) -> DocumentFrequencies:
    """Those of the file that ``task.document_frequencies`` names, or of a run's training captions.

    Raises:
        ValueError: the file is none, or counts captions without their ends.
    """
    if config.task.document_frequencies is None:
        return DocumentFrequencies.of(training_references(config), end=True)
    found = DocumentFrequencies.load(Path(config.task.document_frequencies))
    if not found.end:
        raise ValueError(
            f"task.document_frequencies {config.task.document_frequencies}: counts captions without their end, with"
            ' which self-critical training learns captions that end in "with a"; use null, which counts the training'
            " captions"
        )
    return found


def training_references(config: Config) -> Iterator[list[list[str]]]:
    """The captions of each training image as words."""
    for path, _ in weighted_paths(config.data):
        for folder, manifest in find_manifests(path, config.data.train_split):
            corpus = Corpus(folder, manifest)
            for row in corpus.first_rows().tolist():
                try:
                    texts = texts_of(corpus.read_without_images(row))
                except UnusableSample:
                    continue
                yield [plain_words(text) for text in texts]
            corpus.close()
