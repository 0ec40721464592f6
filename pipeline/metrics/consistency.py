"""NLVR2's consistency: the share of sentences that are judged right with every image pair they come with."""

from __future__ import annotations

from collections.abc import Sequence

FIELDS = "SPLIT-SET-PAIR-SENTENCE, like dev-850-0-1"


def sentence_of(identifier: str) -> str:
    """The name of an example's sentence: its identifier without the third field, the image pair.

    So nlvr2/eval/metrics.py of github.com/lil-lab/nlvr groups examples; sentences may have equal texts. Raises
    ValueError for an identifier of another form.
    """
    fields = identifier.split("-")
    if len(fields) != 4:
        raise ValueError(f"identifier {identifier!r}: expected {FIELDS}")
    return "-".join((*fields[:2], fields[3]))


def images_of(identifier: str) -> str:
    """The name of an example's image pair: its identifier without the last field, the sentence."""
    sentence_of(identifier)
    return identifier.rpartition("-")[0]


def consistency(identifiers: Sequence[str], correct: Sequence[bool]) -> dict[str, bool]:
    """Whether each sentence was judged right with all of its image pairs; consistency is the mean of the values.

    Raises ValueError for an identifier that is there twice or has another form, and for unequal lengths.
    """
    if len(identifiers) != len(correct):
        raise ValueError(f"{len(identifiers)} identifiers, {len(correct)} judgements: expected as many")
    seen: set[str] = set()
    right: dict[str, bool] = {}
    for identifier, judged in zip(identifiers, correct, strict=True):
        if identifier in seen:
            raise ValueError(f"{identifier} is there twice: expected each example once")
        seen.add(identifier)
        sentence = sentence_of(identifier)
        right[sentence] = right.get(sentence, True) and bool(judged)
    return right
