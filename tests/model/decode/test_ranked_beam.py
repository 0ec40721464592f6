"""Beam search by transformers' rules: the installed version's ``generate``, and the dumps of an older one."""

from __future__ import annotations

import math

import pytest
import torch

from model.decode.language import LanguageDecoder
from model.decode.ranked_beam import TRANSFORMERS_5, ranked_beam
from model.decode.search import beam
from model.language.causal_lm import LanguageModel
from model.language.text_form import TextForm
from model.torchvision_shim import ensure_torchvision
from model.weights.start import start_from
from tests.model.decode.test_language import NEWLINE, net_of, small_language
from tests.model.decode.test_search import TableDecoder, random_scores
from tests.model.test_evlgen import settings_of
from tests.oracle import load_oracle

ensure_torchvision()

NUM_IMAGES, NUM_TOKENS = 6, 5
FORM = TextForm(end=(NEWLINE,))


def talkative(kind: str, seed: int) -> LanguageModel:
    """Random, its logits so far apart that searches differ; how soon it ends hangs on the image."""
    language = small_language(kind).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in language.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return language


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0])
def test_row_for_row_what_generate_of_transformers_finds(kind: str, penalty: float) -> None:
    """Of 6 images, for several widths, least lengths and models, so that some end early and some are cut."""
    lengths = set()
    for seed in range(2):
        language, tokens = talkative(kind, seed), torch.randn(NUM_IMAGES, NUM_TOKENS, 32)
        for beams, least in ((5, 0), (3, 2)):
            settings = {"num_beams": beams, "length_penalty": penalty, "max_new_tokens": 8, "do_sample": False}
            settings |= {"eos_token_id": NEWLINE, "pad_token_id": NEWLINE, "early_stopping": False}
            mask = torch.ones(tokens.shape[:2], dtype=torch.int64)
            theirs = language.llm.generate(
                inputs_embeds=tokens, attention_mask=mask, min_new_tokens=least or None, **settings
            )
            expected = [row[: row.index(NEWLINE)] if NEWLINE in row else row for row in theirs.tolist()]
            decoder = LanguageDecoder(net_of(language, FORM), tokens)
            found = ranked_beam(decoder, 8, beams, penalty, min_tokens=least, rules=TRANSFORMERS_5)
            assert found == expected
            lengths |= {len(row) for row in found}
    assert len(lengths) > 1, "else nothing would be tested"


@pytest.mark.parametrize("name", ["caption_beam5_lp1", "caption_video_beam5", "vqa_beam5_lp0", "vqa_beam5_lp-1"])
def test_beams_are_those_of_the_release(name: str) -> None:
    """Which transformers 4.31 decoded: its lengths count a token that it puts before the text."""
    import transformers

    dump = load_oracle("16_generation_opt.pt", "evlgen")
    language = LanguageModel(transformers.OPTConfig(**dump["config"]))
    state = {name: value for name, value in dump["state_dict"].items() if name != "lm_head.weight"}
    start_from(language.llm, state)
    run = dump["runs"][name]
    options = run["kwargs"]
    most = options["max_new_tokens"] if "max_new_tokens" in options else options["max_length"] - 1
    decoder = LanguageDecoder(net_of(language, FORM), dump["prefix_embeds"])
    penalty, least = float(options["length_penalty"]), options["min_length"] - 1
    found = ranked_beam(decoder, most, options["num_beams"], penalty, min_tokens=least)
    rows = [row[1:] for row in run["ids_with_placeholder_bos"].tolist()]
    assert found == [row[: row.index(NEWLINE)] if NEWLINE in row else row for row in rows]


@pytest.mark.parametrize(
    ("kind", "dumped"), [("opt", "11_evlgen_opt_image.pt"), ("llama", "14_evlgen_vicuna_image.pt")]
)
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_beams_of_the_release_behind_its_prompts(kind: str, dumped: str, task: str) -> None:
    """Captions and answers of the whole model; with Vicuna by its penalty on repetitions, questions of two lengths."""
    dump = load_oracle(dumped, "evlgen")
    prefix, language = ("opt_model.", "opt") if kind == "opt" else ("llm_model.", "llama")
    model = LanguageModel(settings_of(language, dump["config"]))
    state = {name.removeprefix(prefix): v for name, v in dump["state_dict"].items() if name.startswith(prefix)}
    tied = getattr(model.llm.config, "tie_word_embeddings", False)
    dropped = ("inv_freq", "lm_head") if tied else ("inv_freq",)
    start_from(model.llm, {name: v for name, v in state.items() if not any(one in name for one in dropped)})
    run = dump["generation"][f"{task}_beams5"]
    options, inputs, mask = run["kwargs"], run["prefix_embeds"], run["prefix_mask"].bool()
    end = options.get("eos_token_id", model.llm.config.eos_token_id)
    table = model.llm.get_input_embeddings().weight.detach()
    num_tokens = dump["intermediates"]["VLconnector_out"].shape[1]  # then the gap of the shorter question
    questions = []
    for row, seen in zip(inputs[:, num_tokens:], mask[:, num_tokens:], strict=True):
        distances = (row[seen][:, None] - table).abs().amax(-1)
        assert float(distances.min(1).values.max()) < 1e-6, "each is the embedding of a word"
        questions.append(distances.argmin(1).tolist())
    decoder = LanguageDecoder(net_of(model, TextForm(end=(end,))), inputs[:, :num_tokens], questions=questions)
    most = options["max_new_tokens"] if "max_new_tokens" in options else options["max_length"] - 1
    found = ranked_beam(
        *(decoder, most, 5, float(options["length_penalty"])),
        min_tokens=options["min_length"] - 1,
        repetition_penalty=options.get("repetition_penalty", 1.0),
    )
    rows = [row[1:] for row in run["ids"].tolist()]
    assert found == [row[: row.index(end)] if end in row else row for row in rows]


def test_a_word_that_is_there_costs_more_by_the_penalty() -> None:
    """Scored by hand, greedily: "0" again and again, unless its log probability doubles: .6 to .36, below .39."""
    logs = lambda _, words: [math.log(p) for p in (0.6, 0.39, 0.01)]  # noqa: E731
    assert ranked_beam(TableDecoder(logs, 1), 3, 1, 0.0) == [[0, 0, 0]]
    assert ranked_beam(TableDecoder(logs, 1), 2, 1, 0.0, repetition_penalty=2.0) == [[0, 1]]


def test_an_end_that_is_not_among_the_best_candidates_is_lost() -> None:
    """Scored by hand, one beam: the empty text is worth .2, but the likeliest first word is "0"; "0 0", cut, .175."""
    table = {(): [0.5, 0.3, 0.2], (0,): [0.35, 0.33, 0.32]}
    logs = lambda _, words: [math.log(p) for p in table[tuple(words)]]  # noqa: E731
    assert beam(TableDecoder(logs, 1), 2, 1, 0.0) == [[]]
    assert ranked_beam(TableDecoder(logs, 1), 2, 1, 0.0) == [[0, 0]]


def test_what_makes_no_sense_is_refused() -> None:
    table = random_scores(0, 6, 0.0, 0.0)
    with pytest.raises(ValueError, match="beams is 0, expected at least 1"):
        ranked_beam(TableDecoder(table, 1), 5, beams=0)
    with pytest.raises(ValueError, match="min_tokens is 6, expected at most max_tokens, which is 5"):
        ranked_beam(TableDecoder(table, 1), 5, min_tokens=6)
