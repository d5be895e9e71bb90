"""Errors as sentences for whoever typed a command: what is wrong, and what to type next.

An error knows no command. An edge (the command line, Modal) says what its commands are, and
`sentence` puts both together, the same way for every edge.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import (
    CannotStart,
    DamagedArtifact,
    DiskFull,
    JobsFailed,
    MismatchError,
    MissingArtifact,
    OtherCheckpoint,
    StaleArtifact,
    StoreError,
    TrialsFailed,
    UnreadableFile,
)
from .stages import first_few, label

_MOST_LINES = 12
_SHOWN = 4  # jobs that are named of those that one thing keeps from starting


class Edge(Protocol):
    """Where a command was typed: how the same things are said there."""

    def stage(self, name: str) -> str:
        """The command that does a stage, less its options."""

    def remove(self, path: Path) -> str:
        """How something in the store is removed, as an imperative."""

    def make_room(self) -> str:
        """How room is made in the store, as an imperative."""

    def other_store(self) -> str:
        """How another store is chosen, as an imperative."""


class CommandLine:
    """`python -m pipeline` on this machine."""

    def stage(self, name: str) -> str:
        """The command that does a stage, less its options."""
        return f"`python -m pipeline {name}`"

    def remove(self, path: Path) -> str:
        """How something in the store is removed, as an imperative."""
        return f"remove {path}"

    def make_room(self) -> str:
        """How room is made in the store, as an imperative."""
        return (
            "make room (`python -m pipeline runs` lists what each run takes, `rm` removes one, "
            "`prune` what none needs) or choose another directory with --store"
        )

    def other_store(self) -> str:
        """How another store is chosen, as an imperative."""
        return "choose another directory with --store"


def sentence(error: Exception, edge: Edge, again: str = "") -> str:
    """Return what an error says and what to type next; `again` is the command that was typed."""
    text = str(error)
    if isinstance(error, JobsFailed):
        failed = {item: f"failed: {sentence(each, edge)}" for item, each in error.failed.items()}
        return account(error.stage, failed, error.items, again)
    if isinstance(error, TrialsFailed):
        lines = [f"{text}; the others are kept, and the tables say all of it:"]
        lines += [f"  {name}: {why}" for name, why in error.failed.items()]
        lines.append(f"To do the missing ones, mend the cause and run again: {again}")
        return "\n".join(lines)
    if isinstance(error, CannotStart):
        lines = [f"{text}:"]
        for cause, jobs in error.causes[:_MOST_LINES]:
            # Of one that is of the whole run there are none
            before = f"{first_few(jobs, _SHOWN)}: " if jobs else ""
            lines.append(f"  {before}{sentence(cause, edge)}")
        if len(error.causes) > _MOST_LINES:
            lines.append(f"  and {len(error.causes) - _MOST_LINES} more")
        return "\n".join(lines)
    if isinstance(error, MissingArtifact) and error.stages:
        commands = " and ".join(edge.stage(name) for name in error.stages)
        return f"{text}: run {commands} with this configuration first"
    if isinstance(error, StaleArtifact):
        commands = " and then ".join(edge.stage(name) for name in error.stages)
        return f"{text}; run {commands} again"
    if isinstance(error, DamagedArtifact) and error.remove:
        if error.stage:
            remake = f"{edge.remove(error.remove)} and run {edge.stage(error.stage)} again"
            return f"{text}; {', or '.join(filter(None, (remake, error.remedy)))}"
        remake = f"{edge.remove(error.remove)} and run the same command to make it again"
        other = edge.other_store() if error.root else ""
        return f"{text}; {', or '.join(filter(None, (remake, other)))}"
    if isinstance(error, DamagedArtifact) and error.stage:
        return f"{text}; run {edge.stage(error.stage)} again"
    if isinstance(error, MismatchError) and error.remove:
        return f"{text}: {edge.remove(error.remove)} and run {edge.stage(error.stage)} again"
    if isinstance(error, MismatchError) and error.stage:
        return f"{text}: run {edge.stage(error.stage)} again"
    if isinstance(error, DiskFull):
        kept = "What was finished is kept"
        way = edge.make_room() if error.in_store else "make room there"
        return f"{text}. {kept}: {way}, then run the same command again"
    if isinstance(error, UnreadableFile):
        return f"{text}; nothing was changed: mend the cause and run the same command again"
    if isinstance(error, OtherCheckpoint):
        way = f"set {error.setting} to go on from it" if error.setting else ""
        start_over = f"{edge.remove(error.remove)} to start over at step 0"
        return f"{text}; {', or '.join(filter(None, (way, start_over)))}"
    # Last, as most of the above are StoreErrors too
    if isinstance(error, StoreError) and error.root:
        remedies = [error.remedy, edge.other_store()]
        return f"{text}; {', or '.join(filter(None, remedies))}"
    return text


def account(
    stage: str, failed: Mapping[str | None, str], items: Sequence[str | None], again: str
) -> str:
    """Return a line for every job of a stage, and what does the missing ones."""
    # Those that are done stay done: whoever runs the command again pays for the missing ones alone
    finished = len(items) - len(failed)
    lines = [f"{finished} of {len(items)} jobs of {stage} are finished and kept:"]
    for item in items:
        lines.append(f"  {label(stage, item)}: {failed.get(item, 'finished')}")
    lines.append(f"To do the missing ones, mend the cause and run again: {again}")
    return "\n".join(lines)
