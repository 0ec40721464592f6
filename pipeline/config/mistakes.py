"""Which options there are and what each takes, for the one line that refuses a mistake."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from model.config import OPTIONS_OF, ObjectiveOptions
from pipeline.config.options import Config, ConfigError
from pipeline.config.other_names import OPTIONS, WAYS, WAYS_OF
from pipeline.config.task_options import TASK_OPTIONS_OF, TaskOptions

CHOICES: dict[type, dict[str, Any]] = {ObjectiveOptions: OPTIONS_OF, TaskOptions: TASK_OPTIONS_OF}
SECTIONS = {"objective": ObjectiveOptions, "task": TaskOptions}  # whose options depend on SECTION.name


def option_types() -> dict[str, Any]:
    """Type of every option by its dotted name, the options of all objectives and tasks among them."""
    result: dict[str, Any] = {}
    for section, hint in get_type_hints(Config).items():
        for cls in [*CHOICES.get(hint, {}).values(), hint]:
            result |= _types(cls, f"{section}.")
    return result


@functools.cache
def _types(cls: type, prefix: str) -> Mapping[str, Any]:
    result: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        key = f"{prefix}{name}"
        result |= _types(hint, f"{key}.") if dataclasses.is_dataclass(hint) else {key: hint}
    return MappingProxyType(result)


def of_other_choices(options: Iterable[str], chosen: Mapping[str, Any]) -> list[str]:
    """Those of ``options`` that other objectives, or other tasks, have and the ``chosen`` one has not.

    ``chosen`` are settings by dotted option; where one names no such objective or task, none.
    """
    found, known = [], option_types()
    for section, base in SECTIONS.items():
        name = chosen.get(f"{section}.name", base.name)
        if name in list(CHOICES[base]):  # in a list, for a name that can't be hashed
            own = _types(CHOICES[base][name], f"{section}.")
            found += [one for one in options if one.startswith(f"{section}.") and one in known and one not in own]
    return found


def refuse_of_other_choices(options: Iterable[str], chosen: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError that names an option of another objective or task than the chosen one."""
    for option in of_other_choices(options, chosen):
        section, _, name = option.partition(".")
        base = SECTIONS[section]
        owners = [owner for owner, cls in CHOICES[base].items() if option in _types(cls, f"{section}.")]
        raise ConfigError(
            f"{where}: {section} {chosen.get(f'{section}.name', base.name)} has no {name} (an option of "
            f"{', '.join(owners)}); leave it out, or choose {section}.name {owners[0]}"
        )


def refuse_unknown(settings: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an option that does not exist, or null for one that takes none."""
    types = option_types()
    for key, value in settings.items():
        if key not in types:
            raise ConfigError(f"{where}: unknown option {key}; {nearest(key, list(types))}")
        if value is None and type(None) not in get_args(types[key]):
            raise ConfigError(f"{where}: {key}: found null, expected {type_in_words(types[key])}")


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """The known name that a typo means, or that such an option has here, as a question; or what to do instead."""
    section, _, last = name.rpartition(".")
    if last in WAYS and "objective.name" in known and section in WAYS_OF[last]:
        return WAYS[last]
    if OPTIONS.get(last) in known:
        return f"did you mean {prefix}{OPTIONS[last]}?"
    match = [option for option in known if len(last) > 1 and _initials(option) == last]  # lr: learning_rate
    near = lambda option: (bool(section) and option.rpartition(".")[0] != section, option.count(".") != 1)  # noqa: E731
    match = sorted(match, key=near)[:1]
    match = match or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not match and "." not in name:
        match = [option for option in known if option.rsplit(".", 1)[-1] == name][:1]
    return f"did you mean {prefix}{match[0]}?" if match else f"known: {', '.join(known[:12])} (see --help)"


def _initials(option: str) -> str:
    return "".join(word[:1] for word in option.rsplit(".", 1)[-1].split("_"))


def type_in_words(hint: Any) -> str:
    """What an option of this type takes."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))}, each {type_in_words(get_args(hint)[0])}"
    if get_args(hint) and get_origin(hint) is not list:
        return " or ".join("null" if part is type(None) else type_in_words(part) for part in get_args(hint))
    words = {
        bool: "true or false",
        str: "a text",
        int: "a whole number",
        float: "a number",
        list[str]: "a list of texts",
        list[int]: "a list of whole numbers",
    }
    for restricted, name in ((PositiveInt, "above 0"), (NonNegativeInt, "of at least 0")):
        words[restricted] = f"a whole number {name}"
    for restricted, name in ((PositiveFloat, "above 0"), (NonNegativeFloat, "of at least 0")):
        words[restricted] = f"a number {name}"
    words[ClosedUnitInterval] = "a number from 0 to 1"
    return words.get(hint, str(hint))
