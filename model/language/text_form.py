"""How a text is written for a language model that reads image tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import Vocabulary

QUESTIONS = {  # model_type of transformers -> how the release asks it a question, which stands for {}
    "opt": "Question: {} Short answer:",
    "llama": "Question: {} Short answer:",
}
QUESTION = "Question: {} Short answer:"  # to any other


@dataclass(frozen=True)
class TextForm:
    """How a text is written for a language model: ``before``, the image's tokens, ``begin``, the words, ``end``.

    ``before`` and ``begin`` are read, words and ``end`` are predicted. ``predicts_begin``: so is ``begin``, as in
    the release with OPT. ``cuts_end``: a text that is too long loses its end, as there. ``question``:
    how a question is asked, whose answer is a text; {} is its place.
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


def text_form(vocabulary: Vocabulary, kind: str, released: bool) -> TextForm:
    """How texts are written for a language model of this ``kind`` (transformers' model_type), by its ``vocabulary``.

    A document begins, the image follows, and a line of text, which a line break begins and ends. Where a line break is
    no token of its own (SentencePiece), the text begins at once and ends by the end token. ``released``: as the release
    writes for OPT and for Vicuna (specification section 4).

    Raises:
        ValueError: the release knows no such kind, or it needs a token that the tokenizer lacks.
    """
    asked = QUESTIONS.get(kind, QUESTION)
    document, newline, end = vocabulary.bos_id, vocabulary.newline_id, vocabulary.eos_id
    if released and kind not in ("opt", "llama"):
        raise ValueError(f"model.behaviour released knows opt and llama, not {kind}; use model.behaviour default")
    if released and kind == "opt":
        if newline < 0:
            raise ValueError("the tokenizer has no token for a line break, by which released texts of OPT end")
        return TextForm((), (document,), (newline,), predicts_begin=True, cuts_end=True, question=asked)
    if released:
        return TextForm(
            (), (end,), (end,), cuts_end=True, question=asked
        )  # the release sets every special token to </s>
    if newline >= 0:
        return TextForm((document,), (newline,), (newline,), question=asked)
    return TextForm((document,), (), (end,), question=asked)
