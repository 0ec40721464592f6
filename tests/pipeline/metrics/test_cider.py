"""CIDEr-D against pycocoevalcap and against what the formula says by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.cider import END, CiderD, DocumentFrequencies, cider_d, cider_scores

CAPTIONS = [
    "a red kite over the beach",
    "two boys play chess in a park",
    "a dog",
    "a man is riding a wave on a surfboard",
]
REFERENCES = [
    ["a red kite flies over the beach", "someone flies a kite at the beach"],
    ["two boys play chess in a park", "children playing a board game in a park", "two boys at a table"],
    ["a brown dog runs across the field", "the dog is running"],
    ["a surfer rides a wave", "a man rides a wave on a board in the sea"],
]
WORDS = [caption.split() for caption in CAPTIONS]
REFERENCE_WORDS = [[text.split() for text in of_image] for of_image in REFERENCES]


def test_it_gives_the_reference_implementations_number() -> None:
    """2.7520784937340883 is what pycocoevalcap 1.2's Cider().compute_score gives for these captions."""
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx(2.7520784937340883, rel=1e-12)


def test_a_caption_equal_to_its_only_reference_has_the_highest_score() -> None:
    texts = ["A red kite, over the beach!", "two boys play chess", "the dog's brown field shines"]
    assert cider_d(texts, [[text.lower()] for text in texts]) == pytest.approx(10)
    worse = cider_d(["a red kite over the sea", *texts[1:]], [[text] for text in texts])
    assert 5 < worse < 10
    assert cider_d(["nothing said here", "?", ""], [[text] for text in texts]) == 0


def test_repeating_a_telling_word_is_not_rewarded() -> None:
    references = [["a red kite over the beach"], ["two boys play chess in a park"]]
    honest, cheater = (cider_d([text, "nothing"], references) for text in ("a red kite", "kite kite kite kite kite"))
    assert cheater < honest


CAPTION = st.lists(st.sampled_from("a the man dog red on".split()), max_size=9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=4)), min_size=1, max_size=6))
def test_it_is_pycocoevalcaps_cider(images: list[tuple[list[str], list[list[str]]]]) -> None:
    package = pytest.importorskip("pycocoevalcap.cider.cider", reason="pip install pycocoevalcap==1.2")
    found = {number: [" ".join(caption)] for number, (caption, _) in enumerate(images)}
    wanted = {number: [" ".join(words) for words in of_image] for number, (_, of_image) in enumerate(images)}
    if any(text for texts in wanted.values() for text in texts):  # the package fails where all references are empty
        expected = package.Cider().compute_score(wanted, found)[1]
        assert cider_scores([c for c, _ in images], [r for _, r in images]) == pytest.approx(list(expected), abs=1e-9)


def test_scoring_does_not_accumulate() -> None:
    frequencies = DocumentFrequencies.of(REFERENCE_WORDS)
    scorer = CiderD(frequencies)
    references = [scorer.vector(words) for words in REFERENCE_WORDS[0]]
    counts = dict(frequencies.counts)
    first, second = (scorer.score(scorer.vector(WORDS[0]), references) for _ in range(2))
    assert first == second == cider_scores(WORDS, REFERENCE_WORDS)[0] and frequencies.counts == counts


def test_a_single_image_needs_frequencies_of_others() -> None:
    assert cider_scores(WORDS[:1], REFERENCE_WORDS[:1]) == [0.0]
    frequencies = DocumentFrequencies.of(REFERENCE_WORDS)
    alone = cider_scores(WORDS[:1], REFERENCE_WORDS[:1], frequencies)
    assert alone == cider_scores(WORDS, REFERENCE_WORDS)[:1] and alone[0] > 1


def test_the_end_as_a_word_tells_a_cut_off_caption_from_a_whole_one() -> None:
    """With the end in sample, references and frequencies, the score is that of captions in which it is a word."""
    frequencies = DocumentFrequencies.of(REFERENCE_WORDS, end=True)
    spelled = [[[*words, END] for words in of_image] for of_image in REFERENCE_WORDS]
    assert frequencies.counts == DocumentFrequencies.of(spelled).counts
    expected = cider_scores([[*words, END] for words in WORDS], spelled)
    assert cider_scores(WORDS, REFERENCE_WORDS, frequencies) == expected

    scorer = CiderD(frequencies)
    references = [scorer.vector(words) for words in REFERENCE_WORDS[1]]
    whole, cut_off = (scorer.score(scorer.vector(WORDS[1], ended=ended), references) for ended in (True, False))
    longer = scorer.score(scorer.vector([*WORDS[1], "with", "a"], ended=False), references)
    assert whole > cut_off > longer


def test_frequencies_in_a_file(tmp_path) -> None:
    path = tmp_path / "df.json"
    frequencies = DocumentFrequencies.of(REFERENCE_WORDS, end=True, tokenization="PTB")
    frequencies.save(path)
    assert DocumentFrequencies.load(path) == frequencies
    for content in ("{", "[]", '{"version": 2}', path.read_text().replace('"num_images": 4', '"num_images": 1')):
        path.write_text(content)
        with pytest.raises(ValueError, match="no file of document frequencies") as caught:
            DocumentFrequencies.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="no captions"):
        cider_d([], [])
    with pytest.raises(ValueError, match="each with references"):
        cider_scores(WORDS[:1], [[]])
    with pytest.raises(ValueError, match="1 captions, 4 images"):
        cider_scores(WORDS[:1], REFERENCE_WORDS)
