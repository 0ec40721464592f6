"""Texts from a language model behind image tokens: the release's, and those of running it anew for every token."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ConnectorConfig, ModelConfig, VisionConfig, Vocabulary
from model.decode.language import LanguageDecoder
from model.decode.likelihood import log_probabilities
from model.decode.ranked_beam import ranked_beam
from model.decode.search import beam, greedy
from model.decode.stream import decoder_of
from model.evlgen import EVLGen
from model.language.causal_lm import LanguageModel
from model.language.text_form import TextForm
from model.objectives.evlgen import ImageToText
from model.torchvision_shim import ensure_torchvision
from model.weights.start import start_from
from tests.model.test_evlgen import load, model_of
from tests.oracle import load_oracle

ensure_torchvision()

NEWLINE = 14
BEGIN = 2


def net_of(language: LanguageModel, form: TextForm) -> SimpleNamespace:
    """What a decoder asks of a network; its images are tokens already."""
    return SimpleNamespace(language=language.eval(), form=form, prefix=lambda tokens: tokens)


def small_language(kind: str) -> LanguageModel:
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    ids = dict(pad_token_id=1, bos_token_id=2, eos_token_id=2)
    if kind == "opt":
        return LanguageModel(transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes, **ids))
    return LanguageModel(transformers.LlamaConfig(intermediate_size=64, num_key_value_heads=2, **sizes, **ids))


def test_greedy_texts_are_those_of_the_release() -> None:
    """Its lengths count the token that it puts before the text: at most 29 new ones, 7 before an end."""
    dump = load_oracle("16_generation_opt.pt", "evlgen")
    import transformers

    language = LanguageModel(transformers.OPTConfig(**dump["config"]))
    state = dict(dump["state_dict"])
    assert torch.equal(state.pop("lm_head.weight"), state["model.decoder.embed_tokens.weight"])
    start_from(language.llm, state)
    net = net_of(language, TextForm(end=(NEWLINE,)))
    run = dump["runs"]["caption_greedy"]
    found = greedy(LanguageDecoder(net, dump["prefix_embeds"]), 29, min_tokens=run["kwargs"]["min_length"] - 1)
    expected = [row[1 : row.index(NEWLINE)] for row in run["ids_with_placeholder_bos"].tolist()]
    assert found == expected


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_released_texts_of_llama_avoid_repetition(task: str) -> None:
    """Greedy, with its penalty of 1.5 on words that a text has already; without it they are others."""
    dump = load_oracle("14_evlgen_vicuna_image.pt", "evlgen")
    model = model_of("llama", dump["config"])
    load(model, dump, "llm")
    run, found = dump["generation"][f"{task}_beams1"], []
    mask, kwargs = run["prefix_mask"].bool(), run["kwargs"]
    net = net_of(model.net.language, TextForm(end=(2,)))
    for penalty in (1.5, 1.0):
        texts = []
        for row in range(len(mask)):  # what is masked was padding
            prefix = run["prefix_embeds"][row, mask[row]][None]
            limits = {"max_tokens": kwargs["max_length"] - 1, "min_tokens": kwargs["min_length"] - 1}
            texts += greedy(LanguageDecoder(net, prefix), **limits, repetition_penalty=penalty)
        found.append(texts)
    ids = [row[1:] for row in run["ids"].tolist()]
    assert found[0] == [row[: row.index(2)] if 2 in row else row for row in ids] != found[1]


@pytest.mark.slow
def test_beams_are_penalised_by_what_each_has_said() -> None:
    """Against a search that keeps every text of three words, scored by whole passes, with the penalty in a loop."""
    language, penalty = small_language("llama"), 1.7
    form = TextForm(begin=(BEGIN,), end=(NEWLINE,))
    tokens = torch.randn(1, 5, 32)
    decoder = LanguageDecoder(net_of(language, form), tokens)
    found = beam(decoder, 3, beams=23**2, length_penalty=0.0, repetition_penalty=penalty)
    values: dict[tuple[int, ...], float] = {}

    def go_on(words: tuple[int, ...], value: float) -> None:
        if len(words) == 3:
            values[words] = value
            return
        inputs = torch.cat([tokens, language.embed(torch.tensor([[BEGIN, *words]]))], dim=1)
        scores = language.logits(language.states(inputs)[0, -1]).log_softmax(-1).tolist()
        for word, score in enumerate(scores):
            score = score * penalty if word in words else score
            if word == NEWLINE:
                values[words] = value + score
            else:
                go_on((*words, word), value + score)

    with torch.no_grad():
        go_on((), 0.0)
    assert tuple(found[0]) == max(values, key=values.get)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_cached_scores_are_those_of_a_whole_pass(kind: str) -> None:
    """Of every prefix of a text, through a selection of sequences as beam search makes it."""
    language = small_language(kind).double()
    form = TextForm(begin=(BEGIN,), end=(NEWLINE,))
    tokens, words = torch.randn(2, 5, 32, dtype=torch.float64), torch.randint(3, 23, (4, 6))
    decoder = LanguageDecoder(net_of(language, form), tokens, prompt=[7])
    atol = 1e-5  # the decoder's scores are fp32, of size 1

    def anew(tokens: Tensor, ids: Tensor) -> Tensor:
        inputs = torch.cat([tokens, language.embed(ids)], dim=1)
        states = language.states(inputs)
        return language.logits(states[:, -1]).float()

    with torch.no_grad():
        first = torch.tensor([[BEGIN, 7]]).expand(2, -1)
        torch.testing.assert_close(decoder.start(), anew(tokens, first), rtol=0, atol=atol)
        decoder.select(torch.tensor([0, 0, 1, 1]))
        order = torch.tensor([1, 0, 3, 2])
        ids = torch.tensor([[BEGIN, 7]]).expand(4, -1)
        for number in range(6):
            ids = torch.cat([ids, words[:, number : number + 1]], dim=1)
            found = decoder.step(words[:, number])
            torch.testing.assert_close(found, anew(tokens[[0, 0, 1, 1]], ids), rtol=0, atol=atol)
            decoder.select(order)
            ids, words = ids[order], words[order]


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_beam_of_all_is_the_best_of_all(kind: str) -> None:
    """Against every text of two words, scored by a whole pass each."""
    language, form = small_language(kind), TextForm(begin=(BEGIN,), end=(NEWLINE,))
    tokens = torch.randn(1, 5, 32)
    found = beam(LanguageDecoder(net_of(language, form), tokens), 2, beams=23, length_penalty=0.0)
    with torch.no_grad():
        values = {}
        for first in range(23):
            ids = [BEGIN, first]
            inputs = torch.cat([tokens, language.embed(torch.tensor([ids]))], dim=1)
            states = language.states(inputs)
            scores = language.logits(states[0, -2:]).log_softmax(-1)
            if first == NEWLINE:
                values[()] = float(scores[0, first])
                continue
            values[(first,)] = float(scores[0, first] + scores[1, NEWLINE])
            values |= {(first, w): float(scores[0, first] + scores[1, w]) for w in range(23) if w != NEWLINE}
    assert tuple(found[0]) == max(values, key=values.get)


@pytest.mark.parametrize("form", [TextForm((BEGIN,), (NEWLINE,), (NEWLINE,)), TextForm((), (BEGIN,), (NEWLINE,))])
def test_how_probable_a_text_is(form: TextForm) -> None:
    """The sum of what the decoder says of each word and of the end, of texts of different lengths."""
    language = small_language("llama")
    vision = VisionConfig(name=None, image_size=16, patch_size=8, width=16, layers=2, head_width=8)
    connector = ConnectorConfig(num_tokens=4, width=16, heads=2, ffn_width=32, layers=1)
    vocabulary = Vocabulary(language.num_tokens, BEGIN, 1, NEWLINE, -1)
    net = EVLGen(ModelConfig(vision=vision, connector=connector), language, vocabulary, form)
    objective = ImageToText(net).eval().double()
    texts = [[3, 4, 5, 6], [7], [8, 9, 10, 11, 12, 13]]
    with torch.no_grad():
        tokens = net.encode(torch.randint(0, 256, (3, 1, 3, 16, 16), dtype=torch.uint8))
        found = log_probabilities(objective, tokens, texts, max_tokens=6, num_prompt=1)
        for number, words in enumerate(texts):
            decoder = decoder_of(objective, torch.zeros(0), words[:1], tokens[number : number + 1])
            scores, expected = decoder.start(), 0.0
            for word in [*words[1:], *([NEWLINE] if len(words) < 6 else [])]:
                expected += float(scores.log_softmax(-1)[0, word])
                scores = decoder.step(torch.tensor([word]))
            assert float(found[number]) == pytest.approx(expected, abs=1e-4)  # sums of up to 7 fp32 numbers of size 3


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("search", [greedy, beam, ranked_beam])
def test_an_answer_hangs_on_its_own_question_and_image_only(kind: str, search: Callable[..., Any]) -> None:
    """Questions of 0 to 9 tokens in one batch, against each by itself as a prompt that all have."""
    language, form = small_language(kind).double(), TextForm(begin=(BEGIN,), end=(NEWLINE,))
    tokens = torch.randn(5, 4, 32, dtype=torch.float64)
    questions = [torch.randint(3, 13, (length,)).tolist() for length in (2, 9, 0, 9, 5)]
    net = net_of(language, form)
    found = search(LanguageDecoder(net, tokens, questions=questions), 6)
    for number, question in enumerate(questions):
        alone = LanguageDecoder(net, tokens[number : number + 1], prompt=question)
        alone.prompt = []  # it is no part of the text
        assert search(alone, 6) == found[number : number + 1]
    assert len({tuple(words) for words in found}) > 1


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_scores_behind_questions_of_other_lengths(kind: str) -> None:
    """Of each question by itself, in a whole pass, through a selection as beam search makes it."""
    language, form = small_language(kind).double(), TextForm(begin=(BEGIN,), end=(NEWLINE,))
    tokens, questions = torch.randn(2, 4, 32, dtype=torch.float64), [[5, 6, 7, 8, 9], [4]]
    decoder = LanguageDecoder(net_of(language, form), tokens, questions=questions)

    def anew(image: int, words: list[int]) -> Tensor:
        ids = torch.tensor([[BEGIN, *questions[image], *words]])
        states = language.states(torch.cat([tokens[image : image + 1], language.embed(ids)], dim=1))
        return language.logits(states[:, -1])[0].float()

    with torch.no_grad():
        texts: list[tuple[int, list[int]]] = [(0, []), (1, [])]
        found = decoder.start()
        for order, ids in (([0, 0, 1, 1], [3, 4, 5, 6]), ([1, 0, 3, 3], [7, 8, 9, 10]), ([0, 1, 3, 2], [3, 3, 4, 4])):
            expected = torch.stack([anew(*text) for text in texts])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # fp32 of size 1
            decoder.select(torch.tensor(order))
            texts = [(texts[place][0], [*texts[place][1], word]) for place, word in zip(order, ids, strict=True)]
            found = decoder.step(torch.tensor(ids))


def test_a_question_that_leaves_no_position_is_refused() -> None:
    decoder = LanguageDecoder(
        net_of(small_language("opt"), TextForm(end=(NEWLINE,))), torch.randn(1, 4, 32), (), [[5] * 50]
    )
    with pytest.raises(ValueError, match="max_tokens is 10, expected more than the prompt's 0, at most 9"):
        greedy(decoder, 10)
