"""Two slots per run in progress: a torn or damaged write never costs the last good state.

A slot is state.safetensors, then state.json with its sha256 and a checksum over itself; a slot that
does not match is removed when it is found, so that the good one is never the one that the next save
writes over. The best state is a file beside them that a slot names, so that it takes no memory; it
goes when no slot names it any more.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import DamagedArtifact
from ..store.artifacts import (
    flush,
    load_tensors,
    save_tensors,
    sha256,
    translate_disk_errors,
    write_text,
)
from .optimizer import AdamW, merge
from .optimizer_state import SCALE

SLOTS = ("a", "b")
TENSORS = "state.safetensors"
NUMBERS = "state.json"


class Resumable(Protocol):
    """What of a task has to survive."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Other tensors that the next step depends on, by name."""


@dataclass
class TrainState:
    """Everything about a run in progress that is not a tensor of the task."""

    step: int = 0
    evaluated_step: int = -1
    valid_nats: float | None = None
    best_nats: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    recent_nats: list[float] = field(default_factory=list)  # training loss of the last steps
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    start_checksums: dict[str, int] = field(default_factory=dict)  # by parameter, before step 0
    saved_step: int = 0
    micro_batch: int = 0  # rows of a forward pass; 0: none was made yet
    max_micro_batch: int = 0  # what it may still grow to
    best_sha256: str = ""  # of the file that holds the best state; empty: none is kept

    def evaluated(self, nats: float) -> bool:
        """Take note of a validation loss; return whether it is the best so far."""
        self.evaluated_step = self.step
        self.valid_nats = nats
        better = self.best_nats is None or nats < self.best_nats
        if better:
            self.best_nats = nats
            self.best_step = self.step
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        return better


def save(folder: Path, task: Resumable, optimizer: AdamW, run: TrainState) -> None:
    """Write the older slot: part file, flush, rename, then its state.json. Raises DiskFull or
    OSError."""
    first, second = (folder / name for name in SLOTS)
    slot = first if _step_of(first) <= _step_of(second) else second
    # its numbers go first: without them the rest is no checkpoint, however far the removal comes;
    # with the folder go the temporary files of a save that was killed
    (slot / NUMBERS).unlink(missing_ok=True)
    shutil.rmtree(slot, ignore_errors=True)
    slot.mkdir(parents=True, exist_ok=True)

    _write_tensors(slot / TENSORS, _state_tensors(task, optimizer))
    # the tensors are whole on the disk before the numbers name them
    run.saved_step = run.step
    numbers = {"sha256": sha256(slot / TENSORS), "run": asdict(run)}
    checksum = _checksum(numbers)
    write_text(slot / NUMBERS, json.dumps(numbers | {"checksum": checksum}))
    # only now, as the slot that was written over may have named another best state
    _remove_unused_best(folder, run)


def restore(
    folder: Path, task: Resumable, optimizer: AdamW, note: Callable[[str], None]
) -> TrainState | None:
    """Load the newest good slot into task and optimizer; removes damaged ones and tells by `note`
    what that costs."""
    run = None
    damage = []
    for slot in _slots_to_try(folder):
        try:
            numbers, tensors = _read_slot(slot, task, optimizer)
        except DamagedArtifact as error:
            # told below, when it is known what the run goes on from
            damage.append(str(error))
            shutil.rmtree(slot)
            continue
        run = TrainState(**numbers["run"])
        _load_state(tensors, task, optimizer, run)
        break
    for text in damage:
        if run:
            note(f"{text}; going on from the other one, step {run.step}")
        else:
            note(f"{text}; starting over at step 0")
    return run


def save_best(folder: Path, task: Resumable, optimizer: AdamW, run: TrainState) -> None:
    """Write the parameters as the run's best state. Raises DiskFull or StoreError."""
    path = _best_path(folder, run)
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_tensors(path, _masters(task, optimizer))
    run.best_sha256 = sha256(path)


def load_best(folder: Path, task: Resumable, run: TrainState) -> None:
    """Put the best state back into the task's fp32 parameters, when one is kept and it is not the
    current one.

    Raises DamagedArtifact.
    """
    if not run.best_sha256 or run.best_step == run.step:
        return
    kinds = _by_kind(_verified_tensors(_best_path(folder, run), run.best_sha256))
    residuals = kinds.get("residual", {})
    with torch.no_grad():
        for name, best in kinds["parameter"].items():
            if name in residuals:
                high = best
                best = merge(high.view(-1), residuals[name].view(-1)).view_as(high)
            task.parameters[name].copy_(best)


def _best_path(folder: Path, run: TrainState) -> Path:
    return folder / f"best-{run.best_step}.safetensors"


def _remove_unused_best(folder: Path, run: TrainState) -> None:
    """Remove best states that neither a slot nor the run in hand names."""
    named = {_best_path(folder, run).name}
    for name in SLOTS:
        with suppress(DamagedArtifact):
            state = _read_numbers(folder / name)["run"]
            named.add(f"best-{state['best_step']}.safetensors")
    for path in folder.glob("best-*"):
        if path.name not in named:
            path.unlink()


def _slots_to_try(folder: Path) -> list[Path]:
    """Return the slots that exist: unreadable ones, to be found out and removed, then the newest
    first."""
    slots = [folder / name for name in SLOTS if (folder / name).exists()]
    unreadable = [slot for slot in slots if _step_of(slot) < 0]
    readable = [slot for slot in slots if _step_of(slot) >= 0]
    return unreadable + sorted(readable, key=_step_of, reverse=True)


def _step_of(slot: Path) -> int:
    """Return the step of a slot; -1 when it is absent or unreadable (then it is the one to write
    over)."""
    try:
        return _read_numbers(slot)["run"]["step"]
    except DamagedArtifact:
        return -1


def _read_slot(
    slot: Path, task: Resumable, optimizer: AdamW
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a slot's numbers and tensors. Raises DamagedArtifact."""
    numbers = _read_numbers(slot)
    tensors = _verified_tensors(slot / TENSORS, numbers["sha256"])
    same_shapes = _shapes(tensors) == _shapes(_state_tensors(task, optimizer))
    known_fields = {field.name for field in fields(TrainState)}
    if not same_shapes or numbers["run"].keys() != known_fields:
        raise DamagedArtifact(
            f"checkpoint {slot} was written in another dtype or by another version of this program"
        )
    run = TrainState(**numbers["run"])
    if run.best_sha256:
        # a slot that names a best state is good only together with it
        _verified_tensors(_best_path(slot.parent, run), run.best_sha256)
    return numbers, tensors


def _read_numbers(slot: Path) -> dict[str, Any]:
    """Return what state.json holds after a check of its checksum. Raises DamagedArtifact."""
    path = slot / NUMBERS
    try:
        numbers = json.loads(path.read_text("utf-8"))
        stored = numbers.pop("checksum")
        if stored == _checksum(numbers):
            return numbers
    except FileNotFoundError:
        raise DamagedArtifact(f"checkpoint {slot} was not finished: it has no {NUMBERS}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"checkpoint {path} cannot be read ({error})") from None
    raise DamagedArtifact(
        f"checkpoint {path} is torn or its bytes have changed (its checksum differs)"
    )


def _checksum(numbers: dict[str, Any]) -> str:
    """Return the sha256 of numbers, whatever order they come in."""
    text = json.dumps(numbers, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _verified_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Return a file's tensors after a check of its bytes. Raises DamagedArtifact."""
    try:
        found = sha256(path)
    except OSError as error:
        raise DamagedArtifact(f"checkpoint {path} cannot be read ({error.strerror})") from None
    if found != digest:
        raise DamagedArtifact(
            f"checkpoint {path} is torn or its bytes have changed (sha256 differs)"
        )
    return load_tensors(path)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a part file, flush it, then rename it."""
    part = path.with_name(f"{path.name}.part")
    try:
        save_tensors(part, tensors)
    except BaseException:
        # on a full disk what was written of it would be in the way of the next attempt
        part.unlink(missing_ok=True)
        raise
    flush(part)
    part.replace(path)


def _state_tensors(task: Resumable, optimizer: AdamW) -> dict[str, Tensor]:
    """Collect at save time everything the next step depends on, by kind and name."""
    tensors = _masters(task, optimizer) | optimizer.tensors()
    for name, tensor in task.state.items():
        tensors[f"state/{name}"] = tensor
    tensors["generator/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["generator/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _masters(task: Resumable, optimizer: AdamW) -> dict[str, Tensor]:
    """Return the fp32 masters by name, those that compute in bf16 in two halves."""
    tensors = {}
    for name, parameter in task.parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
    for name, residual_bits in optimizer.residual_bits.items():
        tensors[f"residual/{name}"] = residual_bits
    return tensors


def _load_state(
    tensors: dict[str, Tensor], task: Resumable, optimizer: AdamW, run: TrainState
) -> None:
    """Put back what `_state_tensors` collected."""
    kinds = _by_kind(tensors)
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(kinds["parameter"][name])
        for name, tensor in task.state.items():
            tensor.copy_(kinds["state"][name])
        optimizer.load(kinds, run.step)
    generators = kinds["generator"]
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return what a checkpoint must have in common with the task that it is for.

    Not the generators' states, which differ between devices, nor the scales of 8-bit moments: a
    run may go on with moments of another kind.
    """
    shapes = {}
    for name, tensor in tensors.items():
        kind = name.partition("/")[0]
        if kind != "generator" and not kind.endswith(SCALE):
            shapes[name] = tensor.shape
    return shapes


def _by_kind(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return {kind: {name: tensor}} of tensors named kind/name."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = tensor
    return kinds
