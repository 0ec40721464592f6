"""slurm/pipeline.sh in a real Slurm: from no data to the table of scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.desk import SCRIPTS, Desk

TINY = """base: flm_tiny
task: {name: TASK}
train: {steps: 2, eval_every: 0, save_every: 0}
tracking: {tensorboard: false, report: false}
"""


@pytest.mark.slow(60)
@pytest.mark.timeout(1200)
def test_from_data_to_the_table_of_scores(desk: Desk, python: Path) -> None:
    recipes = [str(desk.folder / f"tiny_{task}.yaml") for task in ("captioning", "retrieval")]
    for recipe in recipes:
        Path(recipe).write_text(TINY.replace("TASK", Path(recipe).stem.removeprefix("tiny_")))
    data = desk.folder / "data"
    site = desk.site(
        PYTHON=str(python),
        DATA=[str(data)],
        PREPARE=[
            f"synth --output {data}/synth --train 40 --dev 8 --test 0 --image-size 32 --pair-share 0 --workers 1",
            f"tokenizer --data {data} --output {data}/tokenizer --vocab-size 400",
        ],
        PRETRAIN=["--recipe", "flm_tiny", "--train.steps", "2", "--train.eval_every", "0"],
        FINETUNE=["--data", str(data)],
        TASKS=recipes,
        EVALUATE=["--split", "dev", "--samples", "4"],
    )
    said = desk.cluster.run(SCRIPTS / "pipeline.sh", OPENFLM_SITE=str(site), TEST_FOLDER=str(desk.folder))
    table = Path(said.split("table of scores: ")[1].strip())
    desk.wait(lambda: not desk.cluster.run("squeue", "--noheader").strip(), seconds=900)
    logs = "".join(path.read_text()[-1500:] for path in sorted((desk.folder / "logs").glob("*.out")))
    assert table.exists(), logs
    lines = table.read_text().splitlines()
    assert any(line.split()[:2] == ["tiny_captioning", "captioning"] and "cider" in line for line in lines), logs
    assert any(line.split()[:2] == ["tiny_retrieval", "retrieval"] and "recall" in line for line in lines), logs
    assert (desk.folder / "runs" / "flm_tiny" / "checkpoints").is_dir()
