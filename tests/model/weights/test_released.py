"""The released behaviour, layer by layer, against numbers that the public release computed (fixture and full dump)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from model.batch import Batch, Row
from model.build import build_objective
from model.config import FLMOptions, ModelConfig, TextConfig, VisionConfig, Vocabulary
from model.vision.clip import resize_positions
from model.weights.released import RELEASED_RULES, import_released
from model.weights.start import foreign_names
from tests.oracle import load_oracle
from tests.released_fixture import released_fixture
from tests.rounding import RELEASED

LENGTH = 16
TERMS = {"flm": "recon", "l2r": "l2r", "r2l": "r2l"}


def released_objective() -> torch.nn.Module:
    config = ModelConfig(
        behaviour="released",
        vision=VisionConfig(name=None, image_size=96, patch_size=32, width=128, layers=4),
        text=TextConfig(width=64, heads=4, ffn_width=256, bottom_layers=3, top_layers=3, max_positions=66),
    )
    vocabulary = Vocabulary(size=292, bos_id=0, pad_id=1, eos_id=2, mask_id=291)
    return build_objective(config, FLMOptions(corruption_rate=0), vocabulary, LENGTH).eval()


def dumped_batch(objective, image: Tensor, text_ids: Tensor, lengths: Tensor) -> Batch:
    rows = [
        Row(ids[:n].tolist(), number, number) for number, (ids, n) in enumerate(zip(text_ids, lengths, strict=True))
    ]
    batch = objective.planner(torch.zeros(len(rows), 1, 3, 96, 96, dtype=torch.uint8), rows)
    batch.images = image[:, None]  # the dump holds normalised pixels
    return batch


def released_layers(objective, batch: Batch) -> dict[str, Tensor]:
    """Outputs of every block under the dump's names, on the dump's [B, L, D] grid (zero where nothing is computed)."""
    net, outputs, handles = objective.net, {}, []
    num_rows, width = batch.plan.text.shape
    stream_cells = torch.cat([batch.plan.l2r_index, batch.plan.r2l_index + num_rows * width])
    stream_cells = stream_cells[(stream_cells // width % num_rows).argsort(stable=True)]  # caption by caption

    def watch(module, name, cells, streams):
        def hook(_, __, output):
            grid = output.new_zeros(len(streams) * num_rows * width, output.shape[-1])
            grid[cells] = output
            for stream, part in zip(streams, grid.view(len(streams), num_rows, width, -1), strict=True):
                outputs[f"{name}{stream}"] = part[:, :LENGTH].detach()

        handles.append(module.register_forward_hook(hook))

    for half, text_layers in (("bottom", net.bottom), ("top", net.top)):
        for number, layer in enumerate(text_layers):
            watch(layer, f"{half}{number}", stream_cells, (".fwd", ".rev"))
        for number, layer in enumerate(getattr(net, f"reconstructor_{half}")):
            watch(layer, f"recon_{half}{number}", batch.plan.query_index, ("",))
    handles.append(net.vision.register_forward_hook(lambda _, __, output: outputs.update(vit_tokens=output.detach())))
    net(batch)
    for handle in handles:
        handle.remove()
    return outputs


def assert_layers_equal(layers: Mapping[str, Tensor], dumped: Mapping[str, Tensor], lengths: Tensor) -> None:
    compared = 0
    for name, ours in layers.items():
        theirs = dumped[name]
        if name == "vit_tokens":
            torch.testing.assert_close(ours, theirs, rtol=0, atol=RELEASED)
        else:
            for row, n in enumerate(lengths.tolist()):
                first = 1 if name.startswith("recon") else 0  # pretraining runs no CLS query
                torch.testing.assert_close(ours[row, first:n], theirs[row, first:n], rtol=0, atol=RELEASED)
        compared += 1
    assert compared == 1 + 3 * (3 + 3)


def total_loss(objective, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    sums = objective(batch)
    means = {name: sums[name] / batch.counts[name] for name in sums}
    return means, sum(objective.term_weights[name] * mean for name, mean in means.items())


def test_layers_losses_and_gradient_norms_equal_the_release():
    tensors, state, norms = released_fixture("flm")
    objective = released_objective()
    report = import_released(objective, state)
    assert len(report.aliased) + len(report.dead) + len({n for v in report.used.values() for n in v}) == len(state)
    batch = dumped_batch(objective, tensors["image"], tensors["text_ids"], tensors["lengths"])
    dumped = {name.removeprefix("layers."): value for name, value in tensors.items() if name.startswith("layers.")}
    assert_layers_equal(released_layers(objective, batch), dumped, tensors["lengths"])

    means, total = total_loss(objective, batch)
    for ours, theirs in TERMS.items():
        assert means[ours].item() == pytest.approx(tensors[f"losses.{theirs}"].item(), abs=RELEASED)
    assert total.item() == pytest.approx(tensors["losses.total"].item(), abs=RELEASED)

    total.backward()
    for name, parameter in objective.named_parameters():
        parts = foreign_names(name, RELEASED_RULES)
        if parts[0] in norms:
            gradients, noise = parameter.grad.chunk(len(parts)), RELEASED * parameter.grad.norm().item()
            for part, gradient in zip(parts, gradients, strict=True):
                assert gradient.norm().item() == pytest.approx(norms[part], rel=2 * RELEASED, abs=noise), part


def test_logits_equal_the_release():
    tensors, state, _ = released_fixture("flm")
    objective = released_objective()
    import_released(objective, state)
    batch = dumped_batch(objective, tensors["image"], tensors["text_ids"], tensors["lengths"])
    with torch.no_grad():
        logits = objective.lm_head.logits(objective.net(batch).l2r)
    width = batch.plan.text.shape[1]
    at = {divmod(cell, width): value for cell, value in zip(batch.plan.l2r_index.tolist(), logits, strict=True)}
    for row, n in enumerate(tensors["lengths"].tolist()[1:], start=1):
        for i in range(1, n - 1):
            theirs = tensors["logits_l2r_rows_1_to_3"][row - 1, i - 1]
            torch.testing.assert_close(at[row, i], theirs, rtol=RELEASED, atol=RELEASED)


def test_full_dump_of_the_release():
    """Every logit and every gradient element, where the dump is at hand."""
    dump = load_oracle("a_flm_pretrain.pt")
    objective = released_objective()
    import_released(objective, dump["state_dict"])
    lengths = dump["inputs"]["text_masks"].sum(1)
    batch = dumped_batch(objective, dump["inputs"]["image"], dump["inputs"]["text_ids"], lengths)
    assert_layers_equal(released_layers(objective, batch), dump["layers"], lengths)
    features = objective.net(batch)
    width = batch.plan.text.shape[1]
    for name, states, cells, first in (
        ("recon", features.queries, batch.plan.query_index, 1),
        ("l2r", features.l2r, batch.plan.l2r_index, 1),
        ("r2l", features.r2l, batch.plan.r2l_index, 2),
    ):
        position = batch.terms["flm" if name == "recon" else name].position
        logits = objective.lm_head.logits(states[position]).detach()
        for cell, ours in zip(cells[position].tolist(), logits, strict=True):
            row, i = divmod(cell, width)
            torch.testing.assert_close(ours, dump["logits"][f"logits_{name}"][row, i - first], rtol=0, atol=RELEASED)
    _, total = total_loss(objective, batch)
    total.backward()
    compared = 0
    for name, parameter in objective.named_parameters():
        parts = foreign_names(name, RELEASED_RULES)
        if all(part in dump["grads"] for part in parts):
            theirs = torch.cat([dump["grads"][part] for part in parts])
            theirs = theirs[0] if name.endswith("token_type") else theirs
            error = (parameter.grad - theirs).norm() / theirs.norm().clamp_min(1e-12)
            assert error < 1e-4 or (theirs.norm() < 1e-7 and parameter.grad.norm() < 1e-7), (name, error)
            compared += 1
    assert compared == len(list(objective.named_parameters())) - 2  # the pooler has no gradient in the release


def test_an_unknown_missing_or_disagreeing_key_is_refused():
    _, state, _ = released_fixture("flm")
    with pytest.raises(ValueError, match="surprise"):
        import_released(released_objective(), {**state, "surprise.weight": torch.zeros(1)})
    alias = "text_transformer2.encoder.layer.0.output.dense.bias"
    with pytest.raises(ValueError, match="differs from text_transformer"):
        import_released(released_objective(), {**state, alias: state[alias] + 1})
    short = {name: value for name, value in state.items() if name != "lm_score.decoder.weight"}
    with pytest.raises(ValueError, match=r"lack lm_score\.decoder\.weight"):
        import_released(released_objective(), short)
    wide = {**state, "lm_score.decoder.weight": torch.zeros(300, 64)}
    with pytest.raises(ValueError, match=r"\(300, 64\).*\(292, 64\)"):
        import_released(released_objective(), wide)


def test_position_table_resize_equals_the_release():
    dump = load_oracle("f_pos_resize.pt")
    for name, grid in (("after_224", 7), ("after_384", 12), ("after_576", 18)):
        torch.testing.assert_close(resize_positions(dump["before_288"], grid), dump[name], rtol=0, atol=1e-5)


def test_position_table_resize_is_a_cubic_convolution():
    """Closed form along one axis: Keys' kernel with a = -0.75, half-pixel centres, the class row kept."""

    def kernel(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    profile = torch.tensor([0.0, 3.0, -1.0, 4.0, 1.0, 5.0, -9.0, 2.0])
    table = torch.cat([torch.tensor([[99.0]]), profile.repeat(8, 1).reshape(-1, 1)])
    resized = resize_positions(table, 16)
    assert resized.shape == (257, 1) and resized[0] == 99
    for column in range(4, 12):
        centre = (column + 0.5) / 2 - 0.5
        expected = sum(profile[i].item() * kernel(centre - i) for i in range(8))
        assert resized[1:].view(16, 16)[5, column].item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="square"):
        resize_positions(torch.zeros(7, 3), 4)
