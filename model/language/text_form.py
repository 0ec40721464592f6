"""How a text is written for a language model that reads image tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextForm:
    """How a text is written for a language model: ``before``, the image's tokens, ``begin``, the words, ``end``.

    ``before`` and ``begin`` are read, words and ``end`` are predicted. ``predicts_begin``: so is ``begin``, as in
    the release with OPT. ``cuts_end``: a text that is too long loses its end, as there.
    """

    before: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    predicts_begin: bool = False
    cuts_end: bool = False

    @property
    def num_read(self) -> int:
        """Tokens at the start of a row that are read only."""
        return 0 if self.predicts_begin else len(self.begin)

    def write(self, words: Sequence[int], max_length: int) -> list[int]:
        """The row of a text of these ``words``: at most ``max_length`` tokens behind the image."""
        if self.cuts_end:
            return [*self.begin, *words, *self.end][:max_length]
        return [*self.begin, *words[: max_length - len(self.begin) - len(self.end)], *self.end]
