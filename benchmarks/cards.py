"""NVIDIA's cards and their peak rates, the denominator of MFU (model FLOPs utilisation)."""

import re

PRECISIONS = ("float32", "TF32", "bf16")

PEAKS: dict[str, dict[str, float]] = {
    pattern: dict(zip(PRECISIONS, rates, strict=False))
    for pattern, rates in {
        # NVIDIA A100 Tensor Core GPU, data sheet
        r"A100-SXM4-\d+GB|A100-PCIE-40GB|A100 80GB PCIe": (19.5, 156, 312),
        # NVIDIA H100 Tensor Core GPU Architecture, white paper, which has the dense rates; NVIDIA H200, data sheet
        r"H100 80GB HBM3|H200": (66.9, 494.7, 989.4),
        r"H100 PCIe": (51.2, 378, 756),
        # NVIDIA L4 Tensor Core GPU, data sheet
        r"L4": (30.3, 60, 121),
        # NVIDIA T4, and NVIDIA V100 Tensor Core GPU, data sheets; neither has TF32 or bf16
        r"T4": (8.1,),
        r"V100-SXM2-\d+GB": (15.7,),
        r"V100-PCIE-\d+GB": (14.0,),
        # NVIDIA Ampere GA102 GPU Architecture and NVIDIA Ada GPU Architecture, white papers; bf16 summed in float32
        r"GeForce RTX 3090": (35.6, 35.6, 71),
        r"GeForce RTX 4090": (82.6, 82.6, 165.2),
    }.items()
}
"""A card's name in the driver, without its maker's -> dense TFLOP/s by precision.

Data sheets that state rates "with sparsity" are halved. A name must match to its end: "H100 NVL", "RTX 3090 Ti",
"RTX 4090 Laptop GPU", "L40S" and parts of a card ("MIG 3g.20gb") have other rates.
"""


def peaks(card: str | None) -> dict[str, float] | None:
    """The card's TFLOP/s by precision, without those it lacks; None if the card is not in the table."""
    name = re.sub(r"^(NVIDIA |Tesla )+", "", card or "")
    return next((rates for pattern, rates in PEAKS.items() if re.fullmatch(pattern, name)), None)
