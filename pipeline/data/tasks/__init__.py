"""Rows of tasks, prepared for adapters."""
