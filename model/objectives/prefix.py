"""The objectives AR and PrefixLM: each token from those before it."""

from __future__ import annotations

from model.batch import Planner
from model.config import AROptions, ModelConfig, PrefixLMOptions, Vocabulary
from model.objectives.pretraining import Pretraining
from model.one_stream import OneStream
from model.plans.prefix import PrefixPlanner, ReleasedARPlanner


def ar(
    model: ModelConfig, objective: AROptions, vocabulary: Vocabulary, max_text_length: int, share: float
) -> Pretraining:
    """Autoregressive language modelling: each token from the ones before it."""
    planner: Planner = PrefixPlanner("ar", vocabulary, 0.0, share)
    if model.behaviour == "released":
        planner = ReleasedARPlanner(vocabulary)
    return Pretraining(model, objective, OneStream(model, vocabulary, causal=True), planner, {"ar": 1.0})


def prefixlm(
    model: ModelConfig, objective: PrefixLMOptions, vocabulary: Vocabulary, max_text_length: int, share: float
) -> Pretraining:
    """AR after a prefix whose tokens see each other and are not predicted."""
    planner = PrefixPlanner("prefixlm", vocabulary, objective.prefix_share, share)
    return Pretraining(model, objective, OneStream(model, vocabulary, causal=True), planner, {"prefixlm": 1.0})
