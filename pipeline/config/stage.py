"""A row of a family's table of stages: all that the rest of the program knows of a stage.

The command line, plan, addresses, backends and modal_app.py read rows and nothing else, so a new
stage is one row and the function it names. Rows are light: a function is named, not imported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .base import Section, hashed_fields

# What a stage's function is called with and what it gives back; see families/__init__.py
Kind = Literal["files", "training", "report", "bundle"]


@dataclass(frozen=True)
class Stage:
    """One row. Of its fields, `name items when needs reads reads_also version` decide addresses."""

    name: str
    help: str
    function: str  # `module.name` in the family's package, imported when a job starts
    kind: Kind = "files"
    # function that looks, without reading it, whether what a job reads outside the store is there
    check: str = ""
    # property of the configuration with its jobs' names, may be dotted; none: the stage is one job
    items: str | None = None
    # property of the configuration: whether a stage that is one job has it; none: it always has
    when: str | None = None
    # stages whose artifacts a job reads, in order: every job of them
    needs: tuple[str, ...] = ()
    # those of `needs` of which a job reads only the one of its own item
    needs_own: tuple[str, ...] = ()
    # what its address holds of the configuration: sections, or dotted fields
    reads: tuple[str, ...] = ()
    # method of the configuration that returns, by item, what else: what is only part of a section
    reads_also: str | None = None
    # dotted name of a training's settings, for messages; `{item}` stands for the item
    settings: str | Callable[[str | None], str] = ""
    version: int = 1  # raised when the stage comes to mean something else
    in_run: bool = True  # False: only when asked for by name
    # section of `modal:` with its containers (a TrainerConfig may have a GPU); none: its own name
    machine: str | None = None
    secrets: tuple[str, ...] = ()  # purposes of the secrets that its containers get
    # stages that its command on Modal makes first, so that the first command of a run works
    after: tuple[str, ...] = ()

    def setting_name(self, item: str | None) -> str:
        """Return the dotted name of a training's settings, for messages."""
        if callable(self.settings):
            return self.settings(item)
        return self.settings.format(item=item)


def table(*rows: Stage) -> dict[str, Stage]:
    """Return rows by name, in the order in which a run does them."""
    return {row.name: row for row in rows}


def fields(cfg: Section, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return {key: value} as an address holds them, of sections and dotted fields."""
    return {key: _field(cfg, key) for key in keys}


def _field(cfg: Section, key: str) -> Any:
    """Return a section without its fields that are not hashed, or a dotted field whole."""
    section, _, name = key.partition(".")
    value = getattr(cfg, section)
    if name:
        value = getattr(value, name)
    if not isinstance(value, Section):
        return value
    # Named field by field, a section is meant with all that it has.
    if name:
        return value.model_dump(mode="json")
    return hashed_fields(value)
