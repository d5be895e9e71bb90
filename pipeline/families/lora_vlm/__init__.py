"""LoRA experts of a vision-language model (Qwen3-VL)."""
