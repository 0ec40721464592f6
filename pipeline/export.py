"""Makes one folder of a trained model, in the form of the Hugging Face hub.

    python -m pipeline.export RUN OUT                        the newest checkpoint of a run, fp32, with frozen parts
    python -m pipeline.export RUN OUT --checkpoint 1000 --dtype bfloat16 --licence apache-2.0

RUN is a run folder, one of its checkpoint folders, or a folder made by `python -m pipeline.convert import-flm`. OUT
holds config.json, model.safetensors, the tokenizer, preprocessor_config.json, a model card and, where the run has them,
the frozen vision tower and language model in the form of the libraries they come from. It can be used wherever a run
can: openflm.load, pipeline.generate and pipeline.evaluate --run OUT, pipeline/train.py --model.weights OUT. Before it
gets its name it is loaded, and its logits are compared bit for bit with those of the checkpoint. No GPU is needed.

Exit codes: 0 done, 2 nothing was exported, or not pushed, for the reason given, or a wrong command line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.program import run_program
from pipeline.config.options import fail
from pipeline.config.program_options import number, program_parser, whole_number
from pipeline.exporting.graphs import refuse_without_onnx
from pipeline.exporting.source import find_source
from pipeline.exporting.uploading import push, refuse_unreachable
from pipeline.exporting.writing import DTYPES, Options, export


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    options = Options(
        dtype=arguments.dtype,
        without_frozen=arguments.without_frozen,
        vision_tower=arguments.vision_tower,
        onnx=arguments.onnx,
        torch_export=arguments.torch_export,
        licence=arguments.licence,
        overwrite=arguments.overwrite,
        max_file_bytes=int(arguments.file_gb * 1e9),
    )
    try:
        if arguments.onnx:
            refuse_without_onnx()
        if arguments.push:
            refuse_unreachable(arguments.push)
        source = find_source(arguments.run, arguments.checkpoint, arguments.tokenizer)
        facts = export(source, arguments.out, options)
        print(f"{arguments.out}: {source.checkpoint}, {facts.dtype}; the {facts.compared}", flush=True)
        if arguments.push:
            print(push(arguments.out, arguments.push))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return fail(error if isinstance(error, ValueError) else ValueError(str(error)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = program_parser("pipeline.export", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, checkpoint folder or imported model")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument(
        "--checkpoint", type=whole_number(), metavar="STEP", help="step of the run (default: the newest)"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of all weights (default: float32)")
    frozen = "leave frozen parts out: they are loaded by their names, and compared by hash"
    parser.add_argument("--without-frozen", action="store_true", help=frozen)
    tower = "write vision_tower/ by the names of its library, for a trained tower too"
    parser.add_argument("--vision-tower", action="store_true", help=tower)
    parser.add_argument("--onnx", action="store_true", help="vision_tower.onnx too (pip install '.[onnx]')")
    parser.add_argument("--torch-export", action="store_true", help="vision_tower.pt2 too, of torch.export")
    parser.add_argument(
        "--licence", "--license", metavar="ID", help="identifier of the hub for the card, like apache-2.0"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER|NAME", help="of an imported model, which has none of its own")
    parser.add_argument(
        "--file-gb", type=number(), default=5.0, metavar="GB", help="largest file of weights (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the exported folder OUT")
    parser.add_argument("--push", metavar="REPO", help="then upload it to OWNER/NAME of the hub, private if it is new")
    return parser


if __name__ == "__main__":
    run_program(main)
