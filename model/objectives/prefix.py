"""The objectives AR and PrefixLM: each token from those before it."""

from __future__ import annotations

from model.batch import Planner
from model.config import AROptions, ModelConfig, PrefixLMOptions, Vocabulary
from model.objectives.parts import Parts
from model.one_stream import OneStream
from model.plans.prefix import PrefixPlanner, ReleasedARPlanner


def ar(
    model: ModelConfig,
    objective: AROptions,
    vocabulary: Vocabulary,
    max_text_length: int,
    share: float,
    num_images: int = 1,
) -> Parts:
    """Autoregressive language modelling: each token from the ones before it."""
    planner: Planner = PrefixPlanner("ar", vocabulary, 0.0, share)
    if model.behaviour == "released":
        planner = ReleasedARPlanner(vocabulary)
    return Parts(OneStream(model, vocabulary, True, num_images), planner, {"ar": 1.0})


def prefixlm(
    model: ModelConfig,
    objective: PrefixLMOptions,
    vocabulary: Vocabulary,
    max_text_length: int,
    share: float,
    num_images: int = 1,
) -> Parts:
    """AR after a prefix whose tokens see each other and are not predicted."""
    planner = PrefixPlanner("prefixlm", vocabulary, objective.prefix_share, share)
    return Parts(OneStream(model, vocabulary, True, num_images), planner, {"prefixlm": 1.0})
