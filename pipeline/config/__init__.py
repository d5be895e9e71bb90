"""What a run is: sections with defaults, read from YAML files and overrides."""

from .load import load, merge
from .sections import Config, Fit, Section

__all__ = ["Config", "Fit", "Section", "load", "merge"]
