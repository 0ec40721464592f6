"""Enforces the import law of docs/architecture.md on every file, lazy imports counted."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.import_law import CONFINED, FILES_OF, FOREIGN_TO, LARGE_WINGS, LAW, MAY_IMPORT, NEEDS_SHIM, OURS

REPOSITORY = Path(__file__).resolve().parents[1]
TABLES = "tests/import_law.py"

MAX_LINES, MAX_FUNCTION_LINES, MAX_WING_LINES = 400, 80, 1500


def python_files(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


FILES = [pytest.param(path, id=str(path.relative_to(REPOSITORY))) for name in LAW for path in python_files(name)]


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


def wing_of(package: str, module: str) -> str | None:
    """The wing of a module given by its name below the package, like "vision.clip" or "flm"."""
    first, _, rest = module.partition(".")
    if rest or first in FOLDERS[package]:
        return first if first in LAW[package] else None
    return next((wing for wing, names in FILES_OF[package].items() if first in names), None)


FOLDERS = {
    package: {path.parent.relative_to(REPOSITORY / package).parts[0] for path in (REPOSITORY / package).rglob("*/*.py")}
    for package in LAW
}


def within(dotted: str, parent: str) -> bool:
    return dotted == parent or dotted.startswith(parent + ".")


def violations(source: str, path: str) -> list[str]:
    """What the file at ``path`` (relative to the repository) does against the import law."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package, _, name = module.partition(".")
    wing = wing_of(package, name) if name else None
    if wing is None and not path.endswith("__init__.py"):
        return [f"{path} has no wing: put it into a folder of LAW['{package}'], or name it in FILES_OF, {TABLES}"]
    may = LAW[package].get(wing, ())
    found = []
    for line, target in imported_modules(source, module):
        top, _, rest = target.partition(".")
        complain = lambda reason, line=line, target=target: found.append(f"{path}:{line} imports {target}: {reason}")  # noqa: E731
        if target == module:  # a program that takes its own importable name, for pickling
            continue
        if top == package and wing is not None:
            other = wing_of(package, rest) if rest else None
            if other is None or rest in FOLDERS[package]:
                complain(f"write `from {package}.WING.FILE import NAME` with a file that has a wing")
            elif other != wing and other not in may and not any(within(rest, one) for one in may if "." in one):
                complain(f"{wing} may import only {', '.join(may) or 'no other wing'}, this is of {other}")
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


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of a directed graph as the nodes along it, [] if there is none."""
    done: set[str] = set()

    def search(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


@pytest.mark.parametrize("path", FILES)
def test_import_law(path: Path) -> None:
    relative = path.relative_to(REPOSITORY).as_posix()
    assert violations(path.read_text(encoding="utf-8"), relative) == []


def test_no_circle_of_files() -> None:
    graph: dict[str, set[str]] = {}
    for package in LAW:
        for path in python_files(package):
            module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
            targets = {target for _, target in imported_modules(path.read_text(encoding="utf-8"), module)}
            graph[module] = {target for target in targets if target.split(".")[0] == package} - {module}
    assert circle(graph) == []


def test_the_law_has_no_circle_itself() -> None:
    for package, wings in LAW.items():
        assert circle({wing: {one.split(".")[0] for one in may} for wing, may in wings.items()}) == [], package


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]


def test_every_name_of_the_law_exists() -> None:
    for package, wings in LAW.items():
        assert set(FILES_OF[package]) | FOLDERS[package] >= set(wings), f"{package}: a wing that is not there"
        for wing, names in FILES_OF[package].items():
            assert wing in wings, f"{package}: FILES_OF names the wing {wing}, LAW does not"
            missing = [name for name in names if not (REPOSITORY / package / f"{name}.py").is_file()]
            assert not missing, f"{package}: {wing} names {missing}, which are not there"
        for may in wings.values():
            for one in may:
                folder, _, file = one.partition(".")
                assert folder in wings, f"{package}: {one} is no wing"
                assert not file or (REPOSITORY / package / folder / f"{file}.py").is_file(), f"{package}: no file {one}"
    for paths in CONFINED.values():
        assert all((REPOSITORY / path).is_file() for path in paths), paths


def test_wings_stay_small() -> None:
    sizes: dict[str, int] = {}
    for package in LAW:
        for path in python_files(package):
            name = ".".join(path.relative_to(REPOSITORY / package).with_suffix("").parts).removesuffix(".__init__")
            wing = wing_of(package, name)
            if wing is not None:
                key = f"{package}/{wing}"
                sizes[key] = sizes.get(key, 0) + path.read_text(encoding="utf-8").count("\n")
    too_large = {wing: size for wing, size in sizes.items() if size > MAX_WING_LINES and wing not in LARGE_WINGS}
    assert not too_large, f"{too_large}: divide the wing, or give the reason in LARGE_WINGS"
    assert set(LARGE_WINGS) <= {wing for wing, size in sizes.items() if size > MAX_WING_LINES}, "a reason without need"


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("model/flm.py", "from pipeline.train import main", "model may import only"),
        ("model/flm.py", "def f():\n    import data_prep.manifest", "model may import only"),
        (
            "model/layers.py",
            "def f():\n    from model.flm import FLM",
            "cpu.door, this is of networks",
        ),
        ("model/layers.py", "from .flm import FLM", "core may import only cpu.door"),
        ("model/layers.py", "from . import flm", "core may import only cpu.door"),
        ("model/heads.py", "from model.vision import clip", "this is of vision"),
        ("model/layers.py", "from model.cpu.kept_memory import KeptMemory", "may import only cpu.door"),
        ("model/flm.py", "import model", "write `from model.WING.FILE"),
        ("model/flm.py", "import model.vision", "write `from model.WING.FILE"),
        ("model/vision/clip.py", "import open_clip", "ensure_torchvision"),
        ("model/weights/towers.py", "import importlib\nimportlib.import_module('deepspeed')", "must work without it"),
        ("data_prep/drawn/synth.py", "import torch", "must work without it"),
        ("data_prep/__main__.py", "from pipeline.config.options import Config", "data_prep may import only"),
        ("pipeline/loading/loader.py", "from data_prep.downloading.fetch import fetch", "pipeline may import only"),
        ("pipeline/loading/loader.py", "from pipeline.engine.engine import TrainEngine", "this is of engine"),
        ("pipeline/training/loop.py", "from pipeline.tasks.captioning import Captioner", "this is of tasks"),
        ("pipeline/config/options.py", "from pipeline.train import main", "this is of programs"),
        ("pipeline/loading/loader.py", "import torch\ntorch.distributed.barrier()", "torch.distributed is touched in"),
        ("pipeline/loading/loader.py", "from torch import distributed as dist", "torch.distributed is touched in"),
        ("pipeline/train.py", "from deepspeed.comm import barrier", "deepspeed is touched in"),
        ("pipeline/train.py", "def f():\n    import wandb", "wandb is touched in"),
        (
            "pipeline/report.py",
            "from torch.utils.tensorboard import SummaryWriter",
            "torch.utils.tensorboard is touched",
        ),
        ("pipeline/newcomer.py", "", "has no wing"),
        ("pipeline/newfolder/newcomer.py", "", "has no wing"),
    ],
)
def test_the_law_is_enforced(path: str, source: str, reason: str) -> None:
    assert any(reason in found for found in violations(source, path)), violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/flm.py", "from model.layers import Block\nimport torch, math"),
        ("pipeline/loading/loader.py", "from data_prep.manifest import Manifest\nfrom model.batch import Batch"),
        ("pipeline/loading/loader.py", "from data_prep import manifest"),
        ("pipeline/engine/engine.py", "import deepspeed, torch.distributed"),
        (
            "model/vision/clip.py",
            "from model.torchvision_shim import ensure_torchvision\nensure_torchvision()\nimport timm",
        ),
    ],
)
def test_lawful_imports_pass(path: str, source: str) -> None:
    assert violations(source, path) == []


@pytest.mark.slow
def test_model_works_without_the_training_stack() -> None:
    modules = module_names("model")
    assert_imports(modules, blocked=["deepspeed", "webdataset", "img2dataset", "mpi4py", "pyarrow"])


@pytest.mark.slow
def test_data_prep_works_without_torch() -> None:
    modules = module_names("data_prep")
    assert_imports(modules, blocked=["torch", "torchvision", "deepspeed", "open_clip"])


def module_names(package: str) -> list[str]:
    paths = (path.relative_to(REPOSITORY).with_suffix("") for path in python_files(package))
    return [".".join(path.parts) for path in paths if path.name != "__init__"]


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
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "sys.path[0]":
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            late = [name for name in names if name.split(".")[0] not in {"__future__", "sys", "os", "pathlib"}]
            assert not late, f"pipeline/train.py imports {late} before it sets sys.path[0]"
    pytest.fail("pipeline/train.py never sets sys.path[0]")


@pytest.mark.parametrize("path", FILES)
def test_file_states_its_purpose(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), (
        "the first line says in one sentence what it is for"
    )
    assert source.count("\n") <= MAX_LINES, f"longer than {MAX_LINES} lines: two jobs in one file?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long to read at a glance"


def test_programs_only_beside_the_wings() -> None:
    beside = {path.stem for path in (REPOSITORY / "pipeline").glob("*.py")} - {"__init__"}
    assert beside == set(FILES_OF["pipeline"]["programs"])
    for name in beside:
        assert "def main(" in (REPOSITORY / "pipeline" / f"{name}.py").read_text(encoding="utf-8"), name
