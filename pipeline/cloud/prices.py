"""What rented machines cost and how fast they are: config/prices.yaml, the one list of GPUs and
regions that this program knows."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config.files import read
from ..config.machines import MachineConfig
from ..errors import ConfigError

FILE = "config/prices.yaml"  # where people find the table, and mend it
MIB_PER_GIB = 1024
GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: price of one, most per container, rate of its matrix products, whether those
    can be in bf16, its memory."""

    usd_per_s: float
    most: int
    tflops: float
    bf16: bool = True
    checked: str = ""  # "": when the table was
    cuda: str = ""  # the oldest that it works with, "": whatever torch brings
    memory_gb: float = 0.0  # 0: the table does not say


@dataclass(frozen=True)
class Surcharges:
    """What makes a container dearer, as factors of its price."""

    checked: str
    source: str
    nonpreemptible: float  # of cores and memory; no GPU can be had so
    regions: dict[str, float]


@dataclass(frozen=True)
class Storage:
    """What a volume costs, a month."""

    checked: str
    source: str
    usd_per_gib_month: float
    free_gib: float  # of a workspace, all its volumes together


@dataclass(frozen=True)
class Prices:
    """The price table, with the day on which somebody last compared it with the published one, and
    where that is."""

    checked: str
    source: str
    cpu_core_usd_per_s: float
    memory_gib_usd_per_s: float
    cpu_core_tflops: float
    gpus: dict[str, Gpu]
    surcharges: Surcharges
    storage: Storage

    @classmethod
    def load(cls, path: Path) -> "Prices":
        """Read the table. Raises ConfigError."""
        try:
            return cls._of(read(path))
        except (ConfigError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a price table: {error}; restore the one that came with MoleForge"
            ) from None

    @classmethod
    def told_by(cls, text: str) -> "Prices":
        """Return the table that `text` is."""
        return cls._of(json.loads(text))

    @classmethod
    def _of(cls, raw: dict) -> "Prices":
        raw = _dated(raw)
        gpus = {name: Gpu(**_dated(row)) for name, row in raw.pop("gpus").items()}
        surcharges = Surcharges(**_dated(raw.pop("surcharges")))
        storage = Storage(**_dated(raw.pop("storage")))
        return cls(gpus=gpus, surcharges=surcharges, storage=storage, **raw)

    @property
    def text(self) -> str:
        """The table as a container is told of it that has no file."""
        return json.dumps(asdict(self))

    def told(self, machines: Iterable[MachineConfig] = ()) -> str:
        """When the prices were checked, those of machines too that have a date of their own, where
        they stand and what they are from, for people."""
        own = {"surcharges": self.surcharges.checked}
        for machine in machines:
            for text in machine.gpu:
                kind, _ = split(text)
                own[kind] = self.gpus[kind].checked
        others = [f"{name} {date}" for name, date in own.items() if date not in ("", self.checked)]
        beside = f" ({', '.join(others)})" if others else ""
        source = self.source.removeprefix("https://")
        return f"prices of {self.checked}{beside}, {FILE}, from {source}"

    def usd_per_s(
        self, machine: MachineConfig, regions: Iterable[str] = (), *, nonpreemptible: bool = False
    ) -> float:
        """Return the price of a container, with the dearest of the GPUs that it may get."""
        gpus = 0.0
        for text in machine.gpu:
            kind, count = split(text)
            gpus = max(gpus, self.gpus[kind].usd_per_s * count)
        cpu = machine.cpu * self.cpu_core_usd_per_s
        memory = machine.memory_mb / MIB_PER_GIB * self.memory_gib_usd_per_s
        host = cpu + memory
        if nonpreemptible:
            host *= self.surcharges.nonpreemptible
        factors = [self.surcharges.regions[region] for region in regions]
        return (gpus + host) * min(factors, default=1.0)

    def usd_per_month(self, stored_bytes: int) -> float:
        """Return what so much on a volume costs where nothing of it is free."""
        return stored_bytes / GIB * self.storage.usd_per_gib_month

    def flops_per_s(self, machine: MachineConfig) -> float:
        """Return the peak rate of a container with the first GPU it asks for; only one of several
        trains. Of what it may get otherwise `either_of` tells."""
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

    def cuda_notes(self, machines: Mapping[str, MachineConfig], locked: str) -> Iterator[str]:
        """Yield which of the GPUs that machines ask for, by the names of their settings, want
        another CUDA than the locked torch brings."""
        for name, machine in machines.items():
            for text in machine.gpu:
                kind, _ = split(text)
                wanted = self.gpus[kind].cuda
                if locked and _version(wanted) > _version(locked):
                    may = "may be a B300, which" if kind.endswith("+") else "is a GPU that"
                    yield (
                        f"{name}: {text} {may} wants CUDA {wanted} by Modal's guide, and the "
                        f"locked torch brings {locked}, which nobody has tried on one: try it on "
                        "a run of a few steps, or name another GPU"
                    )

    def short_of(self, machine: MachineConfig, peak_bytes: int) -> str:
        """Return which of the GPUs that a machine may get has least memory, where that is less than
        a job's predicted peak; "" where none is known to."""
        known: dict[str, float] = {}
        for text in machine.gpu:
            kind, _ = split(text)
            if self.gpus[kind].memory_gb:
                known[kind] = self.gpus[kind].memory_gb
        least = min(known, key=lambda kind: known[kind], default="")
        if not least or known[least] * 1e9 >= peak_bytes:
            return ""
        return f"{least} ({known[least]:g} GB)"

    def region_problems(self, name: str, regions: Iterable[str]) -> list[str]:
        """Return what is wrong with the regions of a setting."""
        known = self.surcharges.regions
        found = []
        for region in regions:
            if region not in known:
                found.append(f"{name}: no such region {region}; there are {', '.join(known)}")
        return found


def _dated(row: dict) -> dict:
    """Return a part of the table with its date as it was written, of which YAML makes one."""
    return row | {"checked": str(row["checked"])} if "checked" in row else row


def locked_cuda(lock: str) -> str:
    """Return the CUDA that the torch of a lock file brings, "" where it brings none."""
    found = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", lock, re.MULTILINE)
    return found[1] if found else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)


def split(text: str) -> tuple[str, int]:
    """Return (kind, count) of a GPU as written; a count that is no number is 0."""
    # Modal takes names in any case.
    kind, colon, count = text.upper().partition(":")
    if count.isdecimal():
        return kind, int(count)
    # 0 is refused by the check, as there is no default that a wrong count could mean.
    return kind, 0 if colon else 1


def is_kind(text: str, found: str) -> bool:
    """Whether a GPU that was found, by its name, is of the kind that was asked for."""
    # A100-80GB! as asked for is NVIDIA A100-SXM4-80GB as found: the first part is in both.
    kind, _ = split(text)
    first = kind.rstrip("!+").partition("-")[0]
    # Whole, as L4 is in L40S; an A10 calls itself A10G
    return re.search(rf"\b{first}G?\b", found.upper()) is not None


def either_of(machine: MachineConfig) -> list[MachineConfig]:
    """Return the containers that a machine may turn out to be: one for each GPU that will do."""
    if not machine.gpu:
        return [machine]
    return [machine.model_copy(update={"gpu": (text,)}) for text in machine.gpu]


def most_gpus(machine: MachineConfig) -> int:
    """Return how many GPUs one container may take; at least 1, so that limits can be divided by
    it."""
    most = 1
    for text in machine.gpu:
        _, count = split(text)
        most = max(most, count)
    return most
