"""What of a run was written for others, against what a plan says of it."""

from pathlib import Path

from gguf import GGUFReader

from pipeline.families import ExportWish
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.ffn_moe.family import writing_cost
from pipeline.store.artifacts import load_tensors
from pipeline.train.flops import JobCost


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all tensors below a folder."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        total += sum(tensor.nbytes for tensor in load_tensors(path).values())
    for path in folder.rglob("*.gguf"):
        total += sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
    return total


def planned(cfg: FfnMoeConfig, wish: ExportWish | None, vocab_size: int) -> JobCost | None:
    """Return what writing takes by the plan, of a tokenizer that is next to nothing, on a trunk of
    so many entries."""
    own = cfg.tokenizer.model_copy(update={"vocab_size": vocab_size})
    cfg = cfg.model_copy(update={"tokenizer": own})
    return writing_cost(cfg, {("tokenizer", None): {"vocab_size": 1}}, wish)
