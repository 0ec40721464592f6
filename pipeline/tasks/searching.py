"""How the texts of a task are searched for, as its options say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from model.decode.both_ways import ScoreWeights
from model.decode.ranked_beam import ranked_beam
from model.decode.search import Decoder, beam, greedy
from pipeline.config.task_options import CaptioningOptions

BEAMS = {"beam": beam, "released_beam": ranked_beam}
OPTIONS_OF = {
    "greedy": (),
    "beam": ("beams", "length_penalty"),
    "released_beam": ("beams", "length_penalty"),
    "nucleus": ("top_p", "temperature"),
    "both_ways": ("beams", "length_penalty", "l2r_score_weight", "r2l_score_weight", "reconstruction_score_weight"),
}


class SearchOptions(Protocol):
    """The options of a task that writes texts."""

    decoding: str
    beams: int
    length_penalty: float
    repetition_penalty: float


def most_probable(
    options: SearchOptions, decoder: Decoder, max_tokens: int, all_agree: Callable[[bool], bool], min_tokens: int = 0
) -> list[list[int]]:
    """Texts by the greedy or beam search of a task's options; arguments and result as :mod:`model.decode.search`."""
    both = {"min_tokens": min_tokens, "repetition_penalty": options.repetition_penalty}
    if options.decoding == "greedy":
        return greedy(decoder, max_tokens, all_agree, **both)
    search = BEAMS[options.decoding]
    return search(decoder, max_tokens, options.beams, options.length_penalty, all_agree, **both)


def weights_of(options: CaptioningOptions) -> ScoreWeights:
    """What decoding both_ways weighs its candidates by."""
    return ScoreWeights(options.l2r_score_weight, options.r2l_score_weight, options.reconstruction_score_weight)


def decoding(options: SearchOptions) -> dict[str, Any]:
    """The search of a run, with the options that it has."""
    own = OPTIONS_OF[options.decoding] + (("repetition_penalty",) if options.repetition_penalty != 1 else ())
    return {"name": options.decoding, **{name: getattr(options, name) for name in own}}
