"""What a forward and backward pass of a training holds.

L layers, D model width, F feed-forward width, V vocabulary.
"""

from ...hardware import device
from ...model.chunks import chunk_of, workspace_bytes
from ...model.loss import MAX_BF16_SUMS
from ...train.flops import Shape, Trains
from ...train.memory_plan import MemoryPlan
from .passes import HEAP_BYTES

# of a processor
# holes in the heap: as much as there are activations, up to this; where they are more, this share
MOST_FRAGMENTS_BYTES = 155_000_000
FRAGMENTS_SHARE = 0.85
# the same of all weights in fp32: gradients stay where activations were, so that what comes next
# does not fit between them. 1.05 to 1.6 with widths of 256 and 512 in 3 to 8 layers
EXACT_FRAGMENTS_SHARE = 1.3


def pass_bytes(
    shape: Shape,
    plan: MemoryPlan,
    unit: int,
    trains: Trains,
    active: float,
    lowest: int = 0,
    more_numbers: float = 0.0,
) -> float:
    """Return what one forward and backward pass holds, with what the allocator holds beside it;
    more_numbers: per token that a layer keeps beside those of its class."""
    tokens = plan.micro_batch_sequences * shape.context_tokens
    row_bytes = tokens * shape.d_model * unit
    in_blocks = unit == 2 and device() != "cuda"
    numbers = shape.layer_activations(trains, active, in_blocks) + more_numbers
    layer = tokens * numbers * unit
    logits: float = workspace_bytes(tokens, shape.vocab_size, plan.chunk_logits, unit)
    chunk = chunk_of(shape.vocab_size, plan.chunk_logits)
    if trains == "all" and unit == 2 and tokens > MAX_BF16_SUMS * chunk:
        logits += 4 * shape.vocab_size * shape.d_model  # the head's gradient is added up in fp32
    inner = 2 * tokens * shape.d_ff * unit  # of a feed-forward network's backward pass
    if plan.checkpointing:
        # What enters each layer, and one layer that is made again
        held: float = (shape.layers - lowest) * row_bytes
        in_use = held + max(logits, layer + inner)
    else:
        # below the lowest expert nothing is kept
        held = (shape.layers - lowest) * layer
        in_use = held + max(logits, inner)
    if device() == "cuda":
        return in_use

    # A processor's heap holds more than is in use. Under a budget the batch starts with one row and
    # grows, and the first rows' blocks are too small for what comes after them
    grown = plan.budget_bytes is not None and plan.micro_batch_sequences > 1
    in_heap = grown or row_bytes < plan.mmap_threshold_bytes
    if plan.checkpointing and in_heap and (grown or not plan.low_mmap_threshold):
        return 2 * (2 * held + layer + inner) + logits + HEAP_BYTES
    if plan.low_mmap_threshold:
        return in_use + (layer + inner) * plan.trim_each_pass
    again = layer / 2 if plan.checkpointing else 0  # holes where a layer was computed again
    fragments = 0.0
    if in_heap:
        # glibc finds no room for a block in the hole that one of its size left: with 30 layers of
        # SmolLM2-135M holes were .7 to 1.1 of what was kept (glibc 2.36, three steps)
        fragments = max(min(held, MOST_FRAGMENTS_BYTES), FRAGMENTS_SHARE * held)
        if trains == "all" and unit == 4:
            fragments = EXACT_FRAGMENTS_SHARE * held
        # the passes below the lowest expert keep nothing and leave room for what is kept above
        fragments *= (shape.layers - lowest) / shape.layers
    return in_use + HEAP_BYTES + again + fragments
