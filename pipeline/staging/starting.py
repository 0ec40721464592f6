"""Starts staging on all ranks together: finds out which ranks share a folder, and which one of them copies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.stores.kept_files import own_folder
from pipeline.config.options import Config, ConfigError, DataConfig
from pipeline.data.order import SampleOrder
from pipeline.data.shard_reader import Corpus
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.endings import host_name
from pipeline.distributed.ranks import Agreement
from pipeline.staging.node_folder import READY, name_of
from pipeline.staging.plan import ReadsAhead
from pipeline.staging.stager import Stager, reason

GIB = 2**30
_NUM_NAMED = 3  # hosts in a warning


def start_staging(
    config: Config, corpora: Sequence[Corpus], order: SampleOrder, ranks: Ranks, accumulation: int, step: int
) -> Stager | None:
    """Let the training ``corpora`` read copies in ``data.stage_dir``, and copy what is read from ``step`` on.

    Every rank must call it. Of the ranks that share a folder the first gets the stager. A rank whose folder can't be
    used reads the originals; that is said once. Raises ConfigError, on every rank, for a variable that is not set.
    """
    settings, agreement = config.data, ranks.agreement
    if settings.stage_dir is None:
        return None
    base, problem = _folder_of_this_user(settings, agreement)
    identities = agreement.gather(None if base is None else _identity(base))
    sharing = [rank for rank, one in enumerate(identities) if one is not None and one == identities[agreement.rank]]
    stager = None
    if sharing and agreement.rank == sharing[0]:
        stager, problem = _stager(base, config, corpora, order, ranks, sharing, accumulation)
    problems = agreement.gather(problem)
    wrong = sorted({one for one in problems if one is not None})
    if wrong:
        more = f" and {len(wrong) - _NUM_NAMED} more" if len(wrong) > _NUM_NAMED else ""
        named = f"{', '.join(wrong[:_NUM_NAMED])}{more}"
        ranks.say(f"warning: data.stage_dir can't be used on {named}; originals are read there", error=True)
    if not sharing or problems[sharing[0]] is not None:
        return None
    for corpus in corpora:
        corpus.read_copies_in(base / name_of(corpus.manifest) / READY)
    if stager is not None:
        ranks.say(stager.description(step))
        stager.start(step)
    return stager


def _folder_of_this_user(settings: DataConfig, agreement: Agreement) -> tuple[Path | None, str | None]:
    """The folder that copies of this user go to, or what is wrong with it; raises ConfigError on every rank."""
    stage_dir = os.path.expandvars(settings.stage_dir)
    without = [host for host in agreement.gather(host_name() if "$" in stage_dir else None) if host is not None]
    if without:
        raise ConfigError(
            f"data.stage_dir: found {settings.stage_dir}, in which a variable is not set on {without[0]}; set it, name "
            "another folder, or use null"
        )
    try:
        return own_folder(Path(stage_dir)), None
    except OSError as error:
        return None, _problem(error)


def _stager(
    base: Path,
    config: Config,
    corpora: Sequence[Corpus],
    order: SampleOrder,
    ranks: Ranks,
    sharing: Sequence[int],
    accumulation: int,
) -> tuple[Stager | None, str | None]:
    """The stager of the ranks ``sharing`` a folder, which it has taken, or what is wrong."""
    by_image, shards = config.data.texts_per_image > 1, [corpus.manifest.shards for corpus in corpora]
    samples = [table.samples if by_image else table.rows for table in shards]
    world, micro_batch = ranks.place.world_size, config.optim.micro_batch_size
    ahead = ReadsAhead(order, samples, sharing, world, micro_batch, accumulation, config.train.steps)
    stager = Stager(base, corpora, ahead, np.concatenate(samples), int(config.data.stage_gib * GIB))
    try:
        stager.take_folders()
    except OSError as error:
        return None, _problem(error)
    return stager, None


def _problem(error: OSError) -> str:
    return f"{host_name()} ({reason(error)})"


def _identity(folder: Path) -> tuple[str, int, int]:
    """Equal for ranks that see the same folder, on whatever path and whatever their host is called."""
    found = os.stat(folder)
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = host_name()
    return machine, found.st_dev, found.st_ino
