"""Two slots per run in progress: a torn or damaged write never costs the last good state.

A slot is state.safetensors, then state.json with its sha256 and a seal over itself; a slot that does not match is
removed when it is found, so that the good one is never the one that the next save writes over.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from .errors import DamagedArtifact
from .store import flush, load_tensors, save_tensors, sha256, write_text

SLOTS = ("a", "b")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """Everything about a run in progress that is not a tensor of the task."""

    step: int = 0
    evaluated_step: int = -1
    valid_nats: float | None = None
    best_nats: float | None = None
    best_step: int | None = None
    waits: int = 0
    tail: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    saved_step: int = 0
    best: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def evaluated(self, nats: float, parameters: dict[str, torch.Tensor], keep: str) -> None:
        """Take note of a validation loss; keeps a copy of the parameters when it is the best so far."""
        self.evaluated_step, self.valid_nats = self.step, nats
        if self.best_nats is None or nats < self.best_nats:
            self.best_nats, self.best_step, self.waits = nats, self.step, 0
            self.best = {n: p.clone() for n, p in parameters.items()} if keep == "best" else {}
        else:
            self.waits += 1

    def restore_best(self, task) -> None:
        """Put the best state back into the task's parameters, when one is kept and it is not the current one."""
        if self.best and self.best_step != self.step:
            with torch.no_grad():
                for name, tensor in self.best.items():
                    task.parameters[name].copy_(tensor)


def save(folder: Path, task, optimizer: torch.optim.Optimizer, run: Progress) -> None:
    """Write the older slot: part file, flush, rename, then its state.json. Raises DiskFull or OSError."""
    slot = folder / SLOTS[0 if _step_of(folder / SLOTS[0]) <= _step_of(folder / SLOTS[1]) else 1]
    (slot / "state.json").unlink(missing_ok=True)  # first: without it the rest is no checkpoint
    shutil.rmtree(slot, ignore_errors=True)  # with it go the temporary files of a save that was killed
    slot.mkdir(parents=True, exist_ok=True)
    part = slot / "state.safetensors.part"
    try:
        save_tensors(part, _gather(task, optimizer, run))
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(part)
    part.replace(slot / "state.safetensors")
    run.saved_step = run.step
    numbers = {k: v for k, v in asdict(_without_best(run)).items() if k != "best"}
    raw = {"sha256": sha256(slot / "state.safetensors"), "run": numbers}
    write_text(slot / "state.json", json.dumps(raw | {"seal": _seal(raw)}))


def restore(folder: Path, task, optimizer: torch.optim.Optimizer, note: Callable[[str], None]) -> Progress | None:
    """Load the newest good slot into task and optimizer; removes damaged ones and tells by `note` what that costs."""
    slots = [folder / name for name in SLOTS if (folder / name).exists()]
    run, damage = None, []
    for slot in sorted(slots, key=lambda s: (_step_of(s) >= 0, -_step_of(s))):  # unreadable ones first
        if run:
            break
        try:
            raw, tensors = _read(slot, task)
        except DamagedArtifact as error:
            damage.append(error)
            shutil.rmtree(slot)
            continue
        run = Progress(**raw["run"])
        _scatter(tensors, task, optimizer, run)
    for error in damage:
        note(f"{error}; going on from the other one, step {run.step}" if run else f"{error}; starting over at step 0")
    return run


def _read(slot: Path, task) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return a slot's numbers and tensors. Raises DamagedArtifact."""
    raw, path = _state(slot), slot / "state.safetensors"
    try:
        whole = sha256(path) == raw["sha256"]
    except OSError as error:
        raise DamagedArtifact(f"checkpoint {path} cannot be read ({error.strerror})") from None
    if not whole:
        raise DamagedArtifact(f"checkpoint {path} is torn or its bytes have changed (sha256 differs)")
    tensors = load_tensors(path)
    wanted = {**{f"parameter/{n}": p for n, p in task.parameters.items()}, **_named_state(task)}
    same = all(key in tensors and tensors[key].shape == t.shape for key, t in wanted.items())
    if not same or raw["run"].keys() != {f.name for f in fields(Progress)} - {"best"}:
        raise DamagedArtifact(f"checkpoint {slot} was written by another version of this program")
    return raw, tensors


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
    """Return the step of a slot; -1 when it is absent or unreadable (then it is the one to write over)."""
    try:
        return _state(slot)["run"]["step"]
    except DamagedArtifact:
        return -1


def _without_best(run: Progress) -> Progress:
    return Progress(**{k: v for k, v in vars(run).items() if k != "best"})


def _gather(task, optimizer, run: Progress) -> dict[str, torch.Tensor]:
    """Collect at save time everything the next step depends on, by name."""
    out = {f"parameter/{n}": p.detach() for n, p in task.parameters.items()}
    for name, parameter in task.parameters.items():
        moments = optimizer.state.get(parameter, {})
        out |= {f"{key}/{name}": moments[key] for key in MOMENTS if key in moments}
    out |= {f"best/{n}": t for n, t in run.best.items() if run.best_step != run.step}
    out |= _named_state(task)
    out["generator/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        out["generator/cuda"] = torch.cuda.get_rng_state()
    return out


def _named_state(task) -> dict[str, torch.Tensor]:
    return {f"state/{n}": t for n, t in task.state.items()}


def _scatter(tensors: dict[str, torch.Tensor], task, optimizer, run: Progress) -> None:
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = tensor
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(kinds["parameter"][name])
            if name in kinds.get("exp_avg", {}):
                optimizer.state[parameter] = {k: _like(kinds[k][name], parameter, k) for k in MOMENTS}
        for name, tensor in task.state.items():
            tensor.copy_(kinds["state"][name])
    current = {n: p.detach().clone() for n, p in task.parameters.items()} if run.best_step == run.step else {}
    run.best = kinds.get("best", current)
    torch.set_rng_state(kinds["generator"]["cpu"])
    if "cuda" in kinds["generator"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(kinds["generator"]["cuda"])


def _like(tensor: torch.Tensor, parameter: torch.Tensor, key: str) -> torch.Tensor:
    return tensor if key == "step" and parameter.device.type == "cpu" else tensor.to(parameter.device)
