"""docs/data.md says what the code does: commands that parse, every reason explained."""

import re
import shlex
from pathlib import Path

import pytest

from data_prep.__main__ import build_parser
from data_prep.filters import REASONS
from data_prep.verbs.table import VERBS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0]
    for name in ("docs/data.md", "README.md")
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if line.startswith("python -m data_prep") and "&&" not in line and "VERB" not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_parse(command):
    arguments = build_parser().parse_args(shlex.split(command)[3:])
    assert arguments.verb


def test_every_reason_is_explained_as_the_code_explains_it():
    documented = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", TEXT, re.MULTILINE))
    assert {reason: documented.get(reason) for reason in REASONS} == REASONS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_defaults_as_one_would_type_them(verb, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb, "--help"])
    assert not re.search(r"\(default: (None|False|[^)]*[(\[<])", capsys.readouterr().out)
