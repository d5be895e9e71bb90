"""What a run is: sections with defaults, read from YAML files and overrides."""

from .base import Section
from .load import load, merge
from .sections import Config, Fit

__all__ = ["Config", "Fit", "Section", "load", "merge"]
