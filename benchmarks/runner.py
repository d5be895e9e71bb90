"""How the longer benchmarks run the pipeline: by its own command line, and open what it leaves."""

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.families.ffn_moe.config import FfnMoeConfig
from pipeline.families.load import load
from pipeline.run.context import StoredParts
from pipeline.store.artifacts import Store

# Lines of what a stage told that stay for whoever asks why it failed
LAST_LINES = 30
SIDE_BY_SIDE = ("run", "train_experts", "train_dense")


class StageFailed(Exception):
    """A stage that ended without its result, and what it told last."""


def typed(words: Sequence[str]) -> float:
    """Carry out a command of the pipeline as a person types it, its progress shown; return its
    seconds. Raises StageFailed."""
    started = time.monotonic()
    told: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            told.append(line)
    if process.returncode:
        last = "".join(told).strip()
        raise StageFailed(f"{words[0]} ended with {process.returncode}: {last[-1500:]}")
    return time.monotonic() - started


class Runner:
    """Runs stages by the command line, and opens what they leave."""

    def __init__(
        self,
        config: Path,
        files: Sequence[str],
        store: Path,
        common: Sequence[str],
        parallel: int,
    ):
        absolute = [str(Path(file).resolve()) for file in files]
        paths = json.dumps([{"paths": absolute}])
        self.file = config
        self.common = (f"data.files={paths}", *common)
        self.parallel = parallel
        self.store = Store(store)
        self.seconds: dict[str, float] = {}
        self._configs: dict[tuple[str, ...], FfnMoeConfig] = {}

    def run(self, stage: str, *overrides: str) -> None:
        """Run one stage as a user would. Raises StageFailed."""
        command = [stage, "--config", str(self.file), "--store", str(self.store.root)]
        if stage in SIDE_BY_SIDE:
            command += ["--parallel", str(self.parallel)]
        for change in (*self.common, *overrides):
            command += ["--override", change]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + typed(command)

    def make(self, stage: str, *overrides: str) -> bool:
        """Run one stage unless all of it is in the store; return whether there was something to
        do. Raises StageFailed."""
        cfg = self.config(*overrides)
        parts = self.parts(cfg)
        try:
            for item in cfg.items(stage):
                parts.manifest(stage, item)
        except PipelineError:
            self.run(stage, *overrides)
            return True
        return False

    def config(self, *overrides: str) -> FfnMoeConfig:
        """Return the configuration the command line would use. Raises ConfigError."""
        # Asked for each stage anew; a reading takes longer than a look into the store
        if overrides not in self._configs:
            self._configs[overrides] = load(self.file, (*self.common, *overrides))
        return self._configs[overrides]

    def parts(self, cfg: FfnMoeConfig) -> StoredParts:
        """Return what the stages of a configuration left."""
        return StoredParts(cfg, self.store)
