"""How a text is written for a language model that reads image tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.config import Vocabulary

QUESTION = "Question: {} Short answer:"  # of the release, to OPT and to Vicuna


@dataclass(frozen=True)
class TextForm:
    """How a text is written for a language model: ``before``, the image's tokens, ``begin``, the words, ``end``.

    ``before`` and ``begin`` are read, words and ``end`` are predicted. ``predicts_begin``: so is ``begin``, as in
    the release with OPT. ``cuts_end``: a text that is too long loses its end, as there. ``question``: how a
    question is asked whose answer is a text; {} is its place.
    """

    before: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    predicts_begin: bool = False
    cuts_end: bool = False
    question: str = QUESTION

    @property
    def num_read(self) -> int:
        """Tokens at the start of a row that are read only."""
        return 0 if self.predicts_begin else len(self.begin)

    def write(self, words: Sequence[int], max_length: int) -> list[int]:
        """The row of a text of these ``words``: at most ``max_length`` tokens behind the image."""
        if self.cuts_end:
            return [*self.begin, *words, *self.end][:max_length]
        return [*self.begin, *words[: max_length - len(self.begin) - len(self.end)], *self.end]


Token = Literal["document", "line", "end"]  # what begins a document, a line break, the end token


class Rule(NamedTuple):
    """A form before its tokens have numbers."""

    before: Token | None = None
    begin: Token | None = None
    end: Token = "end"
    predicts_begin: bool = False
    cuts_end: bool = False
    question: str = QUESTION


# Every family's rule. Of these OPT, Llama 3, Qwen2, SmolLM2 and GPT-2 have a line break of one token, Llama 1 and 2 (so
# Vicuna) have not: theirs is a blank and a byte. No tokenizer is asked to add tokens, and none needs one for padding.
WITH_LINES = Rule(before="document", begin="line", end="line")
WITHOUT_LINES = Rule(before="document")
RELEASED = {  # by transformers' model_type; of Vicuna the release sets every special token to </s>
    "opt": Rule(begin="document", end="line", predicts_begin=True, cuts_end=True),
    "llama": Rule(begin="end", cuts_end=True),
}


def text_form(vocabulary: Vocabulary, kind: str, released: bool) -> TextForm:
    """How texts are written for a language model of this ``kind`` (transformers' model_type), by its ``vocabulary``.

    A document begins, the image follows, and a line of text, which a line break begins and ends. Where a line break is
    no token of its own (SentencePiece), the text begins at once and ends by the end token. ``released``: as the release
    writes for OPT and for Vicuna (specification section 4).

    Raises:
        ValueError: the release knows no such kind, or it needs a token that the tokenizer lacks.
    """
    if released and kind not in RELEASED:
        raise ValueError(f"model.behaviour released knows opt and llama, not {kind}; use model.behaviour default")
    has_lines = vocabulary.newline_id >= 0
    rule = RELEASED[kind] if released else WITH_LINES if has_lines else WITHOUT_LINES
    if "line" in rule and not has_lines:
        raise ValueError("the tokenizer has no token for a line break, by which released texts of OPT end")
    ids = {"document": vocabulary.bos_id, "line": vocabulary.newline_id, "end": vocabulary.eos_id}
    before, begin, end = (() if token is None else (ids[token],) for token in rule[:3])
    return TextForm(before, begin, end, *rule[3:])
