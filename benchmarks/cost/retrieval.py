"""Cost of exact retrieval scores, against running the whole network on every pair, in one run at real size.

    python -m benchmarks.cost.retrieval [--captions FILE] [--num-captions 256] [--pairs 4] [--repeats 3] [--output JSON]

Both references compute every pair from scratch, so an image goes through its tower once a pair: ``pair_by_pair`` is our
own network on batches of pairs, without padding and with the CLS query alone; ``released_layout`` is what the public
release does (captions padded to 50, all queries; benchmarks/cost/released_layout.py). All share the weights of one
randomly drawn model with released behaviour: ViT-B/32 at 384 px, 6+6 layers of width 768, 50,265 words. What we compute
once an image, once a caption and once a pair is timed apart; ``split`` is the cost of a whole test split of that many
images and captions, from these times. Captions are lines of a file, tokenized by a byte-level BPE trained on that file;
without a file words are random and lengths those of benchmarks/cost/step_cost.py. fp32, dropout off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cost.released_layout import ReleasedLayout
from benchmarks.cost.step_cost import FULL_LENGTH, VOCABULARY, caption, caption_lengths, padded_text
from model.batch import Row
from model.build import build_objective
from model.config import ModelConfig, VisionConfig, objective_options
from model.scoring.pairs import encode_captions, encode_image, score_captions
from pipeline.distributed.host_memory import keep_freed_memory
from pipeline.recording.environment import device_name

IMAGE_SIZE = 384
SPLITS = {"Flickr30K test": (1000, 5000), "COCO test": (5000, 25010)}  # images, captions


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ModelConfig(behaviour="released", vision=VisionConfig(image_size=IMAGE_SIZE))
    objective = build_objective(model, objective_options("flm"), VOCABULARY, FULL_LENGTH).eval().to(device)
    captions = texts(arguments.captions, arguments.num_captions)
    pixels = torch.randint(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    result = measure(objective, captions, pixels, arguments.pairs, arguments.repeats)
    result |= {
        "command": " ".join(["python -m benchmarks.cost.retrieval", *sys.argv[1:]]),
        "hardware": f"{device_name(device)}, {torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="file with a caption a line")
    parser.add_argument("--num-captions", type=int, default=256, help="captions scored with one image")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a batch of the references")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def texts(file: Path | None, count: int) -> list[list[int]]:
    """Token ids of ``count`` captions: neighbours in the order in which all of the file are scored, or random ones."""
    if file is None:
        generator = np.random.default_rng(0)
        quantiles = np.quantile(caption_lengths(None), (np.arange(count) + 0.5) / count).round().astype(int)
        return [caption(length, generator) for length in quantiles]
    from tokenizers import ByteLevelBPETokenizer

    lines = file.read_text(encoding="utf-8").splitlines()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines, vocab_size=VOCABULARY.mask_id - 3, min_frequency=2, show_progress=False)
    encoded = [[0, *(3 + one for one in text.ids[: FULL_LENGTH - 2]), 2] for text in tokenizer.encode_batch(lines)]
    encoded.sort(key=lambda ids: (len(ids), ids))
    mean = statistics.mean(map(len, encoded))
    middle = min(range(len(encoded)), key=lambda number: abs(len(encoded[number]) - mean))
    return encoded[middle : middle + count]


@torch.no_grad()
def measure(objective: nn.Module, captions: list[list[int]], pixels: Tensor, pairs: int, repeats: int) -> dict:
    """Seconds a pair (and an image, a caption) of each way, in turns, and the largest difference of their scores."""
    net, layout = objective.net, ReleasedLayout(objective).eval()
    rank = nn.Linear(net.pooler.dense.in_features, 1).to(pixels.device)
    head = lambda features: rank(net.pooler(features))[:, 0]  # noqa: E731
    chosen = [captions[number] for number in np.linspace(0, len(captions) - 1, pairs).round().astype(int)]
    images = pixels.expand(pairs, 1, -1, -1, -1).contiguous()
    batch = objective.planner(images, [Row(ids, number, 0, "read") for number, ids in enumerate(chosen)])
    batch = batch.to(pixels.device)
    text = padded_text([Row(ids, 0, 0) for ids in chosen], str(pixels.device))
    ways: dict[str, tuple[Callable, int]] = {
        "image": (lambda: encode_image(net, pixels), 1),
        "caption": (lambda: encode_captions(net, objective.planner, captions), len(captions)),
        "pair": (lambda: score_captions(net, head, ready["caption"], ready["image"]), len(captions)),
        "pair_by_pair": (lambda: head(net(batch).queries[batch.terms["read"].position]), pairs),
        "released_layout": (lambda: head(layout.states(images[:, 0], *text)[0][:, 0]), pairs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ready: dict = {}
    for turn in range(-1, repeats):  # the first is a warm-up
        for name, (run, items) in ways.items():
            each, ready[name] = seconds_of(run, items)
            if turn >= 0:
                seconds[name].append(each)
        print(f"turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
    places = [captions.index(ids) for ids in chosen]
    references = {name: ready[name] for name in ("pair_by_pair", "released_layout")}
    return summary(seconds, references) | {
        "mean_tokens": statistics.mean(map(len, captions)),
        "states_per_caption": sum(len(block.states) for block in ready["caption"].blocks) / len(captions),
        "largest_difference": {n: float((ready["pair"][places] - s).abs().max()) for n, s in references.items()},
        "spread_of_scores": float(ready["pair"].std()),
    }


def seconds_of(run: Callable, items: int) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / items, result


def summary(seconds: dict[str, list[float]], references: dict) -> dict:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    speedup = {"one pair more": {name: median[name] / median["pair"] for name in references}}
    for split, (num_images, num_captions) in SPLITS.items():
        pairs = num_images * num_captions
        ours = num_images * median["image"] + num_captions * median["caption"] + pairs * median["pair"]
        speedup[f"{split}, {num_images} x {num_captions}"] = {name: pairs * median[name] / ours for name in references}
    return {"speedup": speedup, "median_seconds": median, "seconds": seconds}


if __name__ == "__main__":
    main()
