"""A model as a stock checkpoint: config.json, tokenizer and one file of weights, for a class that
transformers has.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....store.artifacts import write_text
from ....store.streamed import Streamed, write_tensors
from ..stock import generation_settings
from .job import Job
from .tensors import widest

WEIGHTS = "model.safetensors"
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_checkpoint(
    job: Job, folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Streamed]
) -> tuple[dict[str, str], str]:
    """Write a checkpoint that transformers opens; return the sha256 of its weights by file, and
    their dtype.

    `settings` is its config.json, whose dtype becomes the weights': the one that is wished for, or
    where there is none the widest. Raises DiskFull.
    """
    dtype = job.wish.dtype
    wanted = TORCH[dtype] if dtype else widest(tensors.values())
    rounded = {name: tensor.to(wanted) for name, tensor in tensors.items()}
    name_of_it = str(wanted).removeprefix("torch.")
    written = {**settings, "dtype": name_of_it}
    generation = generation_settings(settings, job.tokenizer.end_id, job.start)
    texts = {
        "config.json": _as_json(written),
        "generation_config.json": _as_json(generation),
        **job.tokenizer.stock_files(job.start),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return {WEIGHTS: write_tensors(folder / WEIGHTS, rounded, job.progress)}, name_of_it


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
