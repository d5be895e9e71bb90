"""Stages, where they run, and what a run would do."""
