"""The pretraining objectives by name."""

from __future__ import annotations

from model.objectives.flm import flm
from model.objectives.mlm import mlm
from model.objectives.prefix import ar, prefixlm

OBJECTIVES = {"flm": flm, "mlm": mlm, "ar": ar, "prefixlm": prefixlm}
