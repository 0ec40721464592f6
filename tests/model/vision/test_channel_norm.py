"""A norm fitted to images: standardised channels, whatever the tokens have in common; where it stands in a network."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.build import build_evlgen, build_objective
from model.config import ModelConfig, VisionConfig, objective_options
from model.towers import fit_image_norm
from model.vision.channel_norm import MOST_ENLARGED, ChannelNorm
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, images, tiny_config

WIDTH, DOUBLE = 12, 1e-9
OBJECTIVES = ("flm", "mlm", "ar", "prefixlm")


def standardising(behaviour: str = "default") -> ModelConfig:
    config = tiny_config(behaviour)
    return replace(config, vision=replace(config.vision, standardise=True))


def test_channels_are_standardised() -> None:
    """Whatever was there before."""
    norm = ChannelNorm(WIDTH).double()
    common, scale = torch.randn(1, 1, WIDTH).double() * 10, torch.rand(WIDTH).double() + 0.5
    tokens = torch.randn(40, 25, WIDTH).double() * scale + common
    torch.nn.init.normal_(norm.weight)
    norm.standardise(tokens)
    channels = norm(tokens).flatten(0, 1)
    torch.testing.assert_close(channels.mean(0), torch.zeros(WIDTH).double(), rtol=0, atol=DOUBLE)
    torch.testing.assert_close(channels.std(0, correction=0), torch.ones(WIDTH).double(), rtol=0, atol=DOUBLE)


def test_a_constant_channel_is_enlarged_tenfold_at_most() -> None:
    norm = ChannelNorm(WIDTH).double()
    tokens = torch.randn(40, 25, WIDTH).double()
    tokens[..., 0] = tokens[..., 1:].mean(-1)  # the mean over channels: 0 behind the layer norm, in every token
    norm.standardise(tokens)
    deviations = F.layer_norm(tokens, (WIDTH,)).flatten(0, 1).std(0, correction=0)
    expected = MOST_ENLARGED / deviations.mean()
    assert deviations[0] < DOUBLE and abs(norm.weight[0] / expected - 1) < DOUBLE
    norm.standardise(torch.zeros(2, 25, WIDTH).double())
    assert norm.weight.isfinite().all() and norm.bias.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_image_projection_reads_standardised_tokens(name: str) -> None:
    built = build_objective(standardising(), objective_options(name=name), VOCABULARY, MAX_TEXT_LENGTH).eval()
    seen, pictures = [], images(16)
    built.net.image_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit_image_norm(built.net, pictures)
    built.net.encode(pictures)
    channels = seen[0].flatten(0, 1).double()
    assert channels.mean(0).abs().max() < 1e-5 and (channels.std(0, correction=0) - 1).abs().max() < 1e-4
    assert built.parameter_group("net.image_norm.weight") == built.parameter_group("net.image_projection.weight")
    plain = build_objective(tiny_config(), objective_options(name=name), VOCABULARY, MAX_TEXT_LENGTH)
    extra = set(dict(built.named_parameters())) - set(dict(plain.named_parameters()))
    assert extra == {"net.image_norm.weight", "net.image_norm.bias"}


def test_where_it_has_no_place_it_is_refused() -> None:
    with pytest.raises(ValueError, match="^model.vision.standardise has no released behaviour"):
        build_objective(standardising("released"), objective_options(name="flm"), VOCABULARY)
    vision = VisionConfig(name=None, standardise=True)
    with pytest.raises(ValueError, match="^model.vision.standardise has no effect: .* model.connector.standardise"):
        build_evlgen(ModelConfig(vision=vision), VOCABULARY, MAX_TEXT_LENGTH)
