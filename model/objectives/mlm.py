"""The objective MLM: masked language modelling."""

from __future__ import annotations

from model.batch import Planner
from model.config import MLMOptions, ModelConfig, Vocabulary
from model.objectives.parts import Parts
from model.one_stream import OneStream
from model.plans.mlm import MLMPlanner, ReleasedMLMPlanner


def mlm(
    model: ModelConfig,
    objective: MLMOptions,
    vocabulary: Vocabulary,
    max_text_length: int,
    share: float,
    num_images: int = 1,
) -> Parts:
    """Masked language modelling (specification section 4)."""
    chosen = (vocabulary, objective.mask_rate, objective.prediction_rate, objective.whole_words, share)
    planner: Planner = MLMPlanner(*chosen)
    if model.behaviour == "released":
        planner = ReleasedMLMPlanner(*chosen, full_stop=True, max_text_length=max_text_length)
    return Parts(OneStream(model, vocabulary, False, num_images), planner, {"mlm": 1.0})
