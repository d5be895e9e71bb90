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
    """One kind of GPU: price of one, most per container, rate of its matrix products, whether those
    can be in bf16."""

    usd_per_s: float
    most: int
    tflops: float
    bf16: bool = True


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
            # YAML makes a date of it, which is shown as it was written.
            checked = str(raw.pop("checked"))
            return cls(checked=checked, gpus=gpus, **raw)
        except (ConfigError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a price table: {error}; restore the one that came with MoleForge"
            ) from None

    def usd_per_s(self, machine: MachineConfig) -> float:
        """Return the price of a container, with the dearest of the GPUs that it may get."""
        gpus = 0.0
        for text in machine.gpu:
            kind, count = split(text)
            gpus = max(gpus, self.gpus[kind].usd_per_s * count)
        cpu = machine.cpu * self.cpu_core_usd_per_s
        memory = machine.memory_mb / MIB_PER_GIB * self.memory_gib_usd_per_s
        return gpus + cpu + memory

    def flops_per_s(self, machine: MachineConfig) -> float:
        """Return the peak rate of a container with the first GPU it asks for; only one of several
        trains."""
        if machine.gpu:
            kind, _ = split(machine.gpu[0])
            tflops = self.gpus[kind].tflops
        else:
            tflops = machine.cpu * self.cpu_core_tflops
        return tflops * 1e12

    def has_bf16(self, machine: MachineConfig) -> bool:
        """Whether every GPU that a container may get has bf16. A container without one may get any
        processor, so it has none."""
        kinds = [split(text)[0] for text in machine.gpu]
        return bool(kinds) and all(self.gpus[kind].bf16 for kind in kinds)

    def problems(self, name: str, machine: MachineConfig) -> list[str]:
        """Return what is wrong with the GPUs that a machine asks for."""
        found = []
        for text in machine.gpu:
            kind, count = split(text)
            if kind not in self.gpus:
                known = ", ".join(self.gpus)
                found.append(
                    f"modal.{name}.gpu: no such GPU {text}; there are {known}, `:2` for two"
                )
                continue
            most = self.gpus[kind].most
            if not 1 <= count <= most:
                found.append(
                    f"modal.{name}.gpu: {text} asks for {count} of 1 to {most} per container"
                )
        return found


def split(text: str) -> tuple[str, int]:
    """Return (kind, count) of a GPU as written; a count that is no number is 0."""
    # Modal takes names in any case.
    kind, colon, count = text.upper().partition(":")
    if count.isdecimal():
        return kind, int(count)
    # 0 is refused by the check, as there is no default that a wrong count could mean.
    return kind, 0 if colon else 1


def most_gpus(machine: MachineConfig) -> int:
    """Return how many GPUs one container may take; at least 1, so that limits can be divided by
    it."""
    most = 1
    for text in machine.gpu:
        _, count = split(text)
        most = max(most, count)
    return most
