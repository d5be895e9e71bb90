"""Arithmetic of the figures in a report."""
