"""Starting weights from open_clip and transformers: our towers compute what theirs compute."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from model.attention import Packing, text_attention
from model.build import build_objective
from model.config import FLMOptions, ModelConfig, TextConfig, VisionConfig, objective_options
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import IMAGE_MEAN, IMAGE_STD, VisionTower, resolve_sizes
from pipeline.weights.sources import load_text, load_vision
from tests.rounding import TINY, rounding
from tests.tiny_flm import VOCABULARY, tiny_config, tiny_flm

ensure_torchvision()


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_vision_tower_equals_open_clip(quick_gelu: bool, tmp_path: Path):
    """All blocks kept, position table of equal size: the tokens after ``ln_post`` are those of open_clip's tower."""
    from open_clip.model import QuickGELU
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(
        image_size=64,
        patch_size=16,
        width=64,
        layers=3,
        heads=2,
        mlp_ratio=4.0,
        output_dim=32,
        output_tokens=True,
        act_layer=QuickGELU if quick_gelu else torch.nn.GELU,
    ).eval()
    file = tmp_path / "clip.pt"
    torch.save({f"visual.{name}": value for name, value in theirs.state_dict().items()}, file)
    config = VisionConfig(
        name=None,
        pretrained=str(file),
        image_size=64,
        patch_size=16,
        width=64,
        layers=3,
        head_width=32,
        quick_gelu=quick_gelu,
        drop_last_block=False,
    )
    ours = VisionTower(config).eval()
    assert load_vision(ours, config).dropped == ["proj"]
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    _, tokens = theirs((pixels.float() / 255 - mean) / std)
    tolerance = rounding(3 * 16 * 16, *[64 * 4 + 256 + 17] * 3)  # patches, then three layers
    torch.testing.assert_close(ours(pixels)[:, 1:], tokens, rtol=tolerance, atol=tolerance)

    shorter = VisionTower(dataclasses.replace(config, drop_last_block=True, image_size=96))
    found = load_vision(shorter, shorter.config)
    assert "transformer.resblocks.2.attn.in_proj_weight" in found.dropped and found.resized == ["position_embedding"]


def save_text_model(folder: Path, kind: str = "roberta", **changes) -> torch.nn.Module:
    """A tiny random RoBERTa or BERT of transformers in a folder; BERT has no position rows before the first token's."""
    import transformers

    Config, Model = {
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
        "bert": (transformers.BertConfig, transformers.BertModel),
        "electra": (transformers.ElectraConfig, transformers.ElectraModel),
    }[kind]
    sizes = dict(vocab_size=VOCABULARY.size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
    sizes |= dict(intermediate_size=64, pad_token_id=1, layer_norm_eps=1e-5, initializer_range=0.3)
    sizes |= dict(max_position_embeddings=40, type_vocab_size=1)
    if kind != "roberta":
        sizes |= dict(max_position_embeddings=38, type_vocab_size=2)
    torch.manual_seed(0)
    model = Model(Config(**sizes | changes)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_bottom_layers_equal_those_of_transformers(tmp_path: Path, kind: str):
    """A Hugging Face folder loads, and bidirectional attention over the bottom half gives its model's hidden states."""
    foreign = save_text_model(tmp_path, kind)
    config = tiny_config()
    config.text.pretrained = str(tmp_path)
    net = build_objective(config, FLMOptions(), VOCABULARY, 24).eval().net
    load_text(net, config.text)

    ids = torch.tensor([[0, 5, 6, 7, 2, 1], [0, 9, 8, 7, 6, 2]])
    lengths = torch.tensor([5, 6])
    with torch.no_grad():
        theirs = foreign(ids, attention_mask=(ids != 1).long(), output_hidden_states=True).hidden_states[2]
        cells = (ids != 1).flatten().nonzero()[:, 0]
        states = net.embedding(ids.flatten()[cells], cells % 6)
        packing, mask = Packing(cells, 2, 6), (torch.arange(6) < lengths[:, None])[:, None].expand(2, 6, 6)
        for layer in net.bottom:
            states = layer(states, text_attention(packing, packing, mask, num_captions=2, rate=0.0))
    torch.testing.assert_close(states, theirs.flatten(0, 1)[cells], rtol=TINY, atol=TINY)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("roberta", {"num_attention_heads": 4}, "has 4 attention heads, the model 2; set --model.text.heads 4"),
        ("bert", {"hidden_act": "relu"}, "activation relu .* expected gelu"),
        ("bert", {"max_position_embeddings": 40}, r"has shape \(42, 32\), the model's embedding.position.weight \(40"),
        ("electra", {"embedding_size": 32}, "is of type electra, expected roberta or bert"),
    ],
)
def test_text_models_that_compute_something_else_are_refused(tmp_path: Path, kind: str, change: dict, message: str):
    save_text_model(tmp_path, kind, **change)
    config = tiny_config()
    net = build_objective(config, FLMOptions(), VOCABULARY, 24).net
    before = {name: value.clone() for name, value in net.named_parameters()}
    with pytest.raises(ValueError, match=f"model.text.pretrained .*{message}") as error:
        load_text(net, dataclasses.replace(config.text, pretrained=str(tmp_path)))
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in net.named_parameters()), "filled in part"


def test_a_pickle_that_executes_code_is_refused(tmp_path: Path):
    """Invariant 7: loading a weights file never runs what it holds."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    file = tmp_path / "evil.pt"
    torch.save({"visual.conv1.weight": Payload()}, file)
    config = dataclasses.replace(tiny_config().vision, pretrained=str(file))
    with pytest.raises(ValueError, match="not a plain weights file"):
        load_vision(VisionTower(config), config)
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_model_are_refused(tmp_path: Path):
    config = tiny_config().vision
    file = tmp_path / "other.pt"
    torch.save({"encoder.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="no visual"):
        load_vision(VisionTower(config), dataclasses.replace(config, pretrained=str(file)))
    with pytest.raises(ValueError, match=r"model\.text\.pretrained"):
        load_text(tiny_flm().net, TextConfig(pretrained=str(tmp_path)))


def test_sizes_by_open_clip_name():
    base = resolve_sizes(VisionConfig())
    assert (base.width, base.layers, base.patch_size, base.quick_gelu) == (768, 12, 32, True)
    large = resolve_sizes(VisionConfig(name="ViT-L-14", image_size=224))
    assert (large.width, large.layers, large.patch_size, large.quick_gelu) == (1024, 24, 14, False)
    with pytest.raises(ValueError, match="not an open_clip architecture"):
        resolve_sizes(VisionConfig(name="ViT-Q-99"))
    with pytest.raises(ValueError, match="not a plain CLIP ViT"):
        resolve_sizes(VisionConfig(name="RN50"))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision", {"image_size": 33}, "multiple of the patch size"),
        ("vision", {"width": 40}, "multiple of head_width"),
        ("text", {"heads": 5}, "multiple of model.text.heads"),
        ("text", {"max_positions": 20}, "max_text_length 24 needs 26 positions"),
        ("text", {"dropout": 1.0}, "dropout"),
        ("reconstructor", {"top_layers": 3}, r"top_layers is 3, expected 0 to model\.text\.top_layers \(2\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(section: str, change: dict, message: str):
    """Invariant 9."""
    config = tiny_config()
    setattr(config, section, dataclasses.replace(getattr(config, section), **change))
    with pytest.raises(ValueError, match=message):
        build_objective(config, FLMOptions(), VOCABULARY, 24)


@pytest.mark.parametrize(
    ("name", "option", "refused", "allowed"),
    [
        ("flm", "corruption_rate", [-0.1, 1.01], [0.0, 1.0]),  # 0 hides the target only
        ("flm", "negative_share", [-0.1, 1.01], [0.0, 1.0]),
        ("mlm", "mask_rate", [-0.1, 0.0, 1.01], [1.0]),
        ("mlm", "prediction_rate", [-0.1, 0.0, 1.01], [1.0, None]),
        ("prefixlm", "prefix_share", [-0.1, 1.0], [0.0, None]),
        ("flm", "itm_weight", [-0.1, math.inf], [0.0]),
        ("flm", "l2r_weight", [-0.1, math.inf], [0.0, 3.0]),
        ("flm", "r2l_weight", [-0.1, math.inf], [0.0, 3.0]),
    ],
)
def test_rates_and_weights_out_of_range_are_refused(name: str, option: str, refused: list, allowed: list):
    """Invariant 9."""
    for value in [*refused, math.nan]:
        with pytest.raises(ValueError, match=rf"objective\.{option} is {value}, expected"):
            build_objective(tiny_config(), objective_options(name, **{option: value}), VOCABULARY, 24)
    for value in allowed:
        build_objective(tiny_config(), objective_options(name, **{option: value}), VOCABULARY, 24)


@pytest.mark.parametrize("change", [{"width": 48}, {"patch_size": 8}])
def test_image_weights_of_another_width_or_patch_are_refused(tmp_path: Path, change: dict):
    """Another resolution is no other model: the position table is resized."""
    config = tiny_config().vision
    state = {"visual.class_embedding": torch.zeros(32), "visual.positional_embedding": torch.zeros(5, 32)}
    state |= {"visual.conv1.weight": torch.zeros(32, 3, 16, 16)}
    file = tmp_path / "clip.pt"
    torch.save(state, file)
    other = dataclasses.replace(config, pretrained=str(file), **change)
    with pytest.raises(ValueError, match=r"model.vision.pretrained .*clip.pt: .*has shape .*, the model's") as error:
        load_vision(VisionTower(other), other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 48}, r"has shape \(61, 48\), .*\(61, 32\)"),
        ({"vocab_size": 70}, "has 70 tokens, the tokenizer 61; read captions as it does: --data.tokenizer "),
    ],
)
def test_text_weights_of_another_width_or_vocabulary_are_refused(tmp_path: Path, change: dict, named: str):
    save_text_model(tmp_path, **change)
    net, config = tiny_flm().net, TextConfig(pretrained=str(tmp_path), heads=2, bottom_layers=2)
    with pytest.raises(ValueError, match=f"model.text.pretrained .*{named}"):
        load_text(net, config)


def test_real_size_parameter_counts():
    """Millions of parameters per part, as section 2.9 lists them (its RoBERTa part holds an unused pooler of 0.6 M)."""
    vocabulary = dataclasses.replace(VOCABULARY, size=50265)
    with torch.device("meta"):
        objective = build_objective(ModelConfig(behaviour="released"), FLMOptions(), vocabulary)
    millions: dict[str, float] = {}
    for name, parameter in objective.named_parameters():
        part = name.removeprefix("net.").split(".")[0]
        millions[part] = millions.get(part, 0) + parameter.numel() / 1e6
    assert millions["vision"] == pytest.approx(80.4, abs=0.05)
    assert millions["embedding"] + millions["bottom"] == pytest.approx(82.1 - 0.6, abs=0.1)
    assert millions["top"] == pytest.approx(56.7, abs=0.05)
    assert millions["reconstructor_bottom"] == millions["reconstructor_top"] == pytest.approx(42.5, abs=0.05)
    assert millions["lm_head"] == pytest.approx(39.3, abs=0.06)


def test_reconstructor_depth_keeps_the_last_layers():
    assert len(tiny_flm().net.reconstructor_top) == 2
    shallow = build_objective(tiny_config(bottom_layers=0, top_layers=1), FLMOptions(), VOCABULARY, 24)
    assert len(shallow.net.reconstructor_bottom) == 0 and len(shallow.net.reconstructor_top) == 1
