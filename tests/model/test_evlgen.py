"""EVLGen whole: the release's numbers with OPT and with Vicuna's kind of model, and its checkpoints' names."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.batch import Batch, Row
from model.build import build_objective
from model.config import ConnectorConfig, FLMOptions, ModelConfig, VisionConfig, Vocabulary
from model.evlgen import EVLGen
from model.frozen import follow_mode, freeze
from model.language.causal_lm import LanguageModel
from model.language.text_form import TextForm
from model.merge.plan import MergePlan
from model.objectives.evlgen import ImageToText
from model.torchvision_shim import ensure_torchvision
from model.weights import released_evlgen as released
from model.weights.start import start_from
from model.weights.towers import eva_image_encoder
from tests.oracle import GRADIENT, assert_near, eva_config, load_oracle, oracle_file
from tests.rounding import DOUBLE

ensure_torchvision()

DUMPS = {"opt": "11_evlgen_opt_image.pt", "llama": "14_evlgen_vicuna_image.pt"}
FORMS = {  # of the toy tokenizers
    "opt": TextForm(begin=(2,), end=(14,), predicts_begin=True, cuts_end=True),
    "llama": TextForm(begin=(2,), end=(2,), cuts_end=True),
}
LENGTH = {"opt": 32, "llama": 32}


def settings_of(kind: str, config: dict[str, Any]) -> Any:
    import transformers

    if kind == "opt":
        return transformers.OPTConfig(**config["opt"])
    sizes = config["llama"] | {"vocab_size": config["llm_vocab_after_resize"], "pad_token_id": 310}
    return transformers.LlamaConfig(**sizes | {"bos_token_id": 2, "eos_token_id": 2})


def model_of(kind: str, config: dict[str, Any]) -> ImageToText:
    """The toy model of a dump, with random weights; tower and language model are frozen."""
    eva, bert = config["eva"], config["bert"]
    vision = eva_config(eva)
    connector = ConnectorConfig(
        merging="plain",
        merges_per_layer=bert["r"],
        width=bert["hidden_size"],
        heads=bert["num_attention_heads"],
        ffn_width=bert["intermediate_size"],
        layers=bert["num_hidden_layers"],
        max_positions=bert["max_position_embeddings"],
    )
    language = LanguageModel(settings_of(kind, config))
    vocabulary = Vocabulary(language.num_tokens, 2, 1, 2, 0)
    net = EVLGen(ModelConfig(vision=vision, connector=connector), language, vocabulary, FORMS[kind])
    freeze(net.vision, "dump")
    freeze(net.language, "dump")
    return ImageToText(net)


def load(model: ImageToText, dump: dict[str, Any], prefix: str) -> None:
    """Frozen parts as their own kinds, the trained ones as a released checkpoint."""
    state = dump["state_dict"]
    part = lambda start: {name.removeprefix(start): v for name, v in state.items() if name.startswith(start)}  # noqa: E731
    foreign = eva_image_encoder(part("visual_encoder."), model.net.vision.config)
    start_from(model.net.vision, foreign.state, foreign.rules, "EVA", (), foreign.dropped)
    language = {name: value for name, value in part(f"{prefix}_model.").items() if "inv_freq" not in name}
    if getattr(model.net.language.llm.config, "tie_word_embeddings", False):
        assert torch.equal(language.pop("lm_head.weight"), next(v for n, v in language.items() if "embed_tokens" in n))
    start_from(model.net.language.llm, language, source="LLM")
    trained = {name: state[name] for name in dump["trainable"]}
    start_from(model, released.by_one_name(trained), released.RULES, "EVLGen", released.FROZEN, released.DEAD)


@pytest.mark.parametrize("kind", sorted(DUMPS))
def test_equal_to_the_release(kind: str) -> None:
    """Every intermediate, the loss and all gradients, from images and token ids."""
    dump = load_oracle(DUMPS[kind], "evlgen")
    model = model_of(kind, dump["config"])
    load(model, dump, "opt" if kind == "opt" else "llm")
    model.eval()
    found = dump["intermediates"]
    images = dump["samples"]["image"][:, None]
    batch = a_batch(model, images, found)

    tokens = model.net.features(images)
    assert_near(tokens, found["visual_encoder_out"])
    assert not tokens.requires_grad
    connector = model.net.connector
    assert_near(connector.norm(tokens), found["image_embeds_after_ln_vision"])
    assert_near(connector.input(connector.norm(tokens)), found["VL_proj_out"])
    trace = connector.trace(tokens)
    assert_near(trace.tokens, found["VLconnector_out"])
    for plan, theirs in zip(trace.plans, found["merge_trace"], strict=True):
        num_even = theirs["unm_idx"].shape[1]
        expected = (2 * theirs["unm_idx"], 2 * theirs["src_idx"], num_even + theirs["dst_idx"])
        mine = MergePlan(plan.kept[:, :num_even], plan.merged, plan.into)
        assert all(torch.equal(a, b) for a, b in zip(mine, expected))
    prefix = model.net.encode(images)
    assert_near(prefix, found["llm_proj_out"])

    states = model.net.fuse(batch.plan, prefix).before.unflatten(0, batch.plan.text.shape)
    start = prefix.shape[1] - 1
    for row, length in enumerate(batch.plan.lengths.tolist()):
        logits = model.net.language.logits(states[row, :length])
        assert_near(logits, found["llm_logits"][row, start : start + length])

    loss = model(batch)["caption"] / batch.counts["caption"]
    assert_near(loss, dump["loss"])
    loss.backward()
    expected = model_of(kind, dump["config"])
    for parameter in expected.parameters():
        nn.init.zeros_(parameter)
    start_from(expected, released.by_one_name(dump["grads"]), released.RULES, "gradients", released.FROZEN)
    theirs = dict(expected.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 + 2 + 2 + 4 + 12 * 6
    for name, parameter in trained.items():
        assert_near(parameter.grad, theirs[name], GRADIENT)


def a_batch(model: ImageToText, images: Tensor, found: dict[str, Tensor]) -> Batch:
    """The rows of a dump, from its labels and mask; ours end where its padding begins."""
    labels, mask = found["llm_labels"], found["llm_attention_mask"]
    start = found["llm_proj_out"].shape[1]
    rows = []
    for row in range(len(labels)):
        ids = labels[row, start : int(mask[row].sum())].tolist()
        read = model.net.form.num_read
        assert (ids[:read] == [-100] * read) and -100 not in ids[read:], "what is predicted"
        rows.append(Row([*model.net.form.begin[:read], *ids[read:]], row, 0))
    return model.planner(images, rows)


@pytest.mark.parametrize("temporal", ["released", "ordered"])
def test_a_video_is_the_mean_of_its_frames(temporal: str) -> None:
    """What frames tell each other is trained in a frozen tower too; a new video model is the image model on each
    frame."""
    model = small_model("llama", temporal=temporal).double()
    freeze(model.net.vision, "random")
    for block in model.net.vision.blocks:
        block.temporal.requires_grad_(True)
    frames = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    images = model.net.features(frames.flatten(0, 1)[:, None]).unflatten(0, (2, 4))
    torch.testing.assert_close(model.net.features(frames), images.mean(1), rtol=0, atol=DOUBLE)
    rows = [Row([2, 5, 6, 3], sample * 4, 0) for sample in range(2)]
    model(model.planner(frames, rows))["caption"].backward()
    gates = {n: p.grad for n, p in model.named_parameters() if n.endswith(("temporal.alpha", "temporal.out.weight"))}
    assert len(gates) == 1 and all(gradient.any() for gradient in gates.values())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "vision" in n and "temporal" not in n)
    assert not model.decays("net.vision.blocks.0.temporal.alpha", torch.zeros(()))


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_texts_of_one_image_do_not_see_each_other(kind: str) -> None:
    """Several texts behind one image's tokens have the losses and gradients that they have one by one."""
    model = small_model(kind).double()
    images = torch.randint(0, 256, (3, 1, 3, 16, 16), dtype=torch.uint8)
    texts = [(0, [5, 6, 7]), (2, [8, 9, 10, 11]), (0, [5, 12]), (0, [13, 14, 15, 16, 17]), (1, [18, 19])]
    rows = [Row(model.form.write(words, 32), image, 0) for image, words in texts]
    gradients, losses = [], []
    for batches in ([rows], [[row] for row in rows]):
        model.zero_grad()
        found = [model(model.planner(images, part))["caption"] for part in batches]
        losses.append(sum(found))
        losses[-1].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    plan = model.planner(images, rows).plan
    assert plan.number.max() == 2 and plan.text.shape[0] == 3 and sorted(plan.image.tolist()) == [0, 1, 2]
    atol = 1e-5  # losses are summed in fp32 from logits in double: some 20 of them, of size 3
    torch.testing.assert_close(*losses, rtol=0, atol=atol)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_recomputing_gives_the_same_gradients(kind: str) -> None:
    """Of a language model in evaluation mode too, whose layers run once more in backward."""
    images = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    gradients, calls = [], []
    for recompute in (False, True):
        model = small_model(kind, recompute=recompute)
        layers = [layer for layer in model.net.language.llm.modules() if type(layer).__name__.endswith("DecoderLayer")]
        inner = [layer.self_attn for layer in layers]
        counted = []
        for attention in inner:
            attention.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        model(model.planner(images, [Row([2, 5, 6, 3], 0, 0), Row([2, 7, 3], 1, 1)]))["caption"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append(len(counted))
    assert calls == [2, 4]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_numbers_of_tokens_are_drawn_in_training_only() -> None:
    """All from fewest_tokens to num_tokens, by the first row's seed; an evaluation has num_tokens."""
    model = small_model("llama", num_tokens=4, fewest_tokens=3)
    images = torch.randint(0, 256, (1, 1, 3, 16, 16), dtype=torch.uint8)
    plans = [model.planner(images, [Row([2, 5, 3], 0, seed)]) for seed in range(40)]
    assert {batch.plan.num_tokens for batch in plans} == {3, 4}
    assert model.planner(images, [Row([2, 5, 3], 0, 7)]).plan.num_tokens == plans[7].plan.num_tokens
    seen = []
    model.net.connector.register_forward_hook(lambda _, __, tokens: seen.append(tokens.shape[1]))
    for batch in plans:
        model.train()(batch)
    assert seen == [batch.plan.num_tokens for batch in plans]
    seen.clear()
    model.eval()(plans[0])
    assert seen == [4]
    assert small_model("llama").planner(images, [Row([2, 5, 3], 0, 7)]).plan.num_tokens == 0


@pytest.mark.parametrize("name", ["tomeformer", "qformer", "perceiver", "pooling"])
def test_image_tokens_are_as_large_as_words(name: str) -> None:
    """Those of the images that the connector begins with; those of others within a tenth."""
    model = small_model("llama", name=name)
    net, rms = model.net, lambda values: float(values.square().mean().sqrt())
    words = rms(net.language.llm.get_input_embeddings().weight)
    images, others = torch.randint(0, 256, (2, 64, 1, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert not 0.9 < rms(net.encode(images)) / words < 1.1
        model.begin_with(images, fresh=True)
        assert rms(net.encode(images)) / words == pytest.approx(1, abs=1e-4)
        assert 0.9 < rms(net.encode(others)) / words < 1.1


@pytest.mark.parametrize(("standardise", "fresh"), [(True, True), (False, True), (True, False)])
def test_what_all_images_have_in_common_is_taken_off(standardise: bool, fresh: bool) -> None:
    """Where all of a connector is random; one that was trained is only scaled."""
    model = small_model("llama", standardise=standardise)
    model.begin_with(torch.randint(0, 256, (8, 1, 3, 16, 16), dtype=torch.uint8), fresh)
    norm = model.net.connector.norm
    assert bool((norm.weight != 1).all() and (norm.bias != 0).all()) == (standardise and fresh)


def small_model(kind: str, recompute: bool = False, temporal: Any = None, **options: Any) -> ImageToText:
    """Random weights, a frozen language model."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    if kind == "opt":
        language = LanguageModel(transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes))
    else:
        language = LanguageModel(transformers.LlamaConfig(intermediate_size=64, num_key_value_heads=2, **sizes))
    vision = VisionConfig(None, image_size=16, patch_size=8, width=16, layers=2, head_width=8, temporal=temporal)
    connector = ConnectorConfig(**dict(num_tokens=4, width=16, heads=2, ffn_width=32, layers=1) | options)
    form = TextForm((2,), (3,), (3,))
    config = ModelConfig(vision=vision, connector=connector, activation_checkpointing=recompute)
    net = EVLGen(config, language, Vocabulary(23, 2, 1, 3, -1), form)
    freeze(net.language, "random")
    return ImageToText(net).eval()


def test_released_dropout_is_the_language_models_own() -> None:
    """In training the states are those of transformers' model in training; weights are frozen, evaluations as ever."""
    model = small_model("opt")
    language, inputs = model.net.language, torch.randn(2, 7, 32)
    theirs = type(language.llm)(language.llm.config)
    theirs.load_state_dict(language.llm.state_dict())
    theirs.train()
    assert theirs.config.dropout == 0.1
    still = language.states(inputs)
    model.train()
    assert torch.equal(language.states(inputs), still)  # by default
    follow_mode(language)
    model.train()
    torch.manual_seed(3)
    found = language.states(inputs)
    torch.manual_seed(3)
    expected = theirs.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    assert torch.equal(found, expected) and not torch.equal(found, still)
    assert not any(parameter.requires_grad for parameter in language.parameters())
    model.eval()
    assert torch.equal(language.states(inputs), still)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (ModelConfig(connector=ConnectorConfig(num_tokens=3)), "model.connector.num_tokens has no effect: .*name flm"),
        (ModelConfig(vision=VisionConfig(temporal="ordered")), "model.vision.temporal ordered is for .* evlgen"),
    ],
)
def test_what_another_objective_has_no_use_for_is_refused(model: ModelConfig, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        build_objective(model, FLMOptions(), Vocabulary(61, 0, 1, 2, 3))


def test_a_long_text_is_cut_as_in_the_release() -> None:
    words = list(range(100, 160))
    assert len(FORMS["opt"].write(words, 32)) == 32 and FORMS["opt"].write(words, 32)[-1] == 130
    ours = TextForm(begin=(2,), end=(14,)).write(words, 32)
    assert len(ours) == 32 and ours[-1] == 14


def test_a_released_checkpoint_has_no_unexplained_key() -> None:
    """The layout of a released file, with its junk; one more key, or one less, is named."""
    keys = json.loads(oracle_file("12_checkpoint_keys_tiny.json", "evlgen").read_text())
    file = torch.load(oracle_file("12_checkpoint_layout_opt_image.pth", "evlgen"), weights_only=True)
    dump = load_oracle(DUMPS["opt"], "evlgen")
    model, state = model_of("opt", dump["config"]), released.by_one_name(file["model"])
    assert keys
    loaded = start_from(model, state, released.RULES, "FILE", released.FROZEN, released.DEAD)
    assert loaded.dropped == ["opt_model.lm_head.weight"]
    assert all(name.startswith(("net.vision.", "net.language.")) for name in loaded.fresh)
    with pytest.raises(ValueError, match="FILE: the model has no place for VLconnector.surplus"):
        start_from(
            model,
            state | {"VLconnector.surplus": torch.zeros(1)},
            released.RULES,
            "FILE",
            released.FROZEN,
            released.DEAD,
        )
    state.pop("ln_vision.bias")
    with pytest.raises(ValueError, match="FILE: weights lack ln_vision.bias"):
        start_from(model, state, released.RULES, "FILE", released.FROZEN, released.DEAD)
