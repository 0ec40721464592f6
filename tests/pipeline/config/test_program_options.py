"""Numbers on the command lines of programs: what is accepted, and the one line that refuses the rest."""

from __future__ import annotations

import pytest

from pipeline.config.program_options import number, program_parser, whole_number


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(whole_number(), "1", 1), (whole_number(0), "0", 0), (number(), "1e-3", 0.001), (number(zero=True), "0", 0.0)]
    + [(number(most=1), "1", 1.0)],
)
def test_numbers_in_bounds(kind, text: str, value: float) -> None:
    parser = program_parser("m", "What it does.")
    parser.add_argument("--n", type=kind)
    assert parser.parse_args(["--n", text]).n == value


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (whole_number(), "0", "a whole number of at least 1"),
        (whole_number(), "1.5", "a whole number of at least 1"),
        (whole_number(0), "-1", "a whole number of at least 0"),
        (number("GiB", zero=True), "-1", "a number of GiB of at least 0"),
        (number(), "0", "a number above 0"),
        (number(), "nan", "a number above 0"),
        (number("seconds"), "inf", "a number of seconds above 0"),
        (number(most=1), "1.01", "a number above 0, at most 1"),
        (number(), "many", "a number above 0"),
    ],
)
def test_numbers_out_of_bounds(kind, text: str, expected: str, capsys: pytest.CaptureFixture) -> None:
    parser = program_parser("m", "What it does.")
    parser.add_argument("--n", type=kind)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--n={text}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"argument --n: found '{text}', expected {expected}\n")


def test_help_is_the_docstring(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        program_parser("pipeline.m", "What it does.\n\n  more\n  of it").parse_args(["--help"])
    said = capsys.readouterr().out
    assert "python -m pipeline.m" in said and said.index("What it does.") < said.index("  more\n  of it")
