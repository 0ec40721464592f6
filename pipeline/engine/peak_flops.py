"""The peak rates of GPUs that the share of them a run uses (MFU) is measured by."""

from __future__ import annotations

# Dense peak rates of one GPU in 1e12 FLOP/s; where a datasheet gives the rate with sparsity, half of it. The first
# entry whose words all occur in the device name counts, so the special forms of a chip stand before the plain one.
# Sources: NVIDIA datasheets "V100", "A100", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "GH200 Superchip",
# "L40S", "L4", and the whitepaper "NVIDIA Ada GPU Architecture" (RTX 4090, fp32 accumulation).
_PEAK_TERAFLOPS: list[tuple[str, dict[str, float]]] = [
    ("H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H200", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51}),
    ("GH200", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("H100", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    ("L4", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("V100 PCIe", {"fp16": 112, "fp32": 14}),
    ("V100", {"fp16": 125, "fp32": 15.7}),
]
_LESSER_FORMS = {"laptop", "mobile", "max", "d", "mig"}  # same name, other rate
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


def peak_flops(device_name: str, dtype: object) -> float | None:
    """Dense peak FLOP/s of one GPU by its name (``torch.cuda.get_device_name``), None where it is not known.

    ``dtype`` is a torch dtype or one of bf16, fp16, tf32, fp32.
    """
    precision = str(dtype).removeprefix("torch.")
    precision = _DTYPES.get(precision, precision)
    words = set(device_name.lower().replace("-", " ").split())
    if words & _LESSER_FORMS:
        return None
    for chip, rates in _PEAK_TERAFLOPS:
        if words.issuperset(chip.lower().split()):
            rate = rates.get(precision)
            return None if rate is None else rate * 1e12
    return None
