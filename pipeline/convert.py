"""Converts checkpoints of the FLM release to this project's names and back, and GGUF files to folders.

    python -m pipeline.convert import-flm CKPT OUT [--text-heads N]
    python -m pipeline.convert export-flm OUT CKPT
    python -m pipeline.convert import-evlgen CKPT OUT --recipe NAME|FILE [--merges N]
    python -m pipeline.convert import-gguf FILE OUT

import-flm reads a released checkpoint, pretrained (FLM, MLM, AR) or fine-tuned, and makes the folder OUT:
weights.safetensors, recipe.yaml (its sizes; train from it with --recipe OUT/recipe.yaml) and import.json (what became
of every key). Nothing in CKPT is executed. export-flm writes the released layout again, without what nothing reads.
import-evlgen does as import-flm with a checkpoint of EVLGen's release, which holds what was trained only: the recipe
names the vision tower and the language model that it was trained with. import-gguf makes a folder of a language model
in a GGUF file, for --model.language.name OUT.

Exit codes: 0 done, 2 a file that cannot be converted, or a wrong command line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.program import run_program
from model.weights.released_evlgen import RELEASED_MERGES
from pipeline.config.options import fail
from pipeline.weights.gguf import import_gguf
from pipeline.weights.importing import export_flm, import_evlgen, import_flm
from pipeline.weights.packaged import parse_settings


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        if arguments.verb == "import-flm":
            import_flm(arguments.source, arguments.target, arguments.text_heads)
        elif arguments.verb == "import-evlgen":
            config = parse_settings(["--recipe", arguments.recipe]).config
            import_evlgen(arguments.source, arguments.target, config, arguments.merges)
        elif arguments.verb == "import-gguf":
            import_gguf(arguments.source, arguments.target)
        else:
            export_flm(arguments.source, arguments.target)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return fail(error if isinstance(error, ValueError) else ValueError(str(error)))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("import-flm", help="released checkpoint -> folder")
    one.add_argument("source", metavar="CKPT", type=Path)
    one.add_argument("target", metavar="OUT", type=Path)
    one.add_argument("--text-heads", type=int, help="attention heads of the text tower (default: 64 channels each)")
    two = verbs.add_parser("export-flm", help="folder -> released layout")
    two.add_argument("source", metavar="OUT", type=Path)
    two.add_argument("target", metavar="CKPT", type=Path)
    four = verbs.add_parser("import-evlgen", help="checkpoint of EVLGen's release -> folder")
    four.add_argument("source", metavar="CKPT", type=Path)
    four.add_argument("target", metavar="OUT", type=Path)
    four.add_argument("--recipe", metavar="NAME|FILE", required=True, help="names vision tower and language model")
    four.add_argument("--merges", type=int, default=RELEASED_MERGES, help="tokens that each layer merges (%(default)s)")
    three = verbs.add_parser("import-gguf", help="language model in a GGUF file -> folder")
    three.add_argument("source", metavar="FILE", type=Path)
    three.add_argument("target", metavar="OUT", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main)
