"""The objective FLM: reconstruction of every word, beside the two language-model losses."""

from __future__ import annotations

from model.batch import Planner
from model.config import FLMOptions, ModelConfig, Vocabulary
from model.flm import FLM
from model.objectives.parts import Parts
from model.plans.flm import FLMPlanner, ReleasedPlanner


def flm(
    model: ModelConfig,
    objective: FLMOptions,
    vocabulary: Vocabulary,
    max_text_length: int,
    share: float,
    num_images: int = 1,
) -> Parts:
    """Reconstruction of all words and the two language-model losses (specification section 5).

    Total = (flm + a l2r + b r2l) / (1 + a + b) + c itm + d itc, each a mean over its targets.
    """
    planner: Planner
    if model.behaviour == "released":
        planner = ReleasedPlanner(vocabulary, objective.corruption_rate, max_text_length)
    else:
        centred = objective.span_placement == "centred"
        rates = {name: getattr(objective, name) for name in ("query_rate", "stream_rate", "reconstruction_share")}
        every_word = objective.itc_weight > 0
        planner = FLMPlanner(
            vocabulary, objective.corruption_rate, share, centred=centred, every_word=every_word, **rates
        )
    total = 1 + objective.l2r_weight + objective.r2l_weight
    weights = {"flm": 1 / total, "l2r": objective.l2r_weight / total, "r2l": objective.r2l_weight / total}
    return Parts(FLM(model, vocabulary, num_images), planner, weights)
