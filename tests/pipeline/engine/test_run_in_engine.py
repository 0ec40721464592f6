"""Functions run inside the engine: captions there are those of the plain model, and training goes on untouched."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from model.batch import Row
from model.decode.both_ways import ScoreWeights, both_ways
from model.decode.mask_predict import mask_predict
from model.decode.search import beam, greedy
from model.decode.stream import decoder_of
from pipeline.deepspeed_json.ds_config import read_ds_config, resolve
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import CPU, REPOSITORY, global_loss, micro_batches, tiny_config
from tests.tiny_flm import captioner, images

MAX_TOKENS = 12


class Found(NamedTuple):
    captions: list[dict[str, list[list[int]]]]  # before each step
    waited: dict[str, int]  # how often a search of this rank was done before that of another
    losses: list[float]
    training: bool  # mode afterwards
    outside: str  # the error of captioning by the engine's own model, not inside
    held: list[str]  # weights that ZeRO-3 keeps together during every pass from now on


def captions_of(objective, rank: int, all_agree) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
    """Captions of the images of a rank, which differ in number and length, and how often each search had to wait."""
    pictures = images(3 - rank, seed=[4, 7][rank])
    if objective.name == "mlm":
        return {"mask_predict": mask_predict(objective, images(2, seed=rank), [2, 5], iterations=3)}, {}
    waited = dict.fromkeys(("greedy", "beam", "prompted"), 0)

    def agree(name: str) -> Any:
        def all_done(done: bool) -> bool:
            all_are = all_agree(done)
            waited[name] += done and not all_are
            return all_are

        return all_done

    captions = {
        "greedy": greedy(decoder_of(objective, pictures), MAX_TOKENS, agree("greedy")),
        "beam": beam(decoder_of(objective, pictures), MAX_TOKENS, 3, all_agree=agree("beam")),
        "prompted": beam(decoder_of(objective, pictures, [36]), MAX_TOKENS, 2, all_agree=agree("prompted")),
    }
    if objective.name == "flm":  # candidates are scored in two passes
        tokens, weights = objective.net.encode(pictures), ScoreWeights(1, 1, 1)
        search = (MAX_TOKENS, 5, 1.0, weights, all_agree)
        captions["both_ways"] = both_ways(objective, decoder_of(objective, pictures), tokens, *search)
    return captions, waited


def train_and_caption(place, name: str, captioning: bool) -> Found:
    from pipeline.distributed.ranks import Agreement
    from pipeline.engine.engine import TrainEngine, prepare_deepspeed

    prepare_deepspeed(torch.device("cpu"))
    config, agreement = tiny_config(), Agreement()
    config.optim.learning_rate = 1e-6  # captions stay those of the weights at the start
    ds_config = resolve(read_ds_config(REPOSITORY / "ds_configs" / "zero3.json"), config, place.world_size, CPU)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else so small a model stays whole
    engine = TrainEngine(captioner(name=name), ds_config, config.optim, config.train, place, agreement)
    found = Found([], {}, [], engine.objective.training, "", [])
    for step in range(2):
        if captioning:
            captions, waited = engine.run(captions_of, place.rank, agreement.all_agree)
            found.captions.append(captions)
            found.waited.update(waited)
        result = engine.step(step, micro_batches(config, place, step, partial(batch_of, name)))
        found.losses.append(global_loss(engine, agreement, result))
    training, outside = engine.objective.training, ""
    names = {id(parameter): name for name, parameter in engine.objective.named_parameters()}
    held = [names[id(parameter)] for _, parameter in engine._deepspeed.module.ds_external_parameters()]
    if captioning:
        try:
            captions_of(engine.objective.eval(), place.rank, lambda done: done)
        except (RuntimeError, IndexError) as error:
            outside = str(error)
    return found._replace(training=training, outside=outside, held=held)


def batch_of(name: str, samples: list[int]):
    captions = [[0, *range(3 + number, 6 + number + number % 4), 2] for number in samples]
    rows = [Row(ids, place, seed=place) for place, ids in enumerate(captions)]
    return captioner(name=name).planner(images(len(samples), seed=samples[0]), rows)


@pytest.mark.slow(40)
@pytest.mark.parametrize("name", ["flm", "mlm"])
def test_captions_in_a_zero3_engine_are_those_outside(name: str) -> None:
    found = run_ranks(2, train_and_caption, name, True)
    for rank, one in enumerate(found):
        expected, _ = captions_of(captioner(name=name), rank, lambda done: done)
        assert one.captions == [expected] * 2
        assert one.training
        assert "size" in one.outside  # there, weights are no more than parts
        assert set(one.held) <= {"net.type_embedding.weight", "net.stream_embedding.weight"}
    assert found[0].captions != found[1].captions
    for search in found[0].waited:
        assert found[0].waited[search] + found[1].waited[search] > 0  # else nothing would be tested
    if name == "flm":
        undisturbed = run_ranks(2, train_and_caption, name, False)
        assert [one.losses for one in found] == [one.losses for one in undisturbed]
