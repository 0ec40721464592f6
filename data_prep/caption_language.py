"""Tells the language of a caption where it can be told, by the model in the wheel of py3langid."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from data_prep.record import PrepError

CERTAIN = 0.5  # probability from which a language counts as told; py3langid's are calibrated for the text's length


def other_language(caption: str, wanted: Sequence[str]) -> str | None:
    """The language of ``caption``, such as "fr", if it is told and is none of ``wanted``, else None.

    A caption whose language cannot be told (a name, a number, one or two words) is taken as one of the wanted.
    """
    language, probability = _identifier().classify(caption)
    return language if probability >= CERTAIN and language not in wanted else None


def check_languages(wanted: Sequence[str]) -> None:
    """Raises PrepError for what is no code of a language that can be told."""
    known = _identifier().labels
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        found = f"{', '.join(map(repr, unknown))}" if unknown else "no language"
        raise PrepError(f"found {found}, expected ISO 639-1 codes such as en,de; there are {' '.join(sorted(known))}")


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise PrepError(f"--language needs py3langid ({error}): pip install '.[language]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
