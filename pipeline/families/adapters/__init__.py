"""What every family of LoRA adapters needs; knows nothing of pictures."""
