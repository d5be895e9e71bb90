"""Experiments: many runs of one base, trained as any run is, and held against each other.

Nothing of a sweep is kept but what its trainings leave in the store. A trial is the run that its
settings describe, what it shares with others lies at the same address, and what a search chooses
follows from the results before it, so a sweep that was killed goes on where it was.
"""
