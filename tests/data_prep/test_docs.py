"""The pages about data say what the code does: commands that parse, every reason explained."""

import re
import shlex
from pathlib import Path

import pytest

from data_prep.__main__ import build_parser
from data_prep.filters import REASONS
from data_prep.sources.origins import ORIGINS
from data_prep.verbs.table import VERBS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
DOCUMENTS = ("docs/data.md", "docs/corpora.md", "docs/downloading.md", "docs/upkeep.md", "README.md")
COMMANDS = [
    line.split("#")[0]
    for name in DOCUMENTS
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if line.startswith("python -m data_prep") and "&&" not in line and "VERB" not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_parse(command):
    arguments = build_parser().parse_args(shlex.split(command)[3:])
    assert arguments.verb


def test_every_corpus_of_its_own_verb_has_a_section_that_ends_in_training():
    """docs/corpora.md: from the page of its files to a recipe that is there."""
    text = (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")[2:]
    for verb in ("cc3m", "cc12m", "sbu", "laion", "coco", "vg", "flickr30k", "flickr8k", "vqav2", "nlvr2", "snli_ve"):
        (section,) = [one for one in sections if f"python -m data_prep {verb} " in one]
        page = ORIGINS[verb].page.split()[0].split("/")[0].removeprefix("www.")
        assert page in section and re.search(r"deepspeed pipeline/train.py .*--data data/", section), verb
    recipes = re.findall(r"--recipe (\w+)", text)
    assert recipes and all((ROOT / "pipeline" / "recipes" / f"{name}.yaml").is_file() for name in recipes)


def test_every_reason_is_explained_as_the_code_explains_it():
    documented = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", TEXT, re.MULTILINE))
    assert {reason: documented.get(reason) for reason in REASONS} == REASONS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_defaults_as_one_would_type_them(verb, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb, "--help"])
    assert not re.search(r"\(default: (None|False|[^)]*[(\[<])", capsys.readouterr().out)
