"""Sources to documents, rows and pictures; these to token shards, task rows and routing sets.

Invariant: what this imports brings no torch and no transformers.
"""
