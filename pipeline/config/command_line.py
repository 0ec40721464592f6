"""Command line: defaults < recipe < command line, each mistake refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from jsonargparse import SUPPRESS, ArgumentParser

from pipeline.config.dry_run_options import DRY_RUN_OPTIONS, add_dry_run_options
from pipeline.config.mistakes import CHOICES, SECTIONS, nearest, option_types, refuse_unknown, type_in_words
from pipeline.config.options import Config, ConfigError, flatten, leaves, refuse_address, validate
from pipeline.config.recipes import (
    RUN_CONFIG,
    Recipe,
    existing,
    find_recipe,
    load_recipe,
    read_yaml,
    recipe_names,
    without_other_choices,
)
from pipeline.exported.folder import AGAIN, is_exported
from pipeline.exported.folder import CONFIG as EXPORTED_CONFIG
from pipeline.exported.settings import exported_settings

DEFAULT_RECIPE = "flm_base_4m"
DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"  # in a checkout a link to the folder that users name
DEFAULT_DEEPSPEED = DS_CONFIGS / "zero1.json"
NOT_SETTINGS = ("deepspeed", "recipe", "output", "local_rank")
USAGE = """
  deepspeed --num_gpus N pipeline/train.py [--deepspeed FILE] [--recipe NAME|FILE] [--data DIR [DIR ...]]
                                           [--output RUN] [--SECTION.OPTION VALUE ...]

  python pipeline/train.py --recipe demo                                            one device, no launcher
  deepspeed --num_gpus 2 pipeline/train.py --deepspeed ds_configs/zero2.json        two GPUs, or two ranks of a CPU
  torchrun --nproc-per-node 8 pipeline/train.py ...                                 mpirun, srun: docs/launchers.md
  python pipeline/train.py --recipe demo --dry-run                                  what it would be and cost
"""


@dataclass(frozen=True)
class Launch:
    """A parsed command line: the configuration, where each non-default came from, and how to run it."""

    config: Config
    sources: dict[str, str]  # option -> "recipe NAME" or "command line"
    idle: dict[str, str]  # option of another objective or task than the chosen one -> recipe that sets it
    recipe: str
    output: Path
    deepspeed: Path


def parse_command_line(argv: list[str]) -> Launch:
    """Parse the training command line; raises ConfigError for every mistake, exits 0 after --help."""
    argv = _expand_data(argv)
    _refuse_unknown_words(argv, [*option_types(), *NOT_SETTINGS, "data", "help", *DRY_RUN_OPTIONS])
    parser = _parser_with_help(argv) if "--help" in argv or "-h" in argv else _parser()
    given = _parse(parser, argv, "command line")
    recipe = load_recipe(find_recipe(given.get("recipe") or DEFAULT_RECIPE))
    recipe = replace(recipe, settings=_parse(parser, recipe.settings, f"recipe {recipe.name}"))
    on_command_line = {key: value for key, value in given.items() if key not in NOT_SETTINGS}
    chosen = recipe.under("command line", on_command_line, "command line")
    config = _build(Config, chosen.settings)
    validate(config)
    return Launch(
        config=config,
        sources=_sources(config, on_command_line, recipe.settings, recipe.name),
        idle=chosen.idle,
        recipe=recipe.name,
        output=_run_folder(given.get("output") or f"runs/{recipe.name}"),
        deepspeed=existing(Path(given.get("deepspeed") or DEFAULT_DEEPSPEED), "--deepspeed", f"see {DS_CONFIGS}"),
    )


def _run_folder(output: str) -> Path:
    refuse_address(output, "--output")
    path = Path(output)
    above = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)
    if above.is_file():
        raise ConfigError(f"--output {output}: {above} is a file, expected a folder; name another one")
    return path


def _sources(
    config: Config, on_command_line: Mapping[str, Any], in_recipe: Mapping[str, Any], recipe: str
) -> dict[str, str]:
    """Where each setting that is not at its default comes from."""
    defaults = dict(flatten(Config(objective=type(config.objective)(), task=type(config.task)())))
    defaults |= {f"{section}.name": base.name for section, base in SECTIONS.items()}
    sources = {}
    for key, value in flatten(config):
        if key in on_command_line:
            sources[key] = "command line"
        elif key in in_recipe and value != defaults[key]:
            sources[key] = f"recipe {recipe}"
    return sources


def load_config(run: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The resolved configuration of a run folder (or of a config.yaml, or of an exported folder), with other values by
    dotted option.

    Raises:
        ConfigError: no such run, or a change of an option that its objective or task does not have.
    """
    path = run / RUN_CONFIG if run.is_dir() else run
    if not path.is_file() and is_exported(run):
        try:
            return config_of(exported_settings(run), run / EXPORTED_CONFIG, changes)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"{run}: {error}; {AGAIN}") from None
    if not path.is_file():
        raise ConfigError(f"{run}: found no config.yaml; expected the folder of a run (--output of pipeline/train.py)")
    return config_of(read_yaml(path), path, changes)


def config_of(content: dict[str, Any], where: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The configuration of a run, written down as nested dicts in the file ``where``."""
    settings = without_other_choices(dict(leaves(content)))
    refuse_unknown(settings, str(where))
    own = Recipe(where.stem, _parse(_parser(), settings, str(where)))
    return _build(Config, own.under("command line", dict(changes), "command line").settings)


def changed_options(words: Sequence[str]) -> dict[str, Any]:
    """The options that words like ``--task.beams 5`` set, each value of its type; raises ConfigError."""
    argv = _expand_data(list(words))
    _refuse_unknown_words(argv, [*option_types(), "data"])
    return _parse(_parser(), argv, "command line")


def describe(launch: Launch) -> str:
    """The table of settings that differ from the defaults, with the source of each."""
    values = dict(flatten(launch.config))
    rows = [(key, str(values[key]), source) for key, source in launch.sources.items()]
    head = f"recipe {launch.recipe} | deepspeed {launch.deepspeed} | output {launch.output}"
    if not rows:
        return head + " | every setting at its default"
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {source}" for key, value, source in rows]
    chosen = {section: getattr(launch.config, section).name for section in SECTIONS}
    idle = [
        f"  {option} of recipe {name} is not used: {chosen[option.partition('.')[0]]} has no such option"
        for option, name in launch.idle.items()
    ]
    return "\n".join([head, *table, *idle])


def _parser() -> ArgumentParser:
    """One parser for all that a process parses: to make one takes longer than everything else that is done with it."""
    return _parser_of(tuple(cls for options in CHOICES.values() for cls in options.values()))


@cache
def _parser_of(choices: tuple[type, ...]) -> ArgumentParser:
    """Another one only where there are other objectives or tasks than these ``choices``."""
    return _new_parser()


def _parser_with_help(argv: list[str]) -> ArgumentParser:
    """A parser that shows the defaults of a command line with the same recipe, and how a training is started."""
    named = [word.split("=", 1)[1] for word in argv if word.startswith("--recipe=")]
    named += [after for word, after in zip(argv, argv[1:]) if word == "--recipe" and not after.startswith("-")]
    name = (named or [DEFAULT_RECIPE])[-1]
    parser = _new_parser()
    add_dry_run_options(parser)
    parser.set_defaults(load_recipe(find_recipe(name)).settings)
    parser.set_defaults({"recipe": name})
    parser.usage = USAGE
    return parser


def _new_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="pipeline/train.py",
        exit_on_error=False,
        description="Trains a vision-language model with DeepSpeed. Settings: default < recipe < command line. The "
        f"defaults below are those in force with the recipe, {DEFAULT_RECIPE} if none is named: --recipe NAME --help "
        "shows those of another.",
        epilog=f"recipes: {', '.join(recipe_names())}; a FILE may begin with `base: NAME|FILE` and then holds what "
        "differs from that recipe only: docs/recipes.md. Exit codes: 0 done, 1 failure, 2 configuration, 75 preempted.",
    )
    parser.add_argument("--deepspeed", metavar="FILE", default="ds_configs/zero1.json", help="DeepSpeed JSON")
    parser.add_argument("--recipe", metavar="NAME|FILE", default=DEFAULT_RECIPE, help="settings to start from")
    output = "run folder; one with checkpoints is continued"
    parser.add_argument("--output", metavar="RUN", default="runs/RECIPE", help=output)
    parser.add_argument("--local_rank", type=int, help=SUPPRESS)  # written by the deepspeed launcher
    for section, hint in get_type_hints(Config).items():
        parser.add_class_arguments(hint, section)
        for names, options in _options_of_choices(hint).items():
            cls = CHOICES[hint][names[0]]
            group = parser.add_argument_group(f"Options of {section}.name {', '.join(names)}")
            others = {item.name for item in fields(cls)} - options
            group.add_class_arguments(cls, section, as_group=False, skip=others)
    for action in parser._actions:
        if action.metavar == "CONFIG":
            action.help = SUPPRESS
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]  # lists come whole
        if "--data" in action.option_strings:
            action.metavar, action.help = "DIR [DIR ...]", "folders of prepared data, DIR or DIR:WEIGHT (data.paths)"
    return parser


def _options_of_choices(base: type) -> dict[tuple[str, ...], set[str]]:
    """Options that only some objectives, or some tasks, have, by the names of those."""
    owners: dict[str, tuple[str, ...]] = {}
    for name, cls in CHOICES.get(base, {}).items():
        for item in fields(cls):
            owners[item.name] = (*owners.get(item.name, ()), name)
    result: dict[tuple[str, ...], set[str]] = {}
    for option, names in owners.items():
        if option not in {item.name for item in fields(base)}:
            result.setdefault(names, set()).add(option)
    return result


def _parse(parser: ArgumentParser, given: list[str] | dict[str, Any], where: str) -> dict[str, Any]:
    """What a command line or the settings of a recipe name, by dotted option, each value of its type."""
    try:
        parse = parser.parse_object if isinstance(given, dict) else parser.parse_args
        return dict(leaves(parse(given, defaults=False).as_dict()))
    except Exception as error:  # whatever the parser refuses becomes one line
        raise ConfigError(f"{where}: {_explain(' '.join(str(error).split()), given)}") from None


def _explain(message: str, given: list[str] | dict[str, Any]) -> str:
    """Option, value found and value expected, where the parser's message names an option."""
    key = re.search(r'key "([\w.]+)"|argument --([\w.]+)', message)
    hint = option_types().get(key.group(1) or key.group(2)) if key else None
    if hint is None:
        return message
    name = key.group(1) or key.group(2)
    if isinstance(given, dict):
        found = repr(given.get(name))
    else:
        values = [word.split("=", 1)[1] for word in given if word.startswith(f"--{name}=")]
        values += [after for word, after in zip(given, [*given[1:], "--"], strict=True) if word == f"--{name}"]
        found = "nothing" if values[-1].startswith("--") else repr(values[-1])
    return f"{name}: found {found}, expected {type_in_words(hint)}"


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


def _refuse_unknown_words(argv: list[str], known: list[str]) -> None:
    for position, word in enumerate(argv):
        name = word.split("=", 1)[0]
        if name[2:] in DRY_RUN_OPTIONS and "help" in known and not {"--help", "-h"} & {*argv}:
            raise ConfigError(f"command line: {name} is an option of pipeline/train.py only; leave it out")
        if name.startswith("--") and name[2:] not in known:
            raise ConfigError(f"command line: unknown option {name}; {nearest(name[2:], known, '--')}")
        after_value = position > 0 and argv[position - 1].startswith("--") and "=" not in argv[position - 1]
        if not word.startswith("-") and not after_value:
            raise ConfigError(f"command line: found {word!r} where an option was expected; write --section.key value")


def _build(cls: type, settings: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass of settings by dotted option, what they do not name at its default."""
    arguments = {}
    for name, hint in get_type_hints(cls).items():
        key = f"{prefix}{name}"
        if hint in CHOICES:
            hint = CHOICES[hint][settings.get(f"{key}.name", hint.name)]
        if is_dataclass(hint):
            arguments[name] = _build(hint, settings, f"{key}.")
        elif key in settings:
            arguments[name] = settings[key]
    return cls(**arguments)
