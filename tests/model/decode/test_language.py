"""Texts from a language model behind image tokens: the release's, and those of running it anew for every token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.config import ConnectorConfig, ModelConfig, VisionConfig, Vocabulary
from model.decode.language import LanguageDecoder
from model.decode.likelihood import log_probabilities
from model.decode.search import beam, greedy
from model.decode.stream import decoder_of
from model.evlgen import EVLGen
from model.language.causal_lm import LanguageModel
from model.language.text_form import RELEASED, TextForm
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
    found = greedy(LanguageDecoder(net, dump["prefix_embeds"], fewest_words=run["kwargs"]["min_length"] - 1), 29)
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
    for penalty in (RELEASED["llama"].repetition_penalty, 1.0):
        net = net_of(model.net.language, TextForm(end=(2,), repetition_penalty=penalty))
        texts = []
        for row in range(len(mask)):  # what is masked was padding
            prefix = run["prefix_embeds"][row, mask[row]][None]
            decoder = LanguageDecoder(net, prefix, fewest_words=kwargs["min_length"] - 1)
            texts += greedy(decoder, kwargs["max_length"] - 1)
        found.append(texts)
    ids = [row[1:] for row in run["ids"].tolist()]
    assert found[0] == [row[: row.index(2)] if 2 in row else row for row in ids] != found[1]


@pytest.mark.slow
def test_beams_are_penalised_by_what_each_has_said() -> None:
    """Against a search that keeps every text of three words, scored by whole passes, with the penalty in a loop."""
    language, penalty = small_language("llama"), 1.7
    form = TextForm(begin=(BEGIN,), end=(NEWLINE,), repetition_penalty=penalty)
    tokens = torch.randn(1, 5, 32)
    found = beam(LanguageDecoder(net_of(language, form), tokens), 3, beams=23**2, length_penalty=0.0)
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
