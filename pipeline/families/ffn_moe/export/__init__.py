"""What a run leaves, as other programs load it: stock checkpoints, GGUF and PEFT adapters."""
