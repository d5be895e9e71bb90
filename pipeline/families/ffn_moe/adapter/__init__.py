"""Experts that are LoRA adapters on the whole language model, one for a whole text."""
