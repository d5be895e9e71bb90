"""FFN experts of a language model."""
