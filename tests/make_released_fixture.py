"""Makes tests/fixtures/*_released_tiny.safetensors, compact extracts of the reference dumps of the released model.

Run ``OPENFLM_ORACLE=FOLDER python -m tests.make_released_fixture``. Inputs, layer outputs, logits, losses and gradient
norms are taken over; weights and images are not, the tests make them again by the rules that made the dumps
(:mod:`tests.released_fixture`). MLM and AR read the inputs of FLM's extract.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracle import load_oracle, oracle_file
from tests.released_fixture import fixture_path, made_image, made_weights

PAD = 1


def main() -> None:
    save("flm", *flm_extract())
    for name in ("mlm", "ar"):
        save(name, *one_stream_extract(name))


def save(name: str, dump: dict, keys: str, tensors: dict[str, Tensor]) -> None:
    """Adds gradient norms and the names and shapes of all weights; stops where the rule makes other weights."""
    names = sorted(dump["grad_norms"])
    norms = torch.tensor([float(dump["grad_norms"][each]) for each in names], dtype=torch.float64)
    known = json.loads(oracle_file("g_checkpoint_keys.json").read_text())[keys]["keys"]
    first_names = {each: alias_of for each, _, _, alias_of in known}
    state = dump["state_dict"]
    layout = [[each, list(value.shape), first_names.get(each) or each] for each, value in state.items()]
    made = made_weights(layout)
    rounding = 4 * torch.finfo(torch.float32).eps  # the dump scaled in another order
    weights = {each: value for each, value in state.items() if value.is_floating_point()}
    different = [each for each, value in weights.items() if not torch.allclose(value, made[each], rounding, 0)]
    assert not different, f"{name}: the rule does not make {different[:3]}"
    fixture_path(name).parent.mkdir(exist_ok=True)
    save_file(
        {each: value.detach().contiguous().clone() for each, value in {**tensors, "grad_norms": norms}.items()},
        fixture_path(name),
        metadata={"layout": json.dumps(layout), "grad_norm_names": json.dumps(names)},
    )


def flm_extract() -> tuple[dict, str, dict[str, Tensor]]:
    dump = load_oracle("a_flm_pretrain.pt")
    lengths = dump["inputs"]["text_masks"].sum(1)
    assert torch.allclose(dump["inputs"]["image"], made_image(), atol=1e-5), "the rule makes other images"
    tensors = {"text_ids": dump["inputs"]["text_ids"], "lengths": lengths}
    tensors |= {f"layers.{name}": value for name, value in dump["layers"].items()}
    tensors |= {f"losses.{name}": value for name, value in dump["losses"].items()}
    tensors["logits_l2r_rows_1_to_3"] = dump["logits"]["logits_l2r"][1:]
    return dump, "pretrain_flm_4m", tensors


def one_stream_extract(name: str) -> tuple[dict, str, dict[str, Tensor]]:
    """Layers at the real tokens, logits at the predicted ones, both row after row: [S, D] and [M, V]."""
    dump, inputs = load_oracle(f"b_{name}.pt"), load_oracle("a_flm_pretrain.pt")["inputs"]
    for each in ("image", "text_ids", "text_masks"):
        assert torch.equal(dump["inputs"][each], inputs[each]), f"{name} has another {each} than FLM"
    real, out = dump["inputs"]["text_masks"].bool(), dump["objective_out"]
    tensors = {f"layers.{key}": value[real] for key, value in dump["layers"].items() if key[:3] in ("bot", "top")}
    tensors |= {"ids": out[f"{name}_ids"], "labels": out[f"{name}_labels"], "loss": out[f"{name}_loss"]}
    labels = out[f"{name}_labels"]
    tensors["logits"] = out[f"{name}_logits"][(labels != -100) & (labels != PAD)]  # AR's labels are padded
    return dump, "mlm_baseline(named configs only)", tensors


if __name__ == "__main__":
    main()
