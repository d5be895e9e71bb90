"""Documents to token shards, and training rows from shards."""

from .parts import encode, survey
from .prepare import prepare
from .shards import Mixture, Shards

__all__ = ["Mixture", "Shards", "encode", "prepare", "survey"]
