"""One training loop, its optimizer, checkpoints and memory."""
