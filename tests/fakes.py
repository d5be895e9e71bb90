"""A training small enough to run a hundred times, what tests compare stores by, and a volume
without Modal.

B rows, D inputs, H hidden units.
"""

import hashlib
import io
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from loopback_modal.volumes import View, Volume, open_below
from torch import nn

from pipeline.config.fit import FitConfig
from pipeline.config.run import RunConfig
from pipeline.errors import MissingArtifact, UnreadableFile
from pipeline.families import Parts
from pipeline.protocols import quiet
from pipeline.run.advice import CommandLine, sentence
from pipeline.store.artifacts import Manifest, inventory, load_tensors, sha256
from pipeline.store.history import History
from pipeline.train import loop
from pipeline.train.checkpoint import restore
from pipeline.train.loop import HistoryWriter, Task, TrainIO
from pipeline.train.optimizer import AdamW

TIMED = {"manifest.json", "made.json"}  # hold seconds, which no two runs share


def told(error):
    """Return an error as the command line tells it, with what to type next."""
    return sentence(error, CommandLine())


class Killed(BaseException):
    """Stands for the end of a process: nothing but the system sees it."""


class FakeRecorder(HistoryWriter):
    """A recorder that remembers."""

    def __init__(self):
        self.starts, self.rows, self.notes, self.taken = [], [], [], []

    def start(self, step):
        self.starts.append(step)

    def row(self, row):
        self.rows.append(row)

    def step_taken(self, step):
        self.taken.append(step)

    def note(self, text):
        self.notes.append(text)


@dataclass
class FolderParts(Parts):
    """What a family sees of earlier stages, from a plain directory."""

    cfg: RunConfig
    root: Path
    metrics: dict = field(default_factory=dict)  # by (stage, item), for those that have any
    progress = staticmethod(quiet)

    def path(self, stage, item=None):
        """Return where a job's files are or will be."""
        return self.root / "-".join(filter(None, (stage, item)))

    def new(self, stage, item=None):
        """Make a job's folder."""
        self.path(stage, item).mkdir(parents=True)
        return self.path(stage, item)

    def folder(self, stage, item=None):
        """Return the folder of a stage's files. Raises MissingArtifact."""
        path = self.path(stage, item)
        if not path.is_dir():
            raise MissingArtifact(f"{path} does not exist; run {stage}")
        return path

    def manifest(self, stage, item=None):
        """Return a manifest as the store has it: address, inventory and metrics."""
        folder = self.folder(stage, item)
        return Manifest(
            address=f"{folder.name}-0123456789ab",
            stage=stage,
            item=item,
            inputs={},
            files=inventory(folder),
            metrics=self.metrics.get((stage, item), {"seconds": 1.5}),
        )

    def file_sum(self, path, expected=""):
        """Return a file's sha256, read anew each time."""
        return sha256(path)

    def history(self, stage, item=None):
        """Return no rows: nobody keeps any here."""
        return History([])

    def tensors(self, stage, name, item=None):
        """Return the tensors of a file."""
        return load_tensors(self.folder(stage, item) / name)


def small_task(steps=10, noisy=True, **options):
    """Return a Task that fits a two-layer network to a fixed function; a noisy one draws random
    numbers in its loss."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8), nn.Linear(8, 1, bias=False)
    network = nn.Sequential(first, nn.Tanh(), second)

    def batch(at, count):
        x_BD = torch.stack(
            [torch.randn(4, generator=torch.Generator().manual_seed(at + i)) for i in range(count)]
        )
        return x_BD, (x_BD.sum(1, keepdim=True)).sin()

    def loss(rows):
        x_BD, wanted_B1 = rows
        x_BD = x_BD + 0.1 * torch.randn_like(x_BD) if noisy else x_BD
        return (network(x_BD) - wanted_B1).square().mean()

    held_out = batch(10_000, 32)

    def validate():
        with torch.no_grad():
            return (network(held_out[0]) - held_out[1]).square().mean().item()

    settings = {
        "steps": steps,
        "batch_sequences": 8,
        "lr": 1e-2,
        "warmup_steps": 2,
        "eval_every_steps": 3,
    } | options
    named = {"first": first.weight, "bias": first.bias, "second": second.weight}
    return Task(
        options=FitConfig(**settings),
        parameters=named,
        batch=batch,
        loss=loss,
        export=lambda _step: {},
        steps=steps,
        tokens_per_row=4,
        validate=validate,
        state={"seen": torch.zeros(1)},
    )


def in_bf16(task):
    """Return task with matrices that compute in bf16, as a bf16 training has them."""

    def under(compute):
        def computed(*args):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return compute(*args)

        return computed

    return replace(
        task, loss=under(task.loss), validate=under(task.validate), bf16_params=("first", "second")
    )


def train_io(folder, **changes):
    """Return where a small task keeps its checkpoints: one after every step."""
    settings = {"save_every_s": 1e-9, "log_every_steps": 1} | changes
    return TrainIO(Path(folder), FakeRecorder(), lambda: None, "train_shared", "trunk", **settings)


def dying(task, step, how=Killed):
    """Return task, to be ended when it comes to a step."""

    def before_step(at):
        if at == step:
            raise how

    return replace(task, before_step=before_step)


@contextmanager
def killed_at(step):
    """Run what trains and ends as if killed, once the checkpoint of a step is written."""
    real = loop.save

    def save(folder, task, optimizer, run):
        real(folder, task, optimizer, run)
        if run.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save)
        with pytest.raises(Killed):
            yield


def elsewhere(task):
    """Return task as a machine with less memory would go on with it: moments in bf16."""
    return replace(task, memory_plan=replace(task.memory_plan, moments="bf16"))


class FaultyReads:
    """Counts what is read below a folder, of names and of bytes, and lets one read fail as the
    system would; `at` is its number, `error` an errno."""

    def __init__(self, patch, folder):
        import safetensors.torch

        self.folder, self.seen, self.at, self.error = str(folder), 0, None, 0
        for module, name in ((os, "lstat"), (os, "stat"), (os, "scandir"), (os, "listdir")):
            patch.setattr(module, name, self._watched(getattr(module, name)))
        patch.setattr(safetensors.torch, "load_file", self._watched(safetensors.torch.load_file))
        patch.setattr(io, "open", self._opened(io.open))

    def fail(self, at, error):
        """Begin to count again; read number `at` is the one that fails."""
        self.seen, self.at, self.error = 0, at, error

    def _fails(self, path):
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(self.folder):
            return False
        self.seen += 1
        return self.seen - 1 == self.at

    def _refused(self, path):
        return OSError(self.error, os.strerror(self.error), str(path))

    def _watched(self, real):
        def call(path=".", *args, **more):
            if self._fails(path):
                raise self._refused(path)
            return real(path, *args, **more)

        return call

    def _opened(self, real):
        def call(path, mode="r", *args, **more):
            if "r" in mode and self._fails(path):
                raise self._refused(path)
            file = real(path, mode, *args, **more)
            # the second chance of a file to fail: it opens, and its bytes do not come
            if mode == "rb" and self._fails(path):
                file.close()
                return io.BufferedReader(_Failing(self._refused(path)))
            return file

        return call


class _Failing(io.RawIOBase):
    """A file whose bytes the disk does not give."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def readable(self):
        """Say that reading may be tried."""
        return True

    def readinto(self, _buffer):
        """Fail."""
        raise self.error


def unreadable(folder, task, patch, error):
    """Let each read of restoring `task` from `folder` fail in turn; return how many there are.

    Each must end in UnreadableFile that says why, with every file as it was.
    """
    before = inventory(folder)
    optimizer = AdamW(task.parameters, task.options, task.bf16_params)
    with patch.context() as patched:
        reads = FaultyReads(patched, folder)
        for at in range(1000):
            reads.fail(at, error)
            said = None
            try:
                restore(folder, task, optimizer, print)
            except UnreadableFile as unreadable:
                said = unreadable
            reads.fail(None, 0)
            if said is None:
                return at
            assert inventory(folder) == before
            assert os.strerror(error) in str(said)
            assert str(folder) in str(said)
            assert "nothing was changed" in told(said)
    raise AssertionError("a thousand reads")


def values(task):
    """Return a copy of a task's parameters by name."""
    return {name: p.detach().clone() for name, p in task.parameters.items()}


def equal(one, other):
    """Whether two dicts of tensors are the same bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def contents(store_path):
    """Return {artifact/file: sha256} of every file of every artifact, less those that hold
    seconds."""
    root = Path(store_path) / "artifacts"
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        # the report itself has them too, the one in a bundle has not
        timed = path.name in TIMED or (name.startswith("evaluate-") and "report." in name)
        if path.is_file() and not timed:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def traces(store_path):
    """Return {file: (modified, inode)} of everything in a store."""
    files = sorted(p for p in Path(store_path).rglob("*") if p.is_file())
    return {p.as_posix(): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}


# What a file of JSON may hold instead; none of it is an object with what belongs there.
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"7",
    b"null",
    b'"text"',
    b'{"format": NaN}',
    b'{"format": -Infinity}',
    b'{"format": 1e999}',
    b'{"format": ' + b"9" * 5000 + b"}",
    b'{"format": 1, "format": 1}',
    b'{"format":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[" * 100_000,
    b'{"format": "\xff"}',
    b"\xef\xbb\xbf{}",
    '{"format": 1}'.encode("utf-16"),
    b"\0" * 64,
]


def flip(path, at=None):
    """Change one bit of a file, in the middle unless told where."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


class StubbedVolume:
    """A Modal volume without Modal: `view` gives what one container sees of it."""

    def __init__(self, folder):
        self._volume, self._views = Volume("vo-1", "stub", Path(folder) / "volume", version=2), 0

    @property
    def path(self):
        """Where what was committed is."""
        return self._volume.path

    def view(self):
        """Return a container's view: all that is committed now, nothing that comes later before a
        reload."""
        self._views += 1
        return StubbedView(View(self._volume, self.path.parent / f"view{self._views}"))


class StubbedView:
    """A container's side of a stubbed volume: commit publishes, reload takes over and refuses open
    or mapped files."""

    def __init__(self, view):
        self._view, self.path, self.commits, self.reloads = view, view.path, 0, 0

    def commit(self):
        """Let others see what was written here."""
        self.commits += 1
        self._view.commit()

    def reload(self):
        """See what others have committed. Raises RuntimeError, as Modal does, when this process has
        a file open."""
        held = open_below(self.path, [os.getpid()])
        if held:
            raise RuntimeError(f"there are open files preventing the operation: {', '.join(held)}")
        self.reloads += 1
        self._view.reload()
