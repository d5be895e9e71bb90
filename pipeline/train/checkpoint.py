"""Two slots per run in progress: a torn or damaged write never costs the last good state.

A slot is state.safetensors, then state.json with its sha256 and a seal over itself; a slot that
does not match is removed when it is found, so that the good one is never the one that the next save
writes over. The best state is a file beside them that a slot names, so that it takes no memory; it
goes when no slot names it any more.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

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


@dataclass
class TrainState:
    """Everything about a run in progress that is not a tensor of the task."""

    step: int = 0
    evaluated_step: int = -1
    valid_nats: float | None = None
    best_nats: float | None = None
    best_step: int | None = None
    waits: int = 0
    tail: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)
    saved_step: int = 0
    micro: int = 0  # rows of a forward pass; 0: none was made yet
    most: int = 0  # what micro may still grow to
    best_sha256: str = ""  # of the file that holds the best state; empty: none is kept

    def evaluated(self, nats: float) -> bool:
        """Take note of a validation loss; return whether it is the best so far."""
        self.evaluated_step, self.valid_nats = self.step, nats
        better = self.best_nats is None or nats < self.best_nats
        if better:
            self.best_nats, self.best_step, self.waits = nats, self.step, 0
        else:
            self.waits += 1
        return better


def save_best(folder: Path, task, optimizer: AdamW, run: TrainState) -> None:
    """Write the parameters as the run's best state. Raises DiskFull or StoreError."""
    path = _best(folder, run)
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, _parameters(task, optimizer))
    run.best_sha256 = sha256(path)


def load_best(folder: Path, task, run: TrainState) -> None:
    """Put the best state back into the task's fp32 parameters, when one is kept and it is not the
    current one.

    Raises DamagedArtifact.
    """
    if not run.best_sha256 or run.best_step == run.step:
        return
    kinds = _by_kind(_whole(_best(folder, run), run.best_sha256))
    with torch.no_grad():
        for name, high in kinds["parameter"].items():
            low = kinds.get("low", {}).get(name)
            best = high if low is None else merge(high.view(-1), low.view(-1)).view_as(high)
            task.parameters[name].copy_(best)


def _best(folder: Path, run: TrainState) -> Path:
    return folder / f"best-{run.best_step}.safetensors"


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a part file, flush it, then rename it."""
    part = path.with_name(f"{path.name}.part")
    try:
        save_tensors(part, tensors)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(part)
    part.replace(path)


def save(folder: Path, task, optimizer: AdamW, run: TrainState) -> None:
    """Write the older slot: part file, flush, rename, then its state.json. Raises DiskFull or
    OSError."""
    slot = folder / SLOTS[0 if _step_of(folder / SLOTS[0]) <= _step_of(folder / SLOTS[1]) else 1]
    (slot / "state.json").unlink(missing_ok=True)  # first: without it the rest is no checkpoint
    shutil.rmtree(
        slot, ignore_errors=True
    )  # with it go the temporary files of a save that was killed
    slot.mkdir(parents=True, exist_ok=True)
    _write(slot / "state.safetensors", _gather(task, optimizer))
    run.saved_step = run.step
    raw = {"sha256": sha256(slot / "state.safetensors"), "run": asdict(run)}
    write_text(slot / "state.json", json.dumps(raw | {"seal": _seal(raw)}))
    _forget(folder, run)


def _forget(folder: Path, run: TrainState) -> None:
    """Remove best states that neither a slot nor the run in hand names."""
    named = {_best(folder, run).name}
    for name in SLOTS:
        with suppress(DamagedArtifact):
            named.add(f"best-{_state(folder / name)['run']['best_step']}.safetensors")
    for path in folder.glob("best-*"):
        if path.name not in named:
            path.unlink()


def restore(folder: Path, task, optimizer: AdamW, note: Callable[[str], None]) -> TrainState | None:
    """Load the newest good slot into task and optimizer; removes damaged ones and tells by `note`
    what that costs."""
    slots = [folder / name for name in SLOTS if (folder / name).exists()]
    run, damage = None, []
    for slot in sorted(
        slots, key=lambda s: (_step_of(s) >= 0, -_step_of(s))
    ):  # unreadable ones first
        if run:
            break
        try:
            raw, tensors = _read(slot, task, optimizer)
        except DamagedArtifact as error:
            damage.append(error)
            shutil.rmtree(slot)
            continue
        run = TrainState(**raw["run"])
        _scatter(tensors, task, optimizer, run)
    for error in damage:
        note(
            f"{error}; going on from the other one, step {run.step}"
            if run
            else f"{error}; starting over at step 0"
        )
    return run


def _read(slot: Path, task, optimizer: AdamW) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return a slot's numbers and tensors. Raises DamagedArtifact."""
    raw = _state(slot)
    tensors = _whole(slot / "state.safetensors", raw["sha256"])
    same = _shapes(tensors) == _shapes(_gather(task, optimizer))
    if not same or raw["run"].keys() != {f.name for f in fields(TrainState)}:
        raise DamagedArtifact(
            f"checkpoint {slot} was written in another dtype or by another version of this program"
        )
    run = TrainState(**raw["run"])
    if run.best_sha256:
        _whole(_best(slot.parent, run), run.best_sha256)
    return raw, tensors


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Return what a checkpoint must have in common with the task that it is for; moments may be of
    another kind."""
    kinds = {name: name.partition("/")[0] for name in tensors}
    return {
        n: t.shape
        for n, t in tensors.items()
        if kinds[n] != "generator" and not kinds[n].endswith(SCALE)
    }


def _whole(path: Path, digest: str) -> dict[str, torch.Tensor]:
    """Return a file's tensors after a check of its bytes. Raises DamagedArtifact."""
    try:
        whole = sha256(path) == digest
    except OSError as error:
        raise DamagedArtifact(f"checkpoint {path} cannot be read ({error.strerror})") from None
    if not whole:
        raise DamagedArtifact(
            f"checkpoint {path} is torn or its bytes have changed (sha256 differs)"
        )
    return load_tensors(path)


def _state(slot: Path) -> dict:
    """Return what state.json holds after a check of its seal. Raises DamagedArtifact."""
    path = slot / "state.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
        if raw.pop("seal") == _seal(raw):
            return raw
    except FileNotFoundError:
        raise DamagedArtifact(f"checkpoint {slot} was not finished: it has no state.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"checkpoint {path} cannot be read ({error})") from None
    raise DamagedArtifact(f"checkpoint {path} is torn or its bytes have changed (its seal differs)")


def _seal(raw: dict) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _step_of(slot: Path) -> int:
    """Return the step of a slot; -1 when it is absent or unreadable (then it is the one to write
    over)."""
    try:
        return _state(slot)["run"]["step"]
    except DamagedArtifact:
        return -1


def _parameters(task, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """Return the masters by name, those that compute in bf16 in two halves."""
    low = {f"low/{name}": tensor for name, tensor in optimizer.residual_bits.items()}
    return {f"parameter/{n}": p.detach() for n, p in task.parameters.items()} | low


def _gather(task, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """Collect at save time everything the next step depends on, by name."""
    out = _parameters(task, optimizer) | optimizer.tensors() | _named_state(task)
    out["generator/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        out["generator/cuda"] = torch.cuda.get_rng_state()
    return out


def _named_state(task) -> dict[str, torch.Tensor]:
    return {f"state/{n}": t for n, t in task.state.items()}


def _scatter(tensors: dict[str, torch.Tensor], task, optimizer: AdamW, run: TrainState) -> None:
    kinds = _by_kind(tensors)
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(kinds["parameter"][name])
        for name, tensor in task.state.items():
            tensor.copy_(kinds["state"][name])
        optimizer.load(kinds, run.step)
    torch.set_rng_state(kinds["generator"]["cpu"])
    if "cuda" in kinds["generator"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(kinds["generator"]["cuda"])


def _by_kind(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = tensor
    return kinds
