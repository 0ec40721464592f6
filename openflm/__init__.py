"""OpenFLM in Python: ``openflm.load(folder)`` gives a trained model that captions, answers, matches and describes.

Importing this loads no other package; ``load`` does. docs/use.md shows how it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from pipeline.using.model import Model

__all__ = ["load"]


def load(folder: str | os.PathLike[str], device: Any = None, dtype: Any = None) -> Model:
    """The model of a run folder (its newest checkpoint), of one of its checkpoint folders, or of an exported folder.

    Args:
        folder: where it lies.
        device: torch device or its name; None is cuda where there is one, else cpu.
        dtype: torch dtype or its name; None is float32 on a CPU, bfloat16 on a GPU that computes in it.

    Raises:
        ValueError: there is no whole model, or the device or dtype can't be used; one line that says what to do.
    """
    from pipeline.using.untouched import untouched

    with untouched():  # imports of libraries change more than loading does
        from pipeline.using.model import load_model

        return load_model(folder, device, dtype)
