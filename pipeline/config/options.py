"""Typed configuration: every option with its default and meaning."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.stores.address import Address, data_path
from model.config import FLMOptions, ModelConfig, ObjectiveOptions
from pipeline.config.task_options import PretrainingOptions, TaskOptions


class ConfigError(ValueError):
    """A mistake of the user: one line that says what was found, what was expected and what to do."""


@dataclass
class DataConfig:
    """Training data.

    Args:
        paths: folders of prepared data, or addresses like s3://BUCKET/FOLDER, as DIR or DIR:WEIGHT (its share in the
            mix); same as --data.
        train_split: split to train on.
        eval_split: split held out for evaluation; null or a missing split evaluates nothing.
        tokenizer: tokenizer folder or Hugging Face name; null is the folder tokenizer inside the first data path.
        texts_per_image: above 1 a sample is an image with up to so many of its texts (captions, questions), which share
            one pass of the vision tower; batch sizes and epochs count images then.
        max_text_length: longest caption in tokens, with <s> and </s>; longer ones are cut.
        shuffle: full draws every sample from anywhere; blocks reads few places at a time (for slow disks and stores).
        shuffle_block: rows that shuffle blocks keeps together.
        shuffle_window: blocks that shuffle blocks mixes at a time; more of them mix better and read from more places.
        num_workers: loader processes per rank; 0 loads in the training process.
        prefetch: micro-batches each worker keeps ready.
        max_pixels: images with more pixels than this are unusable (decompression bombs).
        fast_decode: vectorised resize, and large JPEGs shrunk while decoding; pixels differ by a grey level or two.
        augmentation: random changes of training images before the resize, alike in all frames of a clip: randaugment is
            that of the FLM release, crop_flip of EVLGen's, a random part, mirrored or not.
        frames: frames of each clip that are seen, drawn in training and evenly spaced else; null is for data of images.
        features: read the tokens of the frozen vision tower that `python -m pipeline.features` has written beside the
            shards, in this dtype, instead of images; null reads images.
        bad_sample_budget: unusable samples that are always tolerated.
        bad_sample_share: share of the samples seen that may be unusable beyond bad_sample_budget.
        allow_change: go on from the same position when a resumed run's data, tokenizer or order differ from before.
        timeout_seconds: longest wait for one batch before the run ends with an error.
        stage_dir: folder on a disk of each node to which shards are copied ahead of reading, like ${SLURM_TMPDIR};
            null leaves it to the page cache. Samples are the same.
        stage_gib: room for these copies on each node, in GiB.
    """

    paths: list[str] = field(default_factory=lambda: ["data"])
    train_split: str = "train"
    eval_split: str | None = "dev"
    tokenizer: str | None = None
    texts_per_image: PositiveInt = 1
    max_text_length: PositiveInt = 50
    shuffle: Literal["full", "blocks"] = "full"
    shuffle_block: PositiveInt = 1024
    shuffle_window: PositiveInt = 32
    num_workers: NonNegativeInt = 4
    prefetch: PositiveInt = 4
    max_pixels: PositiveInt = 100_000_000
    fast_decode: bool = True
    augmentation: Literal["none", "randaugment", "crop_flip"] = "none"
    frames: PositiveInt | None = None
    features: Literal["float16", "bfloat16"] | None = None
    bad_sample_budget: NonNegativeInt = 100
    bad_sample_share: ClosedUnitInterval = 0.01
    allow_change: bool = False
    timeout_seconds: PositiveFloat = 180.0
    stage_dir: str | None = None
    stage_gib: PositiveFloat = 100.0


@dataclass
class OptimConfig:
    """Optimisation: AdamW with a learning rate for each group of parameters, warm-up and decay.

    Args:
        batch_size: samples per optimizer step over all ranks; accumulation is derived from it.
        micro_batch_size: samples per forward pass on one rank.
        learning_rate: peak learning rate of the pretrained towers.
        lr_mult_vision: multiplier of the learning rate for the vision tower, on top of what its group has.
        lr_mult_head: multiplier of the learning rate for the heads.
        lr_mult_cross: multiplier of the learning rate for the cross-modal layers and the reconstructor.
        betas: decay rates of Adam's two moments.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay; biases and layer norms are never decayed.
        warmup_fraction: share of the steps over which the learning rate rises linearly from 0.
        schedule: shape of the learning rate after the warm-up.
        end_lr: learning rate at the last step (times the same multipliers).
        clip_grad_norm: largest gradient norm; 0 does not clip.
    """

    batch_size: PositiveInt = 4096
    micro_batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 8e-5
    lr_mult_vision: PositiveFloat = 1.0
    lr_mult_head: PositiveFloat = 5.0
    lr_mult_cross: PositiveFloat = 5.0
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    warmup_fraction: ClosedUnitInterval = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    end_lr: NonNegativeFloat = 0.0
    clip_grad_norm: NonNegativeFloat = 0.0


@dataclass
class TrainConfig:
    """The run.

    Args:
        steps: optimizer steps.
        epochs: passes over the training samples, instead of steps; null goes by steps. What is named last counts.
        seed: seed of initialisation, sample order, spans and dropout.
        precision: auto is bf16 where the device has it and ZeRO's stage allows it, else fp32.
        compile: compile the model with torch.compile.
        log_every: steps between log lines.
        eval_every: steps between evaluations; 0 evaluates only at the end.
        eval_samples: held-out samples per evaluation; null takes the whole split.
        save_every: steps between checkpoints; 0 saves only at the end and when told to stop.
        save_minutes: minutes between checkpoints, besides save_every; 0 goes by steps only.
        save_before_eval_seconds: save before an evaluation if the last one took longer than this; 0 never does.
        async_save: write checkpoints while training goes on; needs memory for a copy of weights and moments.
        keep_last: newest checkpoints to keep.
        keep_every: keep the checkpoint of every n-th step for good; 0 keeps none.
        keep_best: held-out value whose best checkpoint is kept, like flm_loss (lower is better) or flm_accuracy.
        patience: end after so many evaluations in a row without a better keep_best; 0 never does.
        collective_timeout_minutes: after so long a rank that does not answer ends the run, with all ranks' stacks.
        set_up_timeout_minutes: after so long without an end of the set-up the ranks that hold it up are named, and
            the run ends with all ranks' stacks; the first step, which may compile, has as long.
        step_timeout_minutes: the same for the part of a step, or of what follows it, that one rank is in.
        evaluation_timeout_minutes: the same for one batch of an evaluation, or what follows the last one.
        save_timeout_minutes: the same for a save that training waits for.
    """

    steps: PositiveInt = 30_000
    epochs: PositiveFloat | None = None
    seed: NonNegativeInt = 2022
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 1000
    eval_samples: PositiveInt | None = 2048
    save_every: NonNegativeInt = 1000
    save_minutes: NonNegativeFloat = 0.0
    save_before_eval_seconds: NonNegativeFloat = 300.0
    async_save: bool = True
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    keep_best: str | None = None
    patience: NonNegativeInt = 0
    collective_timeout_minutes: PositiveFloat = 30.0
    set_up_timeout_minutes: PositiveFloat = 60.0
    step_timeout_minutes: PositiveFloat = 10.0
    evaluation_timeout_minutes: PositiveFloat = 25.0
    save_timeout_minutes: PositiveFloat = 25.0


@dataclass
class GuardConfig:
    """What is done with a bad step: one whose loss or gradient is not finite, or far above what is usual.

    Such a step is skipped on all ranks alike and recorded in RUN/incidents.

    Args:
        enabled: judge every step before the optimizer takes it, which waits for the device once a step.
        loss_sigmas: a loss so many standard deviations above its running mean is a spike; 0 judges no spikes of it.
        grad_norm_sigmas: the same for the logarithm of the gradient norm.
        memory_steps: steps over which running means and deviations forget.
        warmup_steps: good steps before spikes are judged; what is not finite is always skipped.
        max_skips: bad steps tolerated within window_steps.
        window_steps: steps in which max_skips may happen.
        action: past max_skips, rewind to a checkpoint from before them and skip their batches, or stop.
        go_around_before: steps before the first bad one whose batches a rewind skips too.
        max_rewinds: rewinds before the run stops anyway.
        save_incident_every: steps between two checkpoints made for replaying incidents; 0 makes none.
    """

    enabled: bool = True
    loss_sigmas: NonNegativeFloat = 8.0
    grad_norm_sigmas: NonNegativeFloat = 8.0
    memory_steps: PositiveInt = 200
    warmup_steps: NonNegativeInt = 100
    max_skips: NonNegativeInt = 5
    window_steps: PositiveInt = 200
    action: Literal["rewind", "stop"] = "rewind"
    go_around_before: NonNegativeInt = 50
    max_rewinds: NonNegativeInt = 2
    save_incident_every: NonNegativeInt = 500


@dataclass
class TrackingConfig:
    """Where numbers go besides log.jsonl.

    Args:
        tensorboard: write RUN/tensorboard.
        wandb: log to Weights & Biases (needs the wandb package and a login).
        report: write RUN/report.html at the end.
        sample_keys: write the keys of each step's samples to RUN/sample_keys-rank<R>.jsonl.
    """

    tensorboard: bool = True
    wandb: bool = False
    report: bool = True
    sample_keys: bool = False


@dataclass
class Config:
    """Everything that decides what a run computes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveOptions = field(default_factory=FLMOptions)
    task: TaskOptions = field(default_factory=PretrainingOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def validate(config: Config) -> None:
    if not config.data.paths:
        raise ConfigError("data.paths is empty; give --data DIR")
    if max(config.optim.betas) >= 1:
        raise ConfigError(
            f"optim.betas: found {list(config.optim.betas)}, expected two numbers below 1, like [0.9, 0.98]"
        )
    for name, value in flatten(config.optim, "optim."):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: found {value}, expected a finite number")
    if config.optim.lr_mult_vision != 1 and config.model.vision.frozen and config.model.vision.temporal is None:
        raise ConfigError(
            f"optim.lr_mult_vision {config.optim.lr_mult_vision:g} does nothing where model.vision.frozen is true; use"
            " --optim.lr_mult_vision 1, or train the tower by --model.vision.frozen false"
        )
    _check_length(config.train)
    if config.data.stage_dir is not None:
        refuse_address(config.data.stage_dir, "--data.stage_dir")
        if not config.data.stage_dir or not math.isfinite(config.data.stage_gib):
            found = f"{config.data.stage_dir!r} with data.stage_gib {config.data.stage_gib}"
            raise ConfigError(f"data.stage_dir: found {found}, expected a folder and a number of GiB; or use null")
    try:
        config.objective.check()
        config.task.check()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    chosen = in_batch_negatives(config)
    if chosen is not None and config.optim.micro_batch_size < 2:
        option, _, value = chosen.partition(" ")
        without = {"objective.name": "another --objective.name", "objective.itc_weight": "--objective.itc_weight 0"}
        other = without.get(option, f"--{option} corpus")
        raise ConfigError(
            f"{option} {value} finds no other caption in an optim.micro_batch_size of 1; use 2 or more, or {other}"
        )
    limit = config.model.text.max_positions - 2
    if config.data.max_text_length > limit and not reads_by_language_model(config):
        raise ConfigError(
            f"data.max_text_length {config.data.max_text_length} exceeds the text tower's {limit} positions "
            f"(model.text.max_positions - 2); use --data.max_text_length {limit}"
        )
    if config.data.max_text_length < 3:
        raise ConfigError(
            f"data.max_text_length: found {config.data.max_text_length}, expected at least 3 (<s> word </s>)"
        )


def _check_length(train: TrainConfig) -> None:
    if train.epochs is not None and not math.isfinite(train.epochs):
        raise ConfigError(f"train.epochs: found {train.epochs}, expected a finite number, or null to go by train.steps")
    if train.patience and train.keep_best is None:
        raise ConfigError(
            f"train.patience {train.patience} needs a held-out value that must get better; name it by "
            "--train.keep_best, like flm_loss, or use --train.patience 0"
        )
    if train.patience and not train.eval_every:
        raise ConfigError(
            f"train.patience {train.patience} counts evaluations, and train.eval_every 0 makes none before the end; "
            "use --train.eval_every N, or --train.patience 0"
        )


def in_batch_negatives(config: Config) -> str | None:
    """The option by which wrong captions come out of the micro-batch, so that its size is part of the run."""
    if config.objective.name == "qformer_stage1":
        return "objective.name qformer_stage1"
    if config.task.name == "pretraining" and getattr(config.objective, "negatives", None) == "in_batch_hard":
        return "objective.negatives in_batch_hard"
    if config.task.name == "pretraining" and getattr(config.objective, "itc_weight", 0):
        return f"objective.itc_weight {config.objective.itc_weight:g}"
    return "task.negatives in_batch" if getattr(config.task, "negatives", None) == "in_batch" else None


def accumulation_steps(optim: OptimConfig, world_size: int) -> int:
    """Micro-batches per rank and step, so that the effective batch is ``batch_size`` on any number of ranks."""
    per_pass = optim.micro_batch_size * world_size
    if optim.batch_size % per_pass == 0:
        return optim.batch_size // per_pass
    share, remainder = divmod(optim.batch_size, world_size)
    if remainder:
        lower = max(share, 1) * world_size
        fix = f"--optim.batch_size {lower} (a multiple of {world_size} ranks)"
    else:
        limit = min(share, optim.micro_batch_size)
        fix = f"--optim.micro_batch_size {next(n for n in range(limit, 0, -1) if share % n == 0)}"
    raise ConfigError(
        f"optim.batch_size {optim.batch_size} is not a multiple of optim.micro_batch_size {optim.micro_batch_size} "
        f"x {world_size} ranks = {per_pass}; use {fix}"
    )


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted option, value) of every setting of a dataclass, in order of declaration."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the leaves of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_plain(config: Any) -> dict[str, Any]:
    """Nested dicts of plain numbers, strings and lists, fit for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_config(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def fail(error: ValueError, is_main: bool = True) -> int:
    """Print a user's mistake as one line, on one rank only; returns the exit code of configuration errors."""
    if is_main:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


def weighted_paths(data: DataConfig) -> list[tuple[Path | Address, float | None]]:
    """(folder or address, weight or None) of each entry DIR or DIR:WEIGHT of ``data.paths``; raises ValueError."""
    result: list[tuple[Path | Address, float | None]] = []
    for entry in data.paths:
        folder, _, tail = entry.rpartition(":")
        if not folder or _is_whole(entry):
            result.append((data_path(entry), None))
            continue
        try:
            weight = float(tail)
        except ValueError:
            result.append((data_path(entry), None))
            continue
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data.paths: {entry}: found weight {tail}, expected a number above 0")
        result.append((data_path(folder), weight))
    return result


def _is_whole(entry: str) -> bool:
    """Whether an entry with a colon is a name without weight: a folder of that name, or a server and its port."""
    scheme, _, rest = entry.partition("://")
    return (scheme.lower() in ("http", "https") and "/" not in rest) if rest else Path(entry).exists()


def refuse_address(path: str, option: str) -> None:
    """Raise ConfigError for an address like s3://BUCKET where a folder is expected."""
    if "://" in path:
        raise ConfigError(
            f"{option} {path}: found an address, expected a folder; only --data is read from stores; mount it "
            "or copy it, and give the folder"
        )


def reads_by_language_model(config: Config) -> bool:
    """Whether texts are read by a language model, by the tokens of its own tokenizer."""
    return config.objective.name == "evlgen"
