"""Two slots per run in progress: a torn or damaged write never costs the last good state.

A slot is state.safetensors, then state.json with its sha256 and a checksum over itself. A slot that
was read and does not match is renamed aside, so that the good one is never the one that the next
save writes over; one that cannot be read, or that another kind of run wrote, ends the run with
everything as it was. The best state is a file beside them that a slot names, so that it takes no
memory; it goes when no slot names it any more.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import DamagedArtifact, OtherCheckpoint, UnreadableFile
from ..store.artifacts import (
    flush,
    load_tensors,
    save_tensors,
    sha256,
    write_text,
)
from ..store.reading import reading, sealed, unsealed
from ..store.room import translate_disk_errors
from .optimizer import AdamW, merge
from .state_tensors import Resumable, by_kind, load_state, masters, shapes, state_tensors

SLOTS = ("a", "b")
TENSORS = "state.safetensors"
NUMBERS = "state.json"
# Raised when a slot's files or numbers mean something else than before; `run.step` and how numbers
# are sealed stay, so that any version knows a checkpoint of another for one.
FORMAT = 1
# Fields of the numbers that the first checkpoints of this format are without, and need not have.
SINCE = {"address", "rounding", "cpu_seconds"}
# In the name of what is kept aside, before the time: what was found wrong, what is of inputs that
# were made again since, and what is another job's.
DAMAGED = ".damaged-"
STALE = ".stale-"
OTHER = ".other-"
# Something lies there, and it is no file or no folder as a slot has it.
NOT_A_SLOT = (NotADirectoryError, IsADirectoryError)


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
    cpu_seconds: dict[str, float] = field(default_factory=dict)  # of all threads, by phase
    start_checksums: dict[str, int] = field(default_factory=dict)  # by parameter, before step 0
    saved_step: int = 0
    micro_batch: int = 0  # rows of a forward pass; 0: none was made yet
    max_micro_batch: int = 0  # what it may still grow to
    rounding: list[dict[str, Any]] = field(default_factory=list)  # by attempt, where they differ
    best_sha256: str = ""  # of the file that holds the best state; empty: none is kept
    # address -> digest of what the job reads: with others a training goes on from nothing here
    inputs: dict[str, str] = field(default_factory=dict)
    address: str = ""  # of what is trained
    # above the level at which an attempt began, the highest of all attempts
    peak_bytes: int = 0
    host_peak_bytes: int = 0

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


class _Damage(DamagedArtifact):
    """What was read and is not what was written; `paths` are renamed aside, none when nothing of it
    is worth keeping."""

    def __init__(self, text: str, *paths: Path, kind: str = DAMAGED):
        super().__init__(text)
        self.paths = paths
        self.kind = kind


def save(folder: Path, task: Resumable, optimizer: AdamW, run: TrainState) -> None:
    """Write the older slot: part file, flush, rename, then its state.json.

    Raises DiskFull, OSError, or UnreadableFile when the system does not say which slot is older.
    """
    first, second = (folder / name for name in SLOTS)
    slot = first if _step_of(first) <= _step_of(second) else second
    # its numbers go first: without them the rest is no checkpoint, however far the removal comes;
    # with the folder go the temporary files of a save that was killed
    (slot / NUMBERS).unlink(missing_ok=True)
    shutil.rmtree(slot, ignore_errors=True)
    slot.mkdir(parents=True, exist_ok=True)

    _write_tensors(slot / TENSORS, state_tensors(task, optimizer))
    # the tensors are whole on the disk before the numbers name them
    run.saved_step = run.step
    numbers = {
        "format": FORMAT,
        "version": __version__,
        "dtype": _dtype(task, optimizer),
        "sha256": sha256(slot / TENSORS),
        "run": asdict(run),
    }
    write_text(slot / NUMBERS, sealed(numbers))
    # only now, as the slot that was written over may have named another best state
    _remove_unused_best(folder, run)


def restore(
    folder: Path,
    task: Resumable,
    optimizer: AdamW,
    note: Callable[[str], None],
    inputs: Mapping[str, str] | None = None,
    address: str = "",
) -> TrainState | None:
    """Load the newest good slot into task and optimizer; renames aside what is damaged, was trained
    on other inputs than these or for another address, and tells by `note` what that costs.

    Raises UnreadableFile when anything on the way cannot be read, and OtherCheckpoint for slots
    that another kind of run wrote; both leave every file as it was.
    """
    damages = []
    slots = {}
    for name in SLOTS:
        slot = folder / name
        if not _exists(slot):
            continue
        try:
            numbers = _read_numbers(slot)
            _check_job(slot, numbers, address)
            _check_inputs(slot, numbers, inputs)
            slots[slot] = numbers
        except _Damage as damage:
            damages.append(damage)
    for slot, numbers in slots.items():
        _check_kind(slot, numbers, task, optimizer)

    run = None
    for slot in sorted(slots, key=lambda slot: slots[slot]["run"]["step"], reverse=True):
        try:
            tensors = _read_tensors(slot, slots[slot])
        except _Damage as damage:
            damages.append(damage)
            continue
        _check_tensors(slot, tensors, task, optimizer)
        run = TrainState(**slots[slot]["run"])
        load_state(tensors, task, optimizer, run.step)
        break
    # only now: had a read failed, the next attempt had to find everything where it was
    goes_on = "starting over at step 0"
    if run:
        goes_on = f"going on from the other one, step {run.step}"
    needed = _best_path(folder, run) if run else None
    for found in damages:
        note(f"{found}{_set_aside(found, needed)}; {goes_on}")
    return run


def save_best(folder: Path, task: Resumable, optimizer: AdamW, run: TrainState) -> None:
    """Write the parameters as the run's best state. Raises DiskFull or StoreError."""
    path = _best_path(folder, run)
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_tensors(path, masters(task, optimizer))
    run.best_sha256 = sha256(path)


def load_best(folder: Path, task: Resumable, run: TrainState) -> None:
    """Put the best state back into the task's fp32 parameters, when one is kept and it is not the
    current one.

    Raises DamagedArtifact or UnreadableFile.
    """
    if not run.best_sha256 or run.best_step == run.step:
        return
    kinds = by_kind(_verified_tensors(_best_path(folder, run), run.best_sha256))
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
        try:
            state = _read_numbers(folder / name)["run"]
        except DamagedArtifact:
            continue
        except UnreadableFile:
            # it may name any of them; the next save asks again
            return
        named.add(f"best-{state['best_step']}.safetensors")
    for path in folder.glob("best-*"):
        is_aside = any(kind in path.name for kind in (DAMAGED, STALE, OTHER))
        if path.name not in named and not is_aside:
            path.unlink()


def _exists(path: Path) -> bool:
    """Whether anything lies at a path, a link that leads nowhere too. Raises UnreadableFile."""
    # Path.exists takes what the system does not let us see for absent
    try:
        with reading(path, "checkpoint"):
            os.lstat(path)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        folder = path.parent
        raise UnreadableFile(f"checkpoints in {folder}: it is no folder", path=folder) from None
    return True


def _set_aside(damage: _Damage, needed: Path | None) -> str:
    """Rename what was found wrong, less what the run that goes on needs; return the end of a
    sentence that says where it is now."""
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = []
    for path in damage.paths:
        if path == needed:
            continue
        aside = path.with_name(f"{path.name}{damage.kind}{at}")
        # a clock may be set back, and a name be taken
        again = 1
        while _exists(aside):
            again += 1
            aside = path.with_name(f"{path.name}{damage.kind}{at}-{again}")
        # two slots may name one best state, and what is gone cannot be kept
        with suppress(FileNotFoundError):
            path.rename(aside)
            names.append(aside.name)
    return f" (kept as {', '.join(names)})" if names else ""


def _step_of(slot: Path) -> int:
    """Return the step of a slot; -1 when it is absent or damaged (then it is the one to write
    over). Raises UnreadableFile."""
    try:
        return _read_numbers(slot)["run"]["step"]
    except DamagedArtifact:
        return -1


def _check_job(slot: Path, numbers: dict[str, Any], address: str) -> None:
    """Raise _Damage for a slot of another job: of two experts all tensors have the same sizes."""
    run = numbers["run"]
    stored = run.get("address")
    if not address or not stored or stored == address:
        return
    raise _Damage(
        f"checkpoint {slot} (step {run['step']}) is of {stored}, and this job makes {address}",
        slot,
        slot.parent / f"best-{run['best_step']}.safetensors",
        kind=OTHER,
    )


def _check_inputs(slot: Path, numbers: dict[str, Any], inputs: Mapping[str, str] | None) -> None:
    """Raise _Damage for a slot of a training on other inputs: going on would mix them."""
    run = numbers["run"]
    stored = run.get("inputs")
    # One without a word of them is of an earlier version, which is told apart elsewhere
    if inputs is None or stored is None:
        return
    other = [name for name, digest in inputs.items() if stored.get(name) != digest]
    if other:
        raise _Damage(
            f"checkpoint {slot} (step {run['step']}) was trained on another {other[0]} than the "
            "one there now",
            slot,
            slot.parent / f"best-{run['best_step']}.safetensors",
            kind=STALE,
        )


def _check_kind(slot: Path, numbers: dict[str, Any], task: Resumable, optimizer: AdamW) -> None:
    """Raise OtherCheckpoint unless this program and this run can go on from a slot's numbers."""
    run = numbers["run"]
    named = f"checkpoint {slot} (step {run['step']})"
    fields_now = {field.name for field in fields(TrainState)}
    is_known = fields_now - SINCE <= run.keys() <= fields_now
    if numbers.get("format") != FORMAT or not is_known:
        writer = (
            f"MoleForge {numbers['version']}" if "version" in numbers else "an earlier MoleForge"
        )
        raise OtherCheckpoint(
            f"{named} was written by {writer}, which goes on from it; this one ({__version__}) "
            "cannot",
            remove=slot.parent,
        )
    dtype = numbers["dtype"]
    own = _dtype(task, optimizer)
    if dtype != own:
        raise OtherCheckpoint(
            f"{named} is of a training in {dtype}, and this one is in {own}",
            remove=slot.parent,
            setting=f"dtype: {dtype}",
        )


def _dtype(task: Resumable, optimizer: AdamW) -> str:
    """Return the arithmetic of a training, as the setting `dtype` names it."""
    return "bf16" if task.bf16 or optimizer.residual_bits else "fp32"


def _read_tensors(slot: Path, numbers: dict[str, Any]) -> dict[str, Tensor]:
    """Return a slot's tensors. Raises _Damage or UnreadableFile."""
    tensors = _verified_tensors(slot / TENSORS, numbers["sha256"], slot)
    run = TrainState(**numbers["run"])
    if run.best_sha256:
        # a slot that names a best state is good only together with it
        best = _best_path(slot.parent, run)
        _verify(best, run.best_sha256, slot, best)
    return tensors


def _check_tensors(
    slot: Path, tensors: dict[str, Tensor], task: Resumable, optimizer: AdamW
) -> None:
    """Raise OtherCheckpoint unless tensors are those that the task and its optimizer have."""
    stored = shapes(tensors)
    own = shapes(state_tensors(task, optimizer))
    for name in sorted(stored.keys() | own.keys()):
        if stored.get(name) != own.get(name):
            there = list(stored[name]) if name in stored else "absent"
            here = list(own[name]) if name in own else "absent"
            raise OtherCheckpoint(
                f"checkpoint {slot} is of other tensors than this training: {name} is {there} "
                f"there and {here} here; the settings and versions that wrote it go on from it",
                remove=slot.parent,
            )


def _read_numbers(slot: Path) -> dict[str, Any]:
    """Return what state.json holds after a check of its checksum. Raises _Damage or
    UnreadableFile."""
    path = slot / NUMBERS
    try:
        with reading(path, "checkpoint"):
            text = path.read_bytes()
    except FileNotFoundError:
        if slot.is_dir():
            # a kill in a save leaves this, and what was being written over was the older one
            raise _Damage(f"checkpoint {slot} was not finished: it has no {NUMBERS}") from None
        raise _Damage(f"checkpoint {slot} is a link that leads nowhere", slot) from None
    except NOT_A_SLOT as error:
        raise _Damage(f"checkpoint {path} is no file ({error.strerror})", slot) from None
    try:
        numbers = unsealed(text)
        if numbers["run"]["step"] >= 0:
            return numbers
        raise ValueError("its step is below 0")
    except (ValueError, KeyError, TypeError) as error:
        raise _Damage(
            f"checkpoint {path} is torn or its bytes have changed ({error})", slot
        ) from None


def _verified_tensors(path: Path, digest: str, *aside: Path) -> dict[str, Tensor]:
    """Return a file's tensors after a check of its bytes. Raises _Damage, which renames the paths
    `aside`, or UnreadableFile."""
    _verify(path, digest, *aside)
    try:
        with reading(path, "checkpoint"):
            return load_tensors(path)
    except (DamagedArtifact, OSError) as error:
        # its bytes are what was written, so only the way to them can be at fault
        raise UnreadableFile(f"checkpoint {error}", path=path) from None


def _verify(path: Path, digest: str, *aside: Path) -> None:
    """Raise _Damage, which renames the paths `aside`, unless a file has that sha256; or
    UnreadableFile."""
    try:
        with reading(path, "checkpoint"):
            found = sha256(path)
    except (FileNotFoundError, *NOT_A_SLOT) as error:
        raise _Damage(f"checkpoint {path} is gone ({error.strerror})", *aside) from None
    if found != digest:
        raise _Damage(
            f"checkpoint {path} is torn or its bytes have changed (sha256 differs)", *aside
        )


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
