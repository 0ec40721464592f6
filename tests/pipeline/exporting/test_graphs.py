"""The vision tower as a graph: it gives the tower's tokens in torch.export and in ONNX's own runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from model.config import VisionConfig
from model.vision.tower import build_tower
from pipeline.config.options import ConfigError
from pipeline.data.shard_reader import RawSample
from pipeline.exporting import graphs
from pipeline.exporting.graphs import EXPORTED, ONNX, tolerance, write_graphs
from pipeline.exporting.samples import Sample
from pipeline.loading.datasets import OtherRows
from tests.pipeline.exporting.exported_runs import pixels


def tower_and_samples() -> tuple[nn.Module, list[Sample]]:
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    tower = build_tower(VisionConfig(name=None, **sizes)).eval()
    raw, others = RawSample("", [], "", {}), OtherRows(None, 0, range(1))
    return tower, [Sample(raw, one, 0, others) for one in pixels(3)]


@pytest.mark.slow
def test_a_graph_takes_any_number_of_images(tmp_path: Path) -> None:
    tower, samples = tower_and_samples()
    assert write_graphs(tower, tmp_path, samples, exported=True, onnx=False) == [EXPORTED]
    program, images = torch.export.load(tmp_path / EXPORTED), pixels(5, seed=1)[:, 0]
    with torch.no_grad():
        assert (program.module()(images=images) - tower(images)).abs().max() <= tolerance(tower)


@pytest.mark.slow
def test_onnx_runtime_gives_the_towers_tokens(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tower, samples = tower_and_samples()
    assert ONNX in write_graphs(tower, tmp_path, samples, exported=False, onnx=True)
    session = onnxruntime.InferenceSession(str(tmp_path / ONNX), providers=["CPUExecutionProvider"])
    images = pixels(5, seed=1)[:, 0]
    (found,) = session.run(["tokens"], {"images": images.numpy()})
    with torch.no_grad():
        expected = tower(images)
    assert (torch.from_numpy(found) - expected).abs().max() <= tolerance(tower) * float(expected.abs().max())


@pytest.mark.slow
def test_a_graph_that_gives_other_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, samples = tower_and_samples()
    honest = graphs._traced

    def of_another(tower: nn.Module, images: torch.Tensor) -> object:
        with torch.no_grad():
            tower.ln_post.bias[0] += 1e-3
            program = honest(tower, images)
        return program

    monkeypatch.setattr(graphs, "_traced", of_another)
    with pytest.raises(ConfigError, match="gives tokens that differ by 0.001"):
        write_graphs(tower, tmp_path, samples, exported=True, onnx=False)


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"--onnx needs onnxruntime: pip install '\.\[onnx\]'"):
        graphs.refuse_without_onnx()
