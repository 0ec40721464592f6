"""Recipes: YAML files of settings that differ from the defaults, each on top of the recipe that its ``base:`` names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.mistakes import nearest, of_other_choices, refuse_of_other_choices, refuse_unknown
from pipeline.config.options import ConfigError, leaves

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MAX_NODES = 100_000  # of a YAML file: a few anchors of anchors can stand for billions
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, ten times as fast, where libyaml is there
RUN_CONFIG = "config.yaml"  # the settings of a run, all of them, written by the program


@dataclass(frozen=True)
class Recipe:
    """Settings by dotted option; ``idle`` are those of an objective or task that a recipe on top
    replaced by another."""

    name: str = "defaults"
    settings: dict[str, Any] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)  # option -> the recipe that sets it

    def under(self, name: str, settings: dict[str, Any], where: str) -> Recipe:
        """This recipe with ``settings`` on top; steps on top of epochs mean the steps.

        Raises:
            ConfigError: ``settings`` has an option of another objective or task than the one chosen now.
        """
        merged = {**self.settings, **settings}
        if "train.steps" in settings and "train.epochs" not in settings:
            merged.pop("train.epochs", None)
        refuse_of_other_choices(settings, merged, where)
        idle = of_other_choices(self.settings, merged)
        kept = {option: value for option, value in merged.items() if option not in idle}
        unused = {**self.idle, **dict.fromkeys(idle, self.name)}
        return Recipe(name, kept, {option: recipe for option, recipe in unused.items() if option not in kept})


def find_recipe(name: str) -> Path:
    """The file of a recipe given by NAME (pipeline/recipes/NAME.yaml) or by FILE."""
    if name.endswith((".yaml", ".yml")):
        return existing(Path(name), "--recipe", "give a recipe name or an existing YAML file")
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"--recipe: no recipe named {name!r}; {nearest(name, recipe_names())}")
    return path


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(path: Path, seen: tuple[Path, ...] = ()) -> Recipe:
    """The recipe in the file ``path`` on top of its ``base``: a recipe's name, or a file beside it.

    Raises:
        ConfigError: not such a file, an option that does not exist, or one of another objective or task than the
            recipe's.
    """
    if path in seen:
        raise ConfigError(f"{path}: the recipe is its own base; remove one `base:` line")
    content = read_yaml(path)
    base = content.pop("base", None)
    lower = Recipe()
    if base is not None:
        beside = path.parent / str(base)
        is_beside = beside.suffix in (".yaml", ".yml") and beside.is_file()
        lower = load_recipe(beside if is_beside else find_recipe(str(base)), (*seen, path))
    settings = dict(leaves(content))
    if path.name == RUN_CONFIG:
        settings = without_other_choices(settings)
    refuse_unknown(settings, str(path))
    return lower.under(path.stem, settings, str(path))


def without_other_choices(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings by dotted option; earlier runs wrote down the options of all objectives, not of theirs only."""
    other = of_other_choices(settings, settings)
    return {option: value for option, value in settings.items() if option not in other}


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file; raises ConfigError for anything else, and for a key that stands there twice."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, LOADER)
        if _written_out(tree, {}) > MAX_NODES:
            raise ConfigError(f"{path}: its anchors stand for more than {MAX_NODES} values; write out what is meant")
        content = yaml.load(text, LOADER) or {}
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # 2001-99-99 is a ValueError
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a {type(content).__name__}, expected `section: {{key: value}}` lines")
    _refuse_repeated(tree, path, set())
    return content


def _written_out(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Nodes of a tree with every anchor replaced by what it stands for; one that holds itself is without end."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = MAX_NODES  # until it is known
        children = node.value if isinstance(node, yaml.SequenceNode) else (part for pair in node.value for part in pair)
        sizes[id(node)] = min(1 + sum(_written_out(child, sizes) for child in children), MAX_NODES + 1)
    return sizes[id(node)]


def _refuse_repeated(node: yaml.Node | None, path: Path, seen: set[str], prefix: str = "") -> None:
    """YAML keeps the last of two equal keys and drops the other without a word."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        if name in seen:
            raise ConfigError(
                f"{path}: {name} stands there twice (again in line {key.start_mark.line + 1}); remove one, or put what "
                "is under it together"
            )
        seen.add(name)
        _refuse_repeated(value, path, seen, f"{name}.")


def existing(path: Path, option: str, advice: str) -> Path:
    """``path`` if it is a file, else ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{option}: no file {path}; {advice}")
    return path
