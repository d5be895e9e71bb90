"""What the trainings should reach; knows no torch, as the program that starts them reads it."""

from collections.abc import Iterator

from benchmarks.gpu_parts import Row

AIM_MFU = 0.45
AIM_PREDICTION = 0.10


def verdicts(rows: list[Row]) -> Iterator[str]:
    """Yield what the aims of this section came to: MFU of our trunk, and predictions."""
    for row in rows:
        name = str(row["what"])
        if not name.startswith("ours"):
            continue
        if "MFU" in row and "trunk" in name:
            yield _verdict(f"{name}: MFU", row["MFU"], row["MFU"] >= AIM_MFU, f">= {AIM_MFU}")
        share = row.get("predicted / measured")
        if share is not None:
            near = abs(share - 1) <= AIM_PREDICTION
            yield _verdict(f"{name}: predicted / measured", share, near, "within 10 %")


def _verdict(name: str, value: float, reached: bool, aim: str) -> str:
    return f"{name} {value:.2f}, aim {aim}: {'reached' if reached else 'missed'}"
