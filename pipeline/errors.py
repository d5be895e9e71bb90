"""Everything the pipeline raises on purpose.

PipelineError                what a person can act on; the command line prints it and exits with 2
├── ConfigError              the configuration does not describe a run
├── DataError                documents, tokenizer or shards are not what was asked for
│   └── TooLong              a request is longer than what a model reads
├── StoreError               the store cannot be read or written
│   ├── MissingArtifact      an earlier stage has not been run
│   ├── DamagedArtifact      a file is torn or its bytes have changed
│   ├── UnreadableFile       the system does not let a file be read, whatever is in it
│   ├── OtherCheckpoint      a whole checkpoint that this run cannot go on from
│   ├── OldStore             written by an earlier version, in a layout that is no longer read
│   ├── NewerStore           written by a later version of this program
│   └── DiskFull             no room for what is being written
├── MismatchError            parts that were not made for each other
│   └── StaleArtifact        made on an input that was made again since
├── NotFiniteError           the loss became NaN or infinite
├── GivenUp              a training was ended before its time, as others do better
├── BudgetError              no way of running a job fits into the memory budget
├── CannotStart              what is known of a run before it starts keeps jobs of it from starting
├── JobsFailed               some jobs of a stage ended badly, the others are kept
└── TrialsFailed             some trials of experiments have no model, or no score; the others do
Interrupted                  asked to stop; state is saved; the command line exits with 130
└── LeaseLost                another machine may be at the same job by now; state is saved

The text of an error says what is wrong. What to type then depends on where a person types it, so
errors carry fields and the edges make the sentence (run/advice.py).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .credentials import masked

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def plain(text: Any) -> Any:
    """Return a text without credentials, and without the addresses of objects, which libraries put
    into theirs: they differ from run to run, and tell a stranger of this process's memory. Other
    values stay."""
    return masked(_ADDRESS.sub("", text)) if isinstance(text, str) else text


class PipelineError(Exception):
    """Base of the errors a person can act on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*[plain(value) for value in args])

    def __reduce__(self) -> tuple:
        # Errors travel between processes. Exception would make them again from their text alone,
        # which leaves out keyword arguments.
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[PipelineError], args: tuple, fields: dict) -> PipelineError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigError(PipelineError):
    """The configuration does not describe a run."""


class DataError(PipelineError):
    """Documents, tokenizer or shards are not what was asked for."""


class TooLong(DataError):
    """A request is longer than what a model reads: a shorter one is a way out."""


class StoreError(PipelineError):
    """The store cannot be read or written.

    `root` is set where another store is a way out, `remedy` where there is one beside it.
    """

    def __init__(self, text: str, *, root: Path | None = None, remedy: str = "") -> None:
        super().__init__(text)
        self.root = root
        self.remedy = remedy


class MissingArtifact(StoreError):
    """An earlier stage has not been run: one of `stages`, where they are known."""

    def __init__(self, text: str, *, address: str = "", stages: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.address = address
        self.stages = stages


class DamagedArtifact(StoreError):
    """A file is torn or its bytes have changed.

    `remove` is what to make again, `stage` what makes it where that is not the command that met the
    error; `remedy` is another way than to make it again, `root` is set where another store is one.
    """

    def __init__(
        self,
        text: str,
        *,
        remove: Path | None = None,
        stage: str = "",
        remedy: str = "",
        root: Path | None = None,
    ) -> None:
        super().__init__(text, root=root, remedy=remedy)
        self.remove = remove
        self.stage = stage


class UnreadableFile(StoreError):
    """The system does not let a file be read: rights, a fault of the disk, a stale mount, too many
    open files. What is in it may be as good as ever, so nobody may take it for damaged."""

    def __init__(self, text: str, *, path: Path | None = None) -> None:
        super().__init__(text)
        self.path = path


class OtherCheckpoint(StoreError):
    """A whole checkpoint that this run cannot go on from; `setting` is what continues it, where
    there is one, `remove` what to remove to start over."""

    def __init__(self, text: str, *, remove: Path, setting: str = "") -> None:
        super().__init__(text)
        self.remove = remove
        self.setting = setting


class OldStore(StoreError):
    """The store was written by an earlier version, in a layout that is no longer read."""


class NewerStore(StoreError):
    """The store was written by a later version of this program."""


class DiskFull(StoreError):
    """There is no room for `path`; with `in_store` it is the store that is full."""

    def __init__(self, text: str, *, path: Path | None = None, in_store: bool = False) -> None:
        super().__init__(text)
        self.path = path
        self.in_store = in_store


class MismatchError(PipelineError):
    """Parts that were not made for each other; `stage` makes one again, after `remove` was removed
    where that is set."""

    def __init__(self, text: str, *, remove: Path | None = None, stage: str = "") -> None:
        super().__init__(text)
        self.remove = remove
        self.stage = stage


class StaleArtifact(MismatchError):
    """A whole artifact that was made on an input which was made again since; `stages` make it and
    what it reads again, in order."""

    def __init__(self, text: str, *, address: str, stages: tuple[str, ...]) -> None:
        super().__init__(text)
        self.address = address
        self.stages = stages


class NotFiniteError(PipelineError):
    """The loss became NaN or infinite."""


class GivenUp(PipelineError):
    """A training was ended before its time, as others do better; what it saved is kept."""


class BudgetError(PipelineError):
    """No way of running a job fits into the memory budget.

    `smallest_bytes` is the least budget that works, `why` the text without the job's name, for who
    tells of several jobs.
    """

    def __init__(self, name: str, why: str, *, smallest_bytes: int) -> None:
        super().__init__(f"{name} {why}")
        self.why = why
        self.smallest_bytes = smallest_bytes


class CannotStart(PipelineError):
    """What is known of a run before it starts keeps jobs of it from starting.

    `causes` has each error with the names of the jobs it keeps, none where it is of the whole run.
    """

    def __init__(
        self, text: str, *, causes: Sequence[tuple[Exception, Sequence[str]]] = ()
    ) -> None:
        super().__init__(text)
        self.causes = tuple(causes)


class JobsFailed(PipelineError):
    """Some jobs of a stage ended badly; the others are kept.

    `failed` holds the error of each by its item, `items` are all of them.
    """

    def __init__(
        self,
        stage: str,
        items: Sequence[str | None],
        failed: Mapping[str | None, Exception],
    ) -> None:
        super().__init__(f"{len(failed)} of {len(items)} jobs of {stage} failed")
        self.stage = stage
        self.items = items
        self.failed = failed


class TrialsFailed(PipelineError):
    """Some trials of experiments have no model or no score; the others are kept and told.

    `failed` has why by what each is called.
    """

    def __init__(self, trials: int, failed: Mapping[str, str]) -> None:
        super().__init__(f"{len(failed)} of {trials} trials failed")
        self.failed = failed


class Interrupted(BaseException):
    """Asked to stop; the state is saved and the same command goes on from it."""


class LeaseLost(Interrupted):
    """A job may be another machine's by now, which goes on from the state that is saved."""
