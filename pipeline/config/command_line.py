"""Command line and recipes: defaults < recipe < command line, each mistake refused in one line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config.options import Config, ConfigError, flatten, leaves, validate

PIPELINE = Path(__file__).resolve().parents[1]
RECIPES = PIPELINE / "recipes"
DEFAULT_RECIPE = "flm_base_4m"
DS_CONFIGS = PIPELINE / "ds_configs"  # in a checkout a link to the folder that users name
DEFAULT_DEEPSPEED = DS_CONFIGS / "zero1.json"


@dataclass(frozen=True)
class Launch:
    """A parsed command line: the configuration, where each non-default came from, and how to run it."""

    config: Config
    sources: dict[str, str]  # option -> "recipe NAME" or "command line"
    recipe: str
    output: Path
    deepspeed: Path


def parse_command_line(argv: list[str]) -> Launch:
    """Parse the training command line; raises ConfigError for every mistake, exits 0 after --help."""
    parser = _parser()
    options = _option_types()
    argv = _expand_data(argv)
    _refuse_unknown(argv, [*options, "deepspeed", "recipe", "output", "local_rank", "data", "help"])
    given = _parse(parser, argv, "command line")
    recipe_path = find_recipe(given.pop("recipe", None) or DEFAULT_RECIPE)
    recipe = load_recipe(recipe_path)
    _refuse_bad_recipe(recipe, recipe_path, options)
    merged = _parse(parser, recipe, f"recipe {recipe_path.stem}")
    output, deepspeed = given.pop("output", None), given.pop("deepspeed", None)
    given.pop("local_rank", None)
    on_command_line = {key: value for key, value in leaves(given.as_dict()) if key in options}
    for key, value in on_command_line.items():
        merged[key] = value
    in_recipe = {key for key, _ in leaves(recipe)}
    config = _build(Config, merged)
    validate(config)
    defaults = dict(flatten(Config()))
    sources = {}
    for key, value in flatten(config):
        if key in on_command_line:
            sources[key] = "command line"
        elif key in in_recipe and value != defaults[key]:
            sources[key] = f"recipe {recipe_path.stem}"
    return Launch(
        config=config,
        sources=sources,
        recipe=recipe_path.stem,
        output=Path(output or f"runs/{recipe_path.stem}"),
        deepspeed=_existing(Path(deepspeed or DEFAULT_DEEPSPEED), "--deepspeed", f"see {DS_CONFIGS}"),
    )


def find_recipe(name: str) -> Path:
    """The file of a recipe given by NAME (pipeline/recipes/NAME.yaml) or by FILE."""
    if name.endswith((".yaml", ".yml")):
        return _existing(Path(name), "--recipe", "give a recipe name or an existing YAML file")
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"--recipe: no recipe named {name!r}; {_nearest(name, recipe_names())}")
    return path


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe as nested dicts, on top of those of its ``base`` recipe."""
    if path in seen:
        raise ConfigError(f"{path}: the recipe is its own base; remove one `base:` line")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a {type(content).__name__}, expected `section: {{key: value}}` lines")
    base = content.pop("base", None)
    if base is None:
        return content
    beside = path.parent / str(base)
    base_path = beside if beside.suffix in (".yaml", ".yml") and beside.is_file() else find_recipe(str(base))
    return _merge(load_recipe(base_path, (*seen, path)), content)


def load_config(run: Path) -> Config:
    """The resolved configuration of a run folder (or of a config.yaml)."""
    path = run / "config.yaml" if run.is_dir() else run
    if not path.is_file():
        raise ConfigError(f"{run}: found no config.yaml; expected the folder of a run (--output of pipeline/train.py)")
    return config_of(load_recipe(path), path)


def config_of(content: dict[str, Any], where: Path) -> Config:
    """The configuration written down as nested dicts in the file ``where``."""
    _refuse_bad_recipe(content, where, _option_types())
    return _build(Config, _parse(_parser(), content, str(where)))


def describe(launch: Launch) -> str:
    """The table of settings that differ from the defaults, with the source of each."""
    values = dict(flatten(launch.config))
    rows = [(key, str(values[key]), source) for key, source in launch.sources.items()]
    head = f"recipe {launch.recipe} | deepspeed {launch.deepspeed} | output {launch.output}"
    if not rows:
        return head + " | every setting at its default"
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join([head, *(f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {src}" for key, value, src in rows)])


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="pipeline/train.py",
        exit_on_error=False,
        description="Pretrain a vision-language model with DeepSpeed. Settings: default < recipe < command line.",
        epilog=f"recipes: {', '.join(recipe_names())}. Exit codes: 0 done, 1 failure, 2 configuration, 75 preempted.",
    )
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed JSON (default: ds_configs/zero1.json)")
    parser.add_argument("--recipe", metavar="NAME|FILE", help=f"settings to start from (default: {DEFAULT_RECIPE})")
    parser.add_argument("--output", metavar="RUN", help="run folder; one with checkpoints is continued")
    parser.add_argument("--local_rank", type=int, help=SUPPRESS)  # written by the deepspeed launcher
    hints = get_type_hints(Config)
    for item in dataclasses.fields(Config):
        parser.add_class_arguments(hints[item.name], item.name)
    for action in parser._actions:
        if action.metavar == "CONFIG":
            action.help = SUPPRESS
        if "--data" in action.option_strings:
            action.metavar, action.help = "DIR [DIR ...]", "folders of prepared data, DIR or DIR:WEIGHT (data.paths)"
    return parser


def _parse(parser: ArgumentParser, given: list[str] | dict[str, Any], where: str) -> Namespace:
    """Parse a command line (only what it names) or a recipe (on top of the defaults)."""
    try:
        if isinstance(given, dict):
            return parser.parse_object(given)
        return parser.parse_args(given, defaults=False)
    except Exception as error:  # whatever the parser refuses becomes one line
        raise ConfigError(f"{where}: {_explain(' '.join(str(error).split()), given)}") from None


def _explain(message: str, given: list[str] | dict[str, Any]) -> str:
    """Option, value found and value expected, where the parser's message names an option."""
    key = re.search(r'key "([\w.]+)"|argument --([\w.]+)', message)
    hint = _option_types().get(key.group(1) or key.group(2)) if key else None
    if hint is None:
        return message
    name = key.group(1) or key.group(2)
    if isinstance(given, dict):
        found = repr(dict(leaves(given)).get(name))
    else:
        values = [word.split("=", 1)[1] for word in given if word.startswith(f"--{name}=")]
        values += [after for word, after in zip(given, [*given[1:], "--"], strict=True) if word == f"--{name}"]
        found = "nothing" if values[-1].startswith("--") else repr(values[-1])
    return f"{name}: found {found}, expected {_type_in_words(hint)}"


def _type_in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))}, each {_type_in_words(get_args(hint)[0])}"
    if get_args(hint) and get_origin(hint) is not list:
        return " or ".join("null" if part is type(None) else _type_in_words(part) for part in get_args(hint))
    words = {
        bool: "true or false",
        str: "a text",
        int: "a whole number",
        float: "a number",
        list[str]: "a list of texts",
    }
    for restricted, name in ((PositiveInt, "above 0"), (NonNegativeInt, "of at least 0")):
        words[restricted] = f"a whole number {name}"
    for restricted, name in ((PositiveFloat, "above 0"), (NonNegativeFloat, "of at least 0")):
        words[restricted] = f"a number {name}"
    words[ClosedUnitInterval] = "a number from 0 to 1"
    return words.get(hint, str(hint))


def _expand_data(argv: list[str]) -> list[str]:
    """Rewrite ``--data A B:2`` as ``--data.paths=["A", "B:2"]``."""
    result: list[str] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        index += 1
        if word != "--data" and not word.startswith("--data="):
            result.append(word)
            continue
        paths = [word.removeprefix("--data=")] if "=" in word else []
        while index < len(argv) and not argv[index].startswith("--"):
            paths.append(argv[index])
            index += 1
        if not paths:
            raise ConfigError("command line: --data names no folder; expected --data DIR [DIR ...]")
        result.append(f"--data.paths={json.dumps(paths)}")
    return result


def _refuse_unknown(argv: list[str], known: list[str]) -> None:
    for position, word in enumerate(argv):
        name = word.split("=", 1)[0]
        if name.startswith("--") and name[2:] not in known:
            raise ConfigError(f"command line: unknown option {name}; {_nearest(name[2:], known, '--')}")
        after_value = position > 0 and argv[position - 1].startswith("--") and "=" not in argv[position - 1]
        if not word.startswith("-") and not after_value:
            raise ConfigError(f"command line: found {word!r} where an option was expected; write --section.key value")


def _refuse_bad_recipe(recipe: dict[str, Any], path: Path, options: dict[str, Any]) -> None:
    for key, value in leaves(recipe):
        if key not in options:
            raise ConfigError(f"{path}: unknown option {key}; {_nearest(key, list(options))}")
        if value is None and type(None) not in getattr(options[key], "__args__", ()):
            raise ConfigError(f"{path}: {key}: found null, expected {_type_in_words(options[key])}")


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not match and "." not in name:
        match = [option for option in known if option.rsplit(".", 1)[-1] == name][:1]
    return f"did you mean {prefix}{match[0]}?" if match else f"known: {', '.join(known[:12])} (see --help)"


def _option_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        key = f"{prefix}{name}"
        result |= _option_types(hint, f"{key}.") if dataclasses.is_dataclass(hint) else {key: hint}
    return result


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(cls: type, values: Namespace) -> Any:
    hints = get_type_hints(cls)
    arguments = {}
    for item in dataclasses.fields(cls):
        value = values[item.name]
        arguments[item.name] = _build(hints[item.name], value) if dataclasses.is_dataclass(hints[item.name]) else value
    return cls(**arguments)


def _existing(path: Path, option: str, advice: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{option}: no file {path}; {advice}")
    return path
