"""Tokens/s of a stack's bundle, opened as the server opens it, for one text and for batches.

B sequences, T tokens.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_parts import Row, Setup
from benchmarks.measuring import SIZES, Job
from benchmarks.peers import ours
from benchmarks.watching import Watch

BATCHES = (1, 8, 32)
EXPERTS = 4


def generate(setup: Setup) -> Iterator[Row]:
    """Yield a row per batch size and dtype."""
    from transformers import AutoModelForCausalLM

    sizes = SIZES["toy" if setup.small else "100m"]
    job = Job(
        "ours",
        "prepare",
        sizes,
        setup.work,
        experts=EXPERTS,
        domains=EXPERTS,
        device=setup.device,
    )
    ours.prepare(job)
    Path(setup.work, "bundles").mkdir(exist_ok=True)
    ours.bundle(job, Watch())
    bundle = Path(setup.work, "bundles", f"ours-{EXPERTS}")
    new_tokens = 8 if setup.small else 64
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(
            bundle, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        model = model.eval().to(setup.device)
        for sequences in BATCHES:
            prompt_BT = torch.randint(1, sizes.vocab_size, (sequences, 16), device=setup.device)
            # The first one pays for what is set up once
            _seconds(model, prompt_BT, 2)
            for _ in range(setup.rounds):
                seconds = _seconds(model, prompt_BT, new_tokens)
                yield {
                    "what": f"{dtype}, batch of {sequences}",
                    "tokens/s": sequences * new_tokens / seconds,
                    "ms per token of a text": seconds / new_tokens * 1e3,
                }


@torch.no_grad()
def _seconds(model, prompt_BT: torch.Tensor, new_tokens: int) -> float:
    """Return seconds of so many new tokens for every text of the batch."""
    start_s = time.perf_counter()
    out_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    # Brought here, so that the clock waits for a GPU
    assert out_BT.cpu().shape[1] == prompt_BT.shape[1] + new_tokens
    return time.perf_counter() - start_s
