"""MoleForge: train a mixture of experts in parts and serve it as one model."""

__version__ = "0.1.0"
