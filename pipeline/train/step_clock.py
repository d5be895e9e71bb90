"""How long each phase of a training takes, on the wall and of all threads."""

import time

import torch

# What a step's time is split into; starting, evaluating and saving are counted, but are no part of
# a step.
PHASES = ("data", "forward", "backward", "optimizer")


class StepClock:
    """Seconds per phase; waits for a GPU at each lap so that the phases are true."""

    def __init__(self, device: torch.device):
        self.device = device
        self.row_laps: dict[str, float] = {}  # since the last history row
        self.totals: dict[str, float] = {}
        self.cpu_totals: dict[str, float] = {}
        self.step_s = 0.0
        # Files are read and kernels made in it: it is no measure of the others
        self.first_step_s = 0.0
        self.first_ended = False
        self.last_s = time.perf_counter()
        self.last_cpu_s = time.process_time()

    def add_to(self, totals: dict[str, float], cpu_totals: dict[str, float]) -> None:
        """Add every lap from now on to these: those of the attempts before, so that a checkpoint
        always has the seconds of the steps that it has."""
        self.totals = totals
        self.cpu_totals = cpu_totals

    def lap(self, phase: str) -> None:
        """End a phase that began with the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now_s = time.perf_counter()
        for laps in (self.row_laps, self.totals):
            laps[phase] = laps.get(phase, 0.0) + now_s - self.last_s
        # What others do on this machine makes a phase longer, and takes it hardly more of this
        cpu_s = time.process_time()
        if phase in PHASES:
            self.step_s += now_s - self.last_s
            if not self.first_ended:
                self.first_step_s += now_s - self.last_s
                self.first_ended = phase == PHASES[-1]
            spent_s = cpu_s - self.last_cpu_s
            self.cpu_totals[phase] = self.cpu_totals.get(phase, 0.0) + spent_s
        self.last_s = now_s
        self.last_cpu_s = cpu_s

    def since_step(self) -> float:
        """Return seconds of steps since the last call: of one, when asked after each."""
        seconds = self.step_s
        self.step_s = 0.0
        return seconds

    def since_row(self) -> dict[str, float]:
        """Return seconds by phase of a step since the last call."""
        laps = {phase: self.row_laps.get(phase, 0.0) for phase in PHASES}
        self.row_laps = {}
        return laps
