"""What rented machines cost and how fast they are: config/prices.yaml, the one list of GPUs that
this program knows."""

from dataclasses import dataclass
from pathlib import Path

from ..config.files import read
from ..config.machines import MachineConfig
from ..errors import ConfigError

MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: price of one, most per container, rate of its matrix products."""

    usd_per_s: float
    most: int
    tflops: float


@dataclass(frozen=True)
class Prices:
    """The price table, with the day on which somebody last compared it with the published one."""

    checked: str
    cpu_core_usd_per_s: float
    memory_gib_usd_per_s: float
    cpu_core_tflops: float
    gpus: dict[str, Gpu]

    @classmethod
    def load(cls, path: Path) -> "Prices":
        """Read the table. Raises ConfigError."""
        try:
            raw = read(path)
            gpus = {name: Gpu(**row) for name, row in raw.pop("gpus").items()}
            return cls(checked=str(raw.pop("checked")), gpus=gpus, **raw)
        except (ConfigError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a price table: {error}; restore the one that came with MoleForge"
            ) from None

    def usd_per_s(self, machine: MachineConfig) -> float:
        """Return the price of a container, with the dearest of the GPUs that it may get."""
        gpus = [self.gpus[name].usd_per_s * count for name, count in map(split, machine.gpu)]
        memory = machine.memory_mb / MIB_PER_GIB * self.memory_gib_usd_per_s
        return max(gpus, default=0.0) + machine.cpu * self.cpu_core_usd_per_s + memory

    def flops_per_s(self, machine: MachineConfig) -> float:
        """Return the peak rate of a container with the first GPU it asks for; only one of several
        trains."""
        tflops = (
            self.gpus[split(machine.gpu[0])[0]].tflops
            if machine.gpu
            else machine.cpu * self.cpu_core_tflops
        )
        return tflops * 1e12

    def problems(self, name: str, machine: MachineConfig) -> list[str]:
        """Return what is wrong with the GPUs that a machine asks for."""
        found = []
        for text in machine.gpu:
            kind, count = split(text)
            if kind not in self.gpus:
                found.append(
                    f"modal.{name}.gpu: no such GPU {text}; there are {', '.join(self.gpus)}, `:2` for two"
                )
            elif not 1 <= count <= self.gpus[kind].most:
                found.append(
                    f"modal.{name}.gpu: {text} asks for {count} of 1 to {self.gpus[kind].most} per container"
                )
        return found


def split(text: str) -> tuple[str, int]:
    """Return (kind, count) of a GPU as written; a count that is no number is 0."""
    kind, colon, count = text.upper().partition(":")
    return kind, int(count) if count.isdecimal() else int(not colon)


def most_gpus(machine: MachineConfig) -> int:
    """Return how many GPUs one container may take; at least 1, so that limits can be divided by it."""
    return max((split(text)[1] for text in machine.gpu), default=1) or 1
