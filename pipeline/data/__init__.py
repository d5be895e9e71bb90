"""Documents to token shards, and training rows from shards; sources of pictures to task rows (`tasks`, `drawn`).

Invariant: what this imports brings no torch and no transformers.
"""

from .parts import encode, survey
from .prepare import prepare
from .shards import Mixture, Shards

__all__ = ["Mixture", "Shards", "encode", "prepare", "survey"]
