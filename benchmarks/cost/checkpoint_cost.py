"""What a checkpoint costs: ours against DeepSpeed's own, in turns, in one run.

    python -m benchmarks.cost.checkpoint_cost [--millions 350] [--stage 2] [--ranks 1] [--repeats 3] [--folder DIR]
                                         [--output benchmarks/results/NAME.json]

The model is a stack of linear layers with its Adam state; every rank is a forked process. Of ours: the stall that
training sees, the seconds until the checkpoint stands (written, synced, hashed, published, sizes proven), and loading
with and without proving every hash. Of DeepSpeed's: ``save_checkpoint`` (which is all stall), the same followed by a
sync of the file system, as ours is synced, and ``load_checkpoint``. Both load into an engine that has stepped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint import restore
from pipeline.checkpoint.files import defect
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.state import RunState
from pipeline.config.options import Config
from pipeline.deepspeed_json.ds_config import Device, read_ds_config, resolve
from pipeline.distributed.endings import leave
from pipeline.distributed.host_cores import usable_cores
from pipeline.distributed.launching import reserve_port
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.distributed.rendezvous import connect

REPOSITORY = Path(__file__).resolve().parents[2]
WIDTH = 2048  # 4.2 M parameters a layer, as in a large transformer


class Stack(nn.Module):
    """Linear layers that nothing runs through: the step below sets their gradients."""

    def __init__(self, millions: float) -> None:
        super().__init__()
        count = max(1, round(millions * 1e6 / (WIDTH * WIDTH + WIDTH)))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        self.term_weights = {"flm": 1.0}

    def forward(self, batch: Tensor) -> Tensor:
        for layer in self.layers:
            batch = batch + 1e-3 * layer(batch)
        return batch.square().mean()

    def parameter_group(self, name: str) -> str:
        return "rest"

    def decays(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    listening, variables = reserve_port()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        ranks = [
            context.Process(target=work, args=(rank, arguments, variables, Path(folder), send))
            for rank in range(arguments.ranks)
        ]
        for rank in ranks:
            rank.start()
        listening.close()
        send.close()
        try:
            measured = receive.recv()
        except EOFError:
            print("error: a rank ended early; its own message stands above", file=sys.stderr)
            return 1
        finally:
            for rank in ranks:
                rank.join()
    result = describe(arguments, argv) | measured
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost.checkpoint_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--millions", type=float, default=350.0, help="million parameters (default 350)")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="ZeRO stage (default 2)")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="turns of both (default 3)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    return parser.parse_args(argv)


def work(rank: int, arguments: argparse.Namespace, variables: dict[str, str], folder: Path, send: Any) -> None:
    """One rank; rank 0 sends the figures."""
    os.environ.update(variables)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    place = Place(rank, arguments.ranks, rank, "environment")
    try:
        connect(place, torch.device("cpu"))
        figures = measure(place, arguments, folder)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        leave(1)
    if place.is_main:
        send.send(figures)
        send.close()
    leave(0)


def measure(place: Place, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each kind per turn, bytes written, and the number of parameters."""
    from pipeline.engine.engine import TrainEngine, prepare_deepspeed

    prepare_deepspeed(torch.device("cpu"))
    config = Config()
    config.optim.batch_size, config.optim.micro_batch_size = place.world_size, 1
    config.train.keep_last, config.train.precision = 1, "fp32"
    given = read_ds_config(REPOSITORY / "ds_configs" / f"zero{arguments.stage}.json")
    ds_config = resolve(given, config, place.world_size, Device(kind="cpu", has_bf16=True))
    agreement = Agreement()
    torch.manual_seed(0)
    engine = TrainEngine(Stack(arguments.millions), ds_config, config.optim, config.train, place, agreement)
    take_a_step(engine)
    saver = Saver(folder / "ours", engine, config.train, place, agreement)
    seconds: dict[str, list[float]] = {}
    for turn in range(arguments.repeats):
        ours(engine, saver, turn + 1, agreement, seconds, folder / "ours")
        theirs(engine, turn + 1, agreement, seconds, folder / "theirs", place)
    num_bytes = {name: bytes_in(folder / name) for name in ("ours", "theirs")}
    return {
        "parameters": sum(parameter.numel() for parameter in engine.objective.parameters()),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "median_seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "bytes": num_bytes,
    }


def take_a_step(engine: Any) -> None:
    """Adam's state comes to be at the first step."""
    inner = engine._deepspeed
    loss = engine.objective(torch.ones(1, WIDTH))
    inner.backward(loss)
    inner.step()


def ours(engine: Any, saver: Saver, step: int, agreement: Agreement, seconds: dict, run: Path) -> None:
    with timed("ours: stall", seconds, agreement) as began:
        assert saver.save(RunState(step=step))
    assert saver.wait()
    agreement.wait()
    seconds.setdefault("ours: until it stands", []).append(time.perf_counter() - began)
    path = run / "checkpoints" / f"step_{step:08d}"
    with timed("ours: proving all hashes", seconds, agreement):
        assert agreement.gather(defect(path) if saver._place.is_main else None)[0] is None
    with timed("ours: load", seconds, agreement):
        restore.load(path, engine)


def theirs(engine: Any, step: int, agreement: Agreement, seconds: dict, folder: Path, place: Place) -> None:
    inner = engine._deepspeed
    if place.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    with timed("DeepSpeed: save (all stall)", seconds, agreement) as began, quiet():
        inner.save_checkpoint(str(folder), tag=f"step{step}")
    if place.is_main:
        os.sync()
    agreement.wait()
    seconds.setdefault("DeepSpeed: save, synced", []).append(time.perf_counter() - began)
    with timed("DeepSpeed: load", seconds, agreement), quiet():
        assert inner.load_checkpoint(str(folder), tag=f"step{step}")[0] is not None


@contextlib.contextmanager
def timed(name: str, seconds: dict[str, list[float]], agreement: Agreement):
    """Seconds until the last rank is done; gives the moment of the start."""
    agreement.wait()
    began = time.perf_counter()
    yield began
    agreement.wait()
    seconds.setdefault(name, []).append(time.perf_counter() - began)


def quiet() -> contextlib.AbstractContextManager:
    return contextlib.redirect_stdout(io.StringIO())


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe(arguments: argparse.Namespace, argv: list[str] | None) -> dict[str, Any]:
    import deepspeed
    import safetensors

    from pipeline.recording.environment import device_name

    given = [argument for argument in (sys.argv[1:] if argv is None else argv)]
    return {
        "command": " ".join(["python -m benchmarks.cost.checkpoint_cost", *given]),
        "hardware": f"{device_name(torch.device('cpu'))}, {usable_cores()} cores",
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "safetensors": safetensors.__version__,
        },
        "ranks": arguments.ranks,
        "zero_stage": arguments.stage,
    }


def table(result: dict[str, Any]) -> str:
    """A Markdown table of medians, with the range of the turns."""
    rows = ["| | seconds, median | range |", "|---|---|---|"]
    for name, values in result["seconds"].items():
        rows.append(f"| {name} | {result['median_seconds'][name]:.1f} | {min(values):.1f} to {max(values):.1f} |")
    sizes = ", ".join(f"{name} {num_bytes / 1e9:.2f} GB" for name, num_bytes in result["bytes"].items())
    head = (
        f"{result['parameters'] / 1e6:.0f} M parameters, ZeRO {result['zero_stage']}, {result['ranks']} rank(s), "
        f"{result['hardware']}; {sizes}"
    )
    return "\n".join([head, "", *rows])


if __name__ == "__main__":
    sys.exit(main())
