"""What MFU is relative to: the card's published dense bf16 rate, else what large products reach."""

from benchmarks.measuring import ROOT
from pipeline.cloud.prices import Gpu, Prices
from pipeline.hardware import gpu_name, has_bf16, product_flops_per_s


def published(name: str) -> Gpu | None:
    """Return the row of config/prices.yaml that a card's full name is about, or None."""
    gpus = Prices.load(ROOT / "config" / "prices.yaml").gpus
    # The longest that fits: L40S is no L4, and A100-80GB is found before A100
    for kind in sorted(gpus, key=len, reverse=True):
        if kind in name.upper().replace(" ", "-"):
            return gpus[kind]
    return None


def flops_per_s(device: str) -> float:
    """Return the rate that MFU is a share of."""
    card = published(gpu_name() or "") if device == "cuda" else None
    if card is not None:
        return card.tflops * 1e12
    return product_flops_per_s(has_bf16())


def words(device: str) -> str:
    """Return where that rate is from, for people."""
    card = published(gpu_name() or "") if device == "cuda" else None
    if card is not None:
        return f"{card.tflops:g} TFLOP/s, published (dense bf16)"
    return f"{flops_per_s(device) / 1e12:.2f} TFLOP/s, measured by large products"
