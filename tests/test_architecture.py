"""Enforces the import law of docs/architecture.md on every file, lazy imports counted."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Lowest rung first: a file imports only from lines before its own. A new file gets its place here.
RUNGS: dict[str, list[list[str]]] = {
    "model": [
        ["batch", "config", "dropout", "kept_memory", "torchvision_shim"],
        ["masks", "merge", "behaviour", "flops", "row_attention"],
        ["attention"],
        ["layers"],
        ["plan", "vision", "text"],
        ["reconstructor", "heads", "baseline_plan", "hard_negatives"],
        ["towers"],
        ["flm", "one_stream"],
        ["objectives", "decode", "decode_masked", "weights"],
        ["released"],
        ["build"],
    ],
    "data_prep": [
        ["manifest", "record", "parallel", "scenes", "bounded_download"],
        ["filters", "shard_writer", "drawing", "tables", "info"],
        ["prepare", "fetch"],
        ["sources", "synth", "verify", "tokenizer"],
        ["verbs"],
        ["__main__"],
    ],
    "pipeline": [
        ["step_lines"],
        [
            "config",
            "host_memory",
            "order",
            "ranks",
            "preempt",
            "metrics",
            "sample_keys",
            "incidents",
            "run_lock",
            "figures",
            "caption_scores",
            "tokenizer",
            "transforms",
            "environment",
            "inert_pickle",
            "launching",
            "hub",
        ],
        ["shard_files", "convert", "starting_weights"],
        ["shard_reader", "optim", "ds_config", "command_line", "changes"],
        ["guard", "veto", "module_statistics"],
        ["collate", "checkpoint_files", "unusable"],
        ["caption_lengths"],
        ["datasets", "shared_batches", "full_state", "retention", "rewind"],
        ["engine"],
        ["checkpoint", "meter"],
        ["desks"],
        ["loader", "saver"],
        ["open_data"],
        ["fingerprint"],
        ["run_setup", "evaluate", "generate", "report", "replay"],
        ["bad_steps"],
        ["training_loop"],
        ["train"],
    ],
}
MAY_IMPORT = {"model": set(), "data_prep": set(), "pipeline": {"model", "data_prep.manifest"}}
OURS = {"model", "data_prep", "pipeline", "benchmarks", "scripts", "tests"}
FOREIGN_TO = {
    "model": {
        "deepspeed",
        "webdataset",
        "img2dataset",
        "mpi4py",
        "pyarrow",
        "pandas",
        "jsonargparse",
        "yaml",
        "jinja2",
    },
    "data_prep": {"torch", "torchvision", "deepspeed", "open_clip", "timm"},
    "pipeline": {"img2dataset"},
}
CONFINED = {  # module -> the only files of the three packages that touch it
    "torch.distributed": {"pipeline/ranks.py", "pipeline/engine.py"},
    "deepspeed": {"pipeline/engine.py", "pipeline/full_state.py"},
    "torch.utils.tensorboard": {"pipeline/metrics.py"},
    "tensorboard": {"pipeline/metrics.py"},
    "wandb": {"pipeline/metrics.py"},
}
NEEDS_SHIM = {"torchvision", "timm", "open_clip"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_LINES = 400


def python_files(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


FILES = [pytest.param(path, id=str(path.relative_to(REPOSITORY))) for name in RUNGS for path in python_files(name)]


def is_module(dotted: str) -> bool:
    path = REPOSITORY.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imported_modules(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports or reaches by attribute, wherever in the file it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])
            for alias in node.names:
                dotted = f"{base}.{alias.name}"
                ours = base.split(".")[0] in OURS
                yield node.lineno, dotted if (is_module(dotted) if ours else dotted in CONFINED) else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                yield node.lineno, str(node.args[0].value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in CONFINED:
            yield node.lineno, ast.unparse(node)


def rung_of(package: str, name: str) -> int | None:
    return next((height for height, names in enumerate(RUNGS[package]) if name in names), None)


def within(dotted: str, parent: str) -> bool:
    return dotted == parent or dotted.startswith(parent + ".")


def violations(source: str, path: str) -> list[str]:
    """What the file at ``path`` (relative to the repository) does against the import law."""
    package, *_, stem = path.removesuffix(".py").split("/")
    module = path.removesuffix(".py").replace("/", ".")
    own_rung = rung_of(package, stem)
    if own_rung is None and stem != "__init__":
        table = f"RUNGS['{package}'] in tests/test_architecture.py"
        return [f"{path} has no rung: add '{stem}' to {table}, after all files it imports, before all that import it"]
    found = []
    for line, target in imported_modules(source, module):
        top, _, rest = target.partition(".")
        complain = lambda reason, line=line, target=target: found.append(f"{path}:{line} imports {target}: {reason}")  # noqa: E731
        if target == module:  # a program that takes its own importable name, for pickling
            continue
        if top == package and own_rung is not None:
            other = rung_of(package, rest.split(".")[0]) if rest else None
            if other is None:
                complain(f"write `from {package}.FILE import NAME` with a file that has a rung")
            elif other >= own_rung:
                complain(f"{stem} stands on rung {own_rung}, {rest} on rung {other}; only lower rungs may be imported")
        elif top in OURS and not any(within(target, allowed) for allowed in MAY_IMPORT[package]):
            complain(f"{package} may import only {sorted(MAY_IMPORT[package]) or 'foreign modules'}")
        elif top in FOREIGN_TO[package]:
            complain(f"{package} must work without it")
        for confined, allowed in CONFINED.items():
            if within(target, confined) and path not in allowed:
                complain(f"{confined} is touched in {sorted(allowed)} only")
        if top in NEEDS_SHIM and "ensure_torchvision(" not in source:
            complain("call model.torchvision_shim.ensure_torchvision() before this import")
    return found


@pytest.mark.parametrize("path", FILES)
def test_import_law(path: Path) -> None:
    relative = path.relative_to(REPOSITORY).as_posix()
    assert violations(path.read_text(encoding="utf-8"), relative) == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("model/flm.py", "from pipeline.train import main", "model may import only"),
        ("model/flm.py", "def f():\n    import data_prep.manifest", "model may import only"),
        ("model/layers.py", "def f():\n    from model.flm import FLM", "only lower rungs"),
        ("model/layers.py", "from .flm import FLM", "only lower rungs"),
        ("model/layers.py", "from . import flm", "only lower rungs"),
        ("model/text.py", "from model import vision", "only lower rungs"),
        ("model/flm.py", "import model", "write `from model.FILE"),
        ("model/vision.py", "import open_clip", "ensure_torchvision"),
        ("model/weights.py", "import importlib\nimportlib.import_module('deepspeed')", "must work without it"),
        ("data_prep/synth.py", "import torch", "must work without it"),
        ("data_prep/__main__.py", "from pipeline.config import Config", "data_prep may import only"),
        ("pipeline/loader.py", "from data_prep.fetch import fetch", "pipeline may import only"),
        ("pipeline/loader.py", "import torch\ntorch.distributed.barrier()", "torch.distributed is touched in"),
        ("pipeline/loader.py", "from torch import distributed as dist", "torch.distributed is touched in"),
        ("pipeline/train.py", "from deepspeed.comm import barrier", "deepspeed is touched in"),
        ("pipeline/train.py", "def f():\n    import wandb", "wandb is touched in"),
        (
            "pipeline/report.py",
            "from torch.utils.tensorboard import SummaryWriter",
            "torch.utils.tensorboard is touched",
        ),
        ("pipeline/newcomer.py", "", "has no rung"),
    ],
)
def test_the_law_is_enforced(path: str, source: str, reason: str) -> None:
    assert any(reason in found for found in violations(source, path)), violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/flm.py", "from model.layers import Block\nimport torch, math"),
        ("pipeline/loader.py", "from data_prep.manifest import Manifest\nfrom model.batch import Batch"),
        ("pipeline/loader.py", "from data_prep import manifest"),
        ("pipeline/engine.py", "import deepspeed, torch.distributed"),
        ("model/vision.py", "from model.torchvision_shim import ensure_torchvision\nensure_torchvision()\nimport timm"),
    ],
)
def test_lawful_imports_pass(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_every_rung_names_a_module_once() -> None:
    for package, rungs in RUNGS.items():
        names = [name for rung in rungs for name in rung]
        assert len(names) == len(set(names)), f"{package}: a module stands on two rungs"


def test_model_works_without_the_training_stack() -> None:
    modules = [f"model.{path.stem}" for path in python_files("model") if path.stem != "__init__"]
    assert_imports(modules, blocked=["deepspeed", "webdataset", "img2dataset", "mpi4py", "pyarrow"])


def test_data_prep_works_without_torch() -> None:
    modules = [f"data_prep.{path.stem}" for path in python_files("data_prep") if path.stem != "__init__"]
    assert_imports(modules, blocked=["torch", "torchvision", "deepspeed", "open_clip"])


def assert_imports(modules: list[str], blocked: list[str]) -> None:
    """Imports every module in a fresh interpreter in which the blocked ones cannot be imported."""
    program = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def test_train_is_runnable_by_path() -> None:
    """`deepspeed pipeline/train.py` puts pipeline/ first on sys.path; the repository root must take its place."""
    path = REPOSITORY / "pipeline" / "train.py"
    if not path.is_file():
        pytest.skip("pipeline/train.py is not written yet")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "sys.path[0]":
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            late = [name for name in names if name.split(".")[0] not in {"__future__", "sys", "os", "pathlib"}]
            assert not late, f"pipeline/train.py imports {late} before it sets sys.path[0]"
    pytest.fail("pipeline/train.py never sets sys.path[0]")


def repository_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = (REPOSITORY / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in files if path.is_file()]


def test_no_room_for_leftovers() -> None:
    offenders = [path.name for path in repository_files() if path.suffix == ".py" and path.stem in FORBIDDEN_NAMES]
    assert not offenders, f"{offenders}: name the file after its one job (docs/architecture.md, Find the room)"


@pytest.mark.parametrize("path", FILES)
def test_file_states_its_purpose(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), (
        "the first line says in one sentence what it is for"
    )
    assert source.count("\n") <= MAX_LINES, f"longer than {MAX_LINES} lines: two jobs in one file?"


def test_no_path_of_somebodys_machine() -> None:
    private = re.compile(r"(?<![\w.:/$}~-])/(work|root|home|Users)/\w")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPOSITORY)}: {match.group()}" for match in private.finditer(text)]
    assert not found
