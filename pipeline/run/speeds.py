"""How fast finished trainings were, which the time of others is told from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import StoreError
from ..hardware import cpu_name, gpu_name
from ..store.artifacts import Manifest, Reader, Store

# Of a demo's jobs those of 5 s and more reached their final rate within 40 %, those of the smallest
# tests, .07 to .35 s, a fifteenth of the others' (Nov 2026): they are all set-up
LEAST_TRAINED_S = 5.0
# and steps, of trainings that did not note how long their first one took
LEAST_STEPS = 10
# Of a bundle: of fewer bytes what begins and ends a job is most of the time, all the more so where
# the machine was busy. One of 2.4 MB took 2 s there, and foretold 15 minutes of 1.27 GB
LEAST_WRITTEN_BYTES = 32 << 20
BUNDLES = "deploy-"  # how their addresses begin
# Operations a token of models that are about as large: from a forward pass to a whole training are
# three of them
NEAR = 4.0
# A larger model keeps a processor busier: 32 GFLOP/s at 2.2 M operations a token, 120 at 565 M, in
# bf16 on one thread (Nov 2026): a fourth root between these, beyond which nothing is made of size
GROWTH = 0.25
SMALLEST = 2.2e6
LARGEST = 565e6


@dataclass(frozen=True)
class Speed:
    """How fast one finished training was, once it had started."""

    manifest: Manifest
    flops_per_s: float
    seconds: float  # of the steps that tell it

    @property
    def flops_per_token(self) -> float:
        """Operations of a token: the same for trainings that move the same of one model."""
        found: float = self.manifest.metrics["flops_per_token"]
        return found

    def scale(self, flops_per_token: float) -> float:
        """Return how many times as fast a model of so many operations a token is likely to be, by
        its size alone: 1 of one about as large, and where nobody knows a size."""
        own = self.flops_per_token
        if not own or not flops_per_token or own / NEAR <= flops_per_token <= own * NEAR:
            return 1.0
        here, there = (min(max(each, SMALLEST), LARGEST) for each in (flops_per_token, own))
        return (here / there) ** GROWTH

    @property
    def threads(self) -> int | None:
        """Processor threads that it had."""
        found: int | None = self.manifest.made.get("machine", {}).get("threads")
        return found

    @property
    def dtype(self) -> str | None:
        """What its products ran in; None of an older training, which did not note it."""
        found: str | None = self.manifest.made.get("machine", {}).get("dtype")
        return found


def speeds(store: Store, reader: Reader | None = None) -> Iterator[Speed]:
    """Yield the speeds of the finished trainings that were long enough to tell one.

    reader: what has read manifests of the store already, since it was refreshed.
    """
    for manifest in _finished(store, reader):
        found = speed_of(manifest)
        if found is not None:
            yield found


def _finished(store: Store, reader: Reader | None, prefix: str = "") -> Iterator[Manifest]:
    """Yield the manifests of artifacts whose addresses begin so; those that cannot be read are no
    part of this run, or its own job says so."""
    read = reader or Reader(store)
    for address in store.addresses():
        try:
            if not address.startswith(prefix) or not store.has(address):
                continue
            manifest = read.recorded(address)
        except StoreError:
            continue
        yield manifest


def of_this_machine(store: Store, reader: Reader | None = None) -> list[Speed]:
    """Return the speeds of trainings that were finished on a machine like this; `reader` as
    `speeds` takes it."""
    here = (cpu_name(), gpu_name())
    out = []
    for each in speeds(store, reader):
        machine = each.manifest.made.get("machine", {})
        if (machine.get("cpu"), machine.get("gpu")) == here:
            out.append(each)
    return out


def speed_of(manifest: Manifest) -> Speed | None:
    """Return the speed of a training that was long enough to tell one."""
    found = _speed(manifest)
    return found if found and found.seconds >= LEAST_TRAINED_S else None


def _speed(manifest: Manifest) -> Speed | None:
    """Return the speed of a training without its first step, in which files are read and kernels
    are made; None of what is no training, or had no other step."""
    metrics = manifest.metrics
    seconds = metrics.get("training_s", 0.0)
    # a search for a rate counts none: it is several short trainings
    steps = metrics.get("steps", LEAST_STEPS)
    if not seconds:
        return None
    tokens = metrics["tokens_per_s"] * seconds
    first_s = metrics.get("first_step_s", 0.0)
    if first_s:
        tokens *= (steps - 1) / steps
        seconds -= first_s
    elif steps < LEAST_STEPS:
        return None
    if tokens <= 0 or seconds <= 0:
        return None
    return Speed(manifest, tokens * metrics["flops_per_token"] / seconds, seconds)


def bundle_rates(store: Store, reader: Reader | None = None) -> list[float]:
    """Return how many bytes a second finished bundles were made at, on a machine like this: read,
    computed, summed on the way and written. That all of it was summed once more when it lay there
    is no part of it. `reader` as `speeds` takes it."""
    here = (cpu_name(), gpu_name())
    rates = []
    for manifest in _finished(store, reader, BUNDLES):
        machine = manifest.made.get("machine", {})
        seconds = manifest.made.get("seconds") or 0.0
        written = manifest.metrics.get("bytes") or 0
        is_here = (machine.get("cpu"), machine.get("gpu")) == here
        if is_here and seconds and written >= LEAST_WRITTEN_BYTES:
            rates.append(written / seconds)
    return rates


def alike(found: Iterable[Speed], flops_per_token: float, threads: int, dtype: str) -> list[Speed]:
    """Return the speeds that tell most of a job whose products run in bf16 or fp32: of the same
    operations a token and as many threads, else of a model about as large with as many, and only
    then whatever its threads.

    None of the other arithmetic, which is several times as fast or as slow: what a machine is
    thought to do says more.
    """
    known = [each for each in found if each.dtype in (None, dtype)]
    same = [each for each in known if each.threads == threads]
    for some in (same, known):
        for least, most in ((1 - 1e-9, 1 + 1e-9), (1 / NEAR, NEAR)):
            near = []
            for each in some:
                if least * flops_per_token <= each.flops_per_token <= most * flops_per_token:
                    near.append(each)
            if near:
                return near
    return same or known


def typical(rates: Sequence[float]) -> float | None:
    """Return the median of rates, of two in the middle the higher one; None where there are none.

    The median, as a job that was preempted or shared its machine says little of the next, and is
    slower than it would have been.
    """
    return sorted(rates)[len(rates) // 2] if rates else None
