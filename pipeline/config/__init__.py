"""What a run is: sections with defaults, read from YAML files and overrides."""

from .base import Section, merge
from .ffn_moe import Config
from .load import describes_run, load, parse
from .lora_vlm import LoraConfig, LoraEvaluate
from .loras import Base, Build, Drawn, ExpertEntry, ImageLimits, LoraOptions, Loras, RouterEntry, TaskData
from .routing_set import RoutingSet, RoutingSource
from .run import Run
from .sections import Fit

__all__ = [
    "Base", "Build", "Config", "Drawn", "ExpertEntry", "Fit", "ImageLimits", "LoraConfig", "LoraEvaluate",
    "LoraOptions", "Loras", "RouterEntry", "RoutingSet", "RoutingSource", "Run", "Section", "TaskData",
    "describes_run", "load", "merge", "parse",
]  # fmt: skip
