"""Whole models trained end to end on a run's tokens, to hold the training in parts against."""
