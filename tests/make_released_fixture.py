"""Makes tests/fixtures/flm_released_tiny.safetensors, a compact extract of the reference dump of the released model.

Run ``OPENFLM_ORACLE=FOLDER python -m tests.make_released_fixture``. Inputs, layer outputs, logits, losses and gradient
norms are taken over; weights are not, the test makes them again by the rule that made the dump.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.oracle import load_oracle, oracle_file

FIXTURE = Path(__file__).parent / "fixtures" / "flm_released_tiny.safetensors"


def main() -> None:
    dump = load_oracle("a_flm_pretrain.pt")
    lengths = dump["inputs"]["text_masks"].sum(1)
    tensors = {"image": dump["inputs"]["image"], "text_ids": dump["inputs"]["text_ids"], "lengths": lengths}
    tensors |= {f"layers.{name}": value for name, value in dump["layers"].items()}
    tensors |= {f"losses.{name}": value for name, value in dump["losses"].items()}
    tensors["logits_l2r_rows_1_to_3"] = dump["logits"]["logits_l2r"][1:]
    names = sorted(dump["grad_norms"])
    tensors["grad_norms"] = torch.tensor([float(dump["grad_norms"][name]) for name in names], dtype=torch.float64)
    keys = json.loads(oracle_file("g_checkpoint_keys.json").read_text())["pretrain_flm_4m"]["keys"]
    first_names = {name: alias_of for name, _, _, alias_of in keys}
    layout = [[name, list(value.shape), first_names[name] or name] for name, value in dump["state_dict"].items()]
    FIXTURE.parent.mkdir(exist_ok=True)
    save_file(
        {name: value.detach().contiguous().clone() for name, value in tensors.items()},
        FIXTURE,
        metadata={"layout": json.dumps(layout), "grad_norm_names": json.dumps(names)},
    )


if __name__ == "__main__":
    main()
