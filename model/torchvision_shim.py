"""Makes `import torchvision` work beside a CPU build of PyTorch, whose wheel comes without a matching extension.

The only torchvision wheel on PyPI links against CUDA. Beside a CPU build of PyTorch its extension ``_C.so`` cannot be
loaded, torchvision carries on without it, and then fails while registering the fake kernels of two operators the
extension would have defined: ``RuntimeError: operator torchvision::nms does not exist``. timm, open_clip and parts of
transformers import torchvision and fail with it. Defining the two schemas beforehand is all that is missing:
transforms, image models and everything OpenFLM uses then work; ``torchvision.ops.nms`` and ``torchvision.io`` image
decoding stay unavailable. On a sound install nothing is changed.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")


@functools.cache
def ensure_torchvision() -> torch.library.Library | None:
    """Defines the operators torchvision needs to import; call it before importing torchvision, timm or open_clip.

    Returns:
        The library holding the definitions (they live as long as it does), or None where nothing had to be done.
    """
    if "torchvision" in sys.modules:
        return None
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _extension_loads(Path(spec.origin).parent):
        return None
    library = None
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library = library or torch.library.Library("torchvision", "FRAGMENT")
            library.define(operator + _SCHEMA)
    return library


def _extension_loads(package: Path) -> bool:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        extension = package / f"_C{suffix}"
        if extension.is_file():
            try:
                torch.ops.load_library(extension)
            except (OSError, RuntimeError):
                return False
            return True
    return False
