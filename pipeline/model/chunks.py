"""How large the chunks of the loss are, and what its buffers take: numbers that a plan is made of
where there is no torch.
"""

# Logits of a chunk. With 16,384 entries that is 256 tokens, the fastest where it was measured.
CHUNK_LOGITS = 2**22
# On a GPU, which would wait for the start of every small product, and read the head for each.
GPU_CHUNK_LOGITS = 2**27
# Below so many tokens the matrix products slow down, however large the vocabulary is.
MIN_CHUNK_TOKENS = 64
# Numbers of a head that is stored in another dtype than its products: up to so many it is cast as a
# whole, once a pass, and takes 128 MiB; a larger one piece by piece for each chunk. With 49,152
# entries of width 576 pieces made a training pass 15 % slower.
WHOLE_NUMBERS = 2**25
PIECE_NUMBERS = 2**20


def chunk_logits_on(device_type: str) -> int:
    """Return the logits of a chunk on a kind of device."""
    return CHUNK_LOGITS if device_type == "cpu" else GPU_CHUNK_LOGITS


def chunk_of(vocab_size: int, chunk_logits: int = CHUNK_LOGITS) -> int:
    """Return the tokens of a chunk that holds about that many logits."""
    return max(MIN_CHUNK_TOKENS, chunk_logits // vocab_size)


def workspace_bytes(tokens: int, vocab_size: int, chunk_logits: int, number_bytes: int) -> int:
    """Return the bytes of the two buffers of a pass over `tokens`: a chunk's logits, of numbers of
    `number_bytes`, and their softmax in fp32."""
    chunk_tokens = min(tokens, chunk_of(vocab_size, chunk_logits))
    return chunk_tokens * vocab_size * (4 + number_bytes)
