"""DeepSpeed engine: every ZeRO stage computes the same run, losses are means over all targets of all ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pipeline.config.options import Config
from pipeline.deepspeed_json.ds_config import Device, read_ds_config, resolve
from tests.forked_ranks import run_ranks
from tests.rounding import TINY
from tests.tiny_flm import flm_batch, tiny_flm
from tests.tiny_objective import TinyObjective, tiny_batch

REPOSITORY = Path(__file__).resolve().parents[3]
CPU = Device(kind="cpu", has_bf16=True)
CASES = {  # name -> (objective from the seeded generator, batch of sample numbers)
    "stand_in": (TinyObjective, tiny_batch),
    "flm": (lambda: tiny_flm(seed=3, spread=0.4, corruption_rate=0.4), flm_batch),
}


def tiny_config(batch_size: int = 8, micro: int = 2, steps: int = 20, precision: str = "fp32") -> Config:
    config = Config()
    config.optim.batch_size, config.optim.micro_batch_size = batch_size, micro
    config.optim.learning_rate, config.optim.warmup_fraction = 3e-3, 0.2
    config.train.steps, config.train.precision, config.train.seed = steps, precision, 5
    return config


def make_engine(place, config: Config, stage: int, objective=TinyObjective):
    from pipeline.distributed.ranks import Agreement
    from pipeline.engine.engine import TrainEngine, prepare_deepspeed

    prepare_deepspeed(torch.device("cpu"))
    torch.manual_seed(3)
    given = read_ds_config(REPOSITORY / "ds_configs" / f"zero{stage}.json")
    ds_config = resolve(given, config, place.world_size, CPU)
    agreement = Agreement()
    engine = TrainEngine(objective(), ds_config, config.optim, config.train, place, agreement)
    return engine, agreement


def micro_batches(config: Config, place, step: int, batch=tiny_batch) -> list:
    """This rank's micro-batches of a step; the samples of a step do not depend on the number of ranks."""
    from pipeline.data.order import micro_batch_positions

    size = config.optim.micro_batch_size
    accumulation = config.optim.batch_size // size // place.world_size
    layout = (place.rank, place.world_size, size, accumulation)
    return [batch(list(micro_batch_positions(step, micro, *layout))) for micro in range(accumulation)]


def global_loss(engine, agreement, result) -> float:
    names = sorted(result.loss_sums)
    sums = agreement.total([float(result.loss_sums[name]) for name in names])
    return sum(engine.term_weights[n] * s / max(result.counts[n], 1) for n, s in zip(names, sums, strict=True))


def losses_of_run(place, config: Config, stage: int, steps: int, case: str) -> list[float]:
    objective, batch = CASES[case]
    engine, agreement = make_engine(place, config, stage, objective)
    results = (engine.step(step, micro_batches(config, place, step, batch)) for step in range(steps))
    return [global_loss(engine, agreement, result) for result in results]


def plain_losses(config: Config, steps: int, case: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same run without DeepSpeed: one process, the joined batch, torch's AdamW. Also the gradients of step 0."""
    from pipeline.engine.optim import learning_rate, parameter_groups, set_learning_rate

    torch.manual_seed(3)
    objective, make_batch = CASES[case]
    model = objective().train()
    groups = parameter_groups(model.named_parameters(), model.parameter_group, model.decays, config.optim)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    losses, gradients = [], {}
    for step in range(steps):
        size = config.optim.batch_size
        batch = make_batch(list(range(step * size, (step + 1) * size)))
        sums = model(batch)
        loss = sum(model.term_weights[name] * value / max(batch.counts[name], 1) for name, value in sums.items())
        optimizer.zero_grad()
        loss.backward()
        set_learning_rate(optimizer.param_groups, learning_rate(step, config.train.steps, config.optim))
        if step == 0:
            gradients = {name: copy.deepcopy(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_train_like_plain_torch(stage: int, case: str) -> None:
    config, steps = tiny_config(), 20 if case == "stand_in" else 8  # a wrong update shows at the next step
    found = run_ranks(2, losses_of_run, config, stage, steps, case)
    expected, _ = plain_losses(config, steps, case)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < 0.9 * expected[0]


def gradients_of_step(place, config: Config, stage: int, case: str) -> dict[str, torch.Tensor]:
    """What one step's backward leaves in the engine: the gradients that the optimizer is about to use."""
    from deepspeed.utils import safe_get_full_grad

    objective, batch = CASES[case]
    engine, _ = make_engine(place, config, stage, objective)
    seen = {}
    step = engine._deepspeed.step

    def note_gradients() -> None:
        if engine._deepspeed.is_gradient_accumulation_boundary():
            for name, parameter in engine.objective.named_parameters():
                seen[name] = safe_get_full_grad(parameter).detach().clone().numpy()
        step()

    engine._deepspeed.step = note_gradients
    engine.step(0, micro_batches(config, place, 0, batch))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [0, 2])
def test_gradients_equal_those_of_the_joined_batch(stage: int, case: str) -> None:
    """2 ranks x 2 micro-batches with unequal numbers of targets against one process on all samples at once."""
    config = tiny_config(batch_size=8, micro=2)
    found = run_ranks(2, gradients_of_step, config, stage, case)
    _, expected = plain_losses(config, 1, case)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        # There and back, relative to the numbers that were summed: sums may cancel to a hundredth of their terms.
        tolerance = 2 * TINY * max(gradient.abs().max(), largest / 100)
        for rank in found:
            torch.testing.assert_close(torch.from_numpy(rank[name]), gradient, atol=tolerance, rtol=0, msg=name)


def losses_and_norms(place, config: Config, stage: int, batches: list[list[int]]) -> list[tuple[float, float]]:
    engine, agreement = make_engine(place, config, stage)
    results = [engine.step(step, [tiny_batch(samples)]) for step, samples in enumerate(batches)]
    return [(global_loss(engine, agreement, result), float(result.grad_norm)) for result in results]


def test_a_term_without_targets_anywhere_contributes_nothing() -> None:
    """Invariant 4: samples 1..4 have no target of the rare term; loss and gradient stay finite."""
    config = tiny_config(batch_size=4, micro=4)
    [found] = run_ranks(1, losses_and_norms, config, 0, [[1, 2, 3, 4]])
    model_loss, norm = found[0]
    assert 0 < model_loss < 10
    assert 0 < norm < 100


@pytest.mark.slow(25)
@pytest.mark.parametrize(("stage", "case"), [(1, "stand_in"), (2, "stand_in"), (3, "stand_in"), (2, "flm")])
def test_bf16_trains(stage: int, case: str) -> None:
    config = tiny_config(steps=40, precision="bf16")
    config.optim.learning_rate = 1e-2 if case == "stand_in" else 2e-3
    exact, _ = plain_losses(config, 40, case)
    found = run_ranks(2, losses_of_run, config, stage, 40, case)[0]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert found == pytest.approx(exact, abs=0.15)


def scores_and_mode(place, config: Config, stage: int) -> tuple[dict, bool]:
    engine, _ = make_engine(place, config, stage, lambda: TinyObjective(0.5))
    batch = tiny_batch([0, 1, 2])
    with engine.scoring() as score:
        first, second = (score(TinyObjective.score, batch) for _ in range(2))
    assert all(torch.equal(first[name][0], second[name][0]) for name in first), "dropout is on while scoring"
    return {name: (float(s), float(c)) for name, (s, c) in first.items()}, engine.objective.training


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_scoring_is_deterministic_and_restores_training(stage: int) -> None:
    torch.manual_seed(3)
    model = TinyObjective().eval()
    expected = {name: (float(s), float(c)) for name, (s, c) in model.score(tiny_batch([0, 1, 2])).items()}
    for found, training in run_ranks(2, scores_and_mode, tiny_config(), stage):
        assert training
        assert {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()} == found
