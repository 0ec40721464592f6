"""A bad step is skipped at every ZeRO stage: the run goes on, bit for bit, as one that skips that batch on purpose."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.config.options import GuardConfig
from pipeline.engine.veto import StepVeto
from pipeline.incidents.guard import Guard
from tests.forked_ranks import run_ranks
from tests.pipeline.engine.test_engine import make_engine, micro_batches, tiny_config
from tests.rounding import rounding
from tests.tiny_objective import TinyObjective

STEPS, BAD = 12, (0, 5, 8)  # the first step too: nothing has moments yet
NAN, EXPLODING = 255, 254  # a sample whose image is of this grey all over


class Planted(TinyObjective):
    """Loses its numbers on one grey and multiplies its loss on another."""

    def forward(self, batch):
        flat = batch.images.flatten(1)
        nan, exploding = ((flat == grey).all(1).any() for grey in (NAN, EXPLODING))
        factor = torch.where(nan, math.nan, torch.where(exploding, 1e4, 1.0))
        return {name: value * factor for name, value in super().forward(batch).items()}


def run(place, config, stage: int | str, guarded: bool, poison: dict[int, int], around=(), settings=None) -> dict:
    """Losses by step, what was refused, and the whole state in the end; ``poison`` maps a step to a grey."""
    engine, agreement = make_engine(place, config, stage, lambda: Planted(dropout=0.2))
    guard = Guard(settings or GuardConfig(warmup_steps=3)) if guarded else None
    losses, bad = {}, {}
    for step in range(STEPS):
        if step in around:
            continue
        batches = micro_batches(config, place, step)
        if step in poison and place.rank == 1:  # one sample of one micro-batch of one rank
            batches[1].images = batches[1].images.clone()
            batches[1].images[1] = poison[step]
        result = engine.step(step, batches, guard)
        losses[step] = {name: float(value) for name, value in result.loss_sums.items()}
        assert result.taken == (result.bad is None)
        if result.bad is not None:
            bad[step] = result.bad
    state = {name: {key: t.numpy() for key, t in tensors.items()} for name, tensors in engine.named_state()}
    working = {name: value.detach().float().numpy() for name, value in engine.objective.state_dict().items()}
    if engine.stage == 3:
        working = {}  # in parts; the losses after a skip depend on them
    return {
        "losses": losses,
        "bad": bad,
        "state": state,
        "working": working,
        "adam_steps": engine.optimizer_steps,
        "agreed": agreement.gather(sorted(bad)),
    }


def poisoned_and_clean(place, config, stage: int | str, poison: dict[int, int]) -> tuple[dict, dict]:
    return run(place, config, stage, True, poison), run(place, config, stage, True, {}, tuple(poison))


CASES = [
    (0, "fp32", 0.5),
    (1, "fp32", 0.0),
    (2, "fp32", 0.5),
    (3, "fp32", 0.0),
    (2, "bf16", 0.0),
    (3, "bf16", 0.5),
    ("2_offload", "fp32", 0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision", "clip"), CASES)
def test_skipped_steps_leave_no_trace(stage: int | str, precision: str, clip: float) -> None:
    config = tiny_config(steps=STEPS, precision=precision)
    config.optim.clip_grad_norm = clip
    poison = {0: NAN, 5: EXPLODING, 8: NAN}
    poisoned, clean = zip(*run_ranks(2, poisoned_and_clean, config, stage, poison), strict=True)
    for one, other in zip(poisoned, clean, strict=True):
        assert list(one["bad"]) == list(BAD) and one["agreed"] == [list(BAD)] * 2 and not other["bad"]
        assert one["adam_steps"] == other["adam_steps"] == STEPS - len(BAD)
        assert {step: loss for step, loss in one["losses"].items() if step not in BAD} == other["losses"]
        for kind in ("state", "working"):
            assert one[kind].keys() == other[kind].keys()
        for name, tensors in one["state"].items():
            for key, value in tensors.items():
                assert value.tobytes() == other["state"][name][key].tobytes(), (name, key)
        for name, value in one["working"].items():
            assert value.tobytes() == other["working"][name].tobytes(), name
    evidence = poisoned[0]["bad"]
    assert "loss is not finite" in evidence[0].verdict.reason
    assert "is above" in evidence[5].verdict.reason
    assert evidence[5].modules == poisoned[1]["bad"][5].modules
    total = math.sqrt(sum(row["grad_norm"] ** 2 for row in evidence[5].modules.values()))
    assert total == pytest.approx(evidence[5].grad_norm, rel=1e-2 if precision == "bf16" else rounding(10_000))
    assert evidence[8].modules["head"]["bad_gradients"] > 0 and evidence[8].modules["head"]["bad_weights"] == 0
    assert math.isnan(poisoned[1]["bad"][8].micro_sums[1]["flm"]) and not math.isnan(evidence[8].micro_sums[1]["flm"])


class FakeZero:
    """What the veto touches of DeepSpeed's ZeRO optimizers, in their order."""

    def __init__(self, loss_scale: float) -> None:
        self.loss_scale, self.overflow, self.scale_updates, self.steps = loss_scale, False, [], 0

    def scaled_global_norm(self) -> torch.Tensor:
        return torch.tensor(-1.0 if self.overflow else 3.0 * self.loss_scale)

    def _update_scale(self, overflow: bool) -> None:
        self.scale_updates.append(overflow)

    def step(self, overflow: bool) -> None:
        self.overflow = overflow
        if not overflow:
            self.scaled_global_norm()
        self._update_scale(self.overflow)
        self.steps += not self.overflow


@pytest.mark.parametrize("refuse", [True, False])
def test_a_refusal_never_moves_the_loss_scale(refuse: bool) -> None:
    """fp16 cannot run on a CPU, so its way is walked with a stand-in."""
    optimizer = FakeZero(loss_scale=1024.0)
    veto, asked = StepVeto(optimizer, stage=2), []
    for overflow in (False, True):
        veto.ask = lambda norm, overflow: asked.append((norm, overflow)) or not refuse
        optimizer.step(overflow)
    assert asked == [(3.0, False), (None, True)]
    assert optimizer.scale_updates == [False, True]  # DeepSpeed's own overflow alone
    assert optimizer.steps == (0 if refuse else 1)
    optimizer.step(False)  # nobody guards
    assert len(asked) == 2 and not optimizer.overflow
