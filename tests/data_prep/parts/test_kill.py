"""SIGKILL at random moments, another engine and another number of workers each time: the split is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from tests.data_prep.parts.image_server import arguments, files, image_server
from tests.data_prep.parts.killed_prepare import prepare_with_kills

COUNT, ROWS_PER_PART, KILLS = 120, 10, 4


@pytest.mark.slow(60)
@pytest.mark.timeout(600)
def test_a_killed_and_resumed_split_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    with image_server() as server:
        server.status = {number: 404 for number in range(0, COUNT, 9)}
        table = server.table(tmp_path / "rows.tsv", COUNT)
        assert main(arguments(table, tmp_path / "whole", rows_per_part=ROWS_PER_PART)) == 0
        server.seconds = 0.1
        (tmp_path / "killed").mkdir()
        course = prepare_with_kills(
            table, tmp_path / "killed" / "whole", KILLS, 0, 8.0, ROWS_PER_PART, files(tmp_path / "whole" / "train")
        )
    assert sum(killed for _, killed, _ in course.attempts) == KILLS and course.looks > 0
    assert files(tmp_path / "killed" / "whole" / "train") == files(tmp_path / "whole" / "train")
    assert verify_split(tmp_path / "whole" / "train", Limits(), 1).problems == []
    assert sorted(path.name for path in (tmp_path / "killed" / "whole").iterdir()) == ["README.md", "train"]
