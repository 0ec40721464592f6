"""What a caption costs: cached decoding against re-running the whole model for every token, as the release does.

    python -m benchmarks.cost.captioning --output benchmarks/results/captioning.json

The paper's model (ViT-B/32, 6 + 6 layers 768 wide, 50,265 tokens and the release's two) with random weights, in
released form so that both write the same captions: `<s> <bos>`, then the most probable token. The release runs image
encoder, both streams and the reconstructor anew for each token (``released_layout.py``, unpadded, logits of the last
position only); we encode the image once and feed the l2r stream one token at a time. Rounds alternate; a ratio is of
two runs of one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cost.loading import machine
from benchmarks.cost.released_layout import ReleasedLayout
from model.build import build_captioning
from model.config import FLMOptions, ModelConfig, VisionConfig, Vocabulary
from model.decode.search import greedy
from model.decode.stream import decoder_of

VOCABULARY = Vocabulary(size=50_265, bos_id=0, pad_id=1, eos_id=2, mask_id=50_264)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = ModelConfig(behaviour="released", vision=VisionConfig(image_size=arguments.image_px))
    objective = build_captioning(config, FLMOptions(), VOCABULARY).eval()
    images = torch.randint(0, 256, (arguments.images, 1, 3, arguments.image_px, arguments.image_px), dtype=torch.uint8)
    result = measure(objective, images, arguments.tokens, arguments.rounds)
    result |= {"images": arguments.images, "image_px": arguments.image_px, "tokens": arguments.tokens}
    result |= {"threads": arguments.threads, "precision": "fp32"}
    result["command"] = "python -m benchmarks.cost.captioning " + " ".join(argv if argv is not None else sys.argv[1:])
    result["machine"] = machine()
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    return 0 if result["same_captions"] else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.captioning", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="in one batch")
    parser.add_argument("--image-px", type=int, default=384, help="a multiple of 32 (the recipe's: 384)")
    parser.add_argument("--tokens", type=int, default=30, help="longest caption (the release's: 30)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output")
    return parser.parse_args(argv)


@torch.no_grad()
def measure(objective: nn.Module, images: Tensor, num_tokens: int, rounds: int) -> dict[str, object]:
    """Seconds of either way, their ratio, whether captions are the same and how far scores are apart at most."""
    ways: dict[str, Callable[[], tuple[list[list[int]], Tensor]]] = {
        "cached": lambda: cached(objective, images, num_tokens),
        "rerun": lambda: rerun(objective, images, num_tokens),
    }
    decoder_of(objective, images[:1]).start()  # what only the first run pays for
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - began)
    ratios = [slow / fast for slow, fast in zip(seconds["rerun"], seconds["cached"], strict=True)]
    (ours, scores), (theirs, others) = found["cached"], found["rerun"]
    return {
        "seconds": seconds,
        "speedup": round(statistics.median(ratios), 2),
        "same_captions": ours == theirs,
        "largest_difference_of_scores": float((scores - others).abs().max()) if ours == theirs else None,
        "words": sum(map(len, ours)),
    }


def cached(objective: nn.Module, images: Tensor, num_tokens: int) -> tuple[list[list[int]], Tensor]:
    """Greedy captions, and the scores [B, V] that the last token was chosen from."""
    decoder = decoder_of(objective, images)
    last: list[Tensor] = []
    start, step = decoder.start, decoder.step
    decoder.start = lambda: last.append(start()) or last[-1]
    decoder.step = lambda ids: last.append(step(ids)) or last[-1]
    return greedy(decoder, num_tokens), last[-1]


def rerun(objective: nn.Module, images: Tensor, num_tokens: int) -> tuple[list[list[int]], Tensor]:
    """The same by the whole model for every token."""
    layout, form, count = ReleasedLayout(objective).eval(), objective.form, len(images)
    text = torch.tensor([[form.vocabulary.bos_id, *form.begin]] * count)
    finished = torch.zeros(count, dtype=torch.bool)
    for _ in range(num_tokens):
        _, l2r, _ = layout.states(images[:, 0], text, torch.full((count,), text.shape[1]))
        scores = objective.lm_head.logits(l2r[:, -1])
        ids = scores.argmax(-1)
        finished |= torch.isin(ids, torch.tensor(form.end_ids))
        text = torch.cat([text, ids[:, None]], 1)
        if finished.all():
            break
    captions = []
    for row in text[:, 2:].tolist():
        ends = [place for place, word in enumerate(row) if word in form.end_ids]
        captions.append(row[: ends[0]] if ends else row)
    return captions, scores


if __name__ == "__main__":
    sys.exit(main())
