"""Where each value of a YAML or JSON text stands in it, by ruamel's own events.

ruamel can write a file again with its comments, but in its own layout: columns, quotes and numbers
move. So texts are changed where a change is and nowhere else, and this says where that is.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from .files import parse_yaml

MERGE = "<<"


@dataclass
class NodeEntry:
    """An item of a sequence, or a key of a mapping with its value."""

    key: Any
    start: int  # of the key, or of the item
    value: "Node"

    @property
    def end(self) -> int:
        """Where its value ends."""
        return self.value.end


@dataclass
class Node:
    """A value, from `start` up to `end`, comments behind it left out."""

    kind: Literal["scalar", "alias", "sequence", "mapping"]
    start: int
    end: int
    is_flow: bool = True  # between brackets, or on one line: nothing of it depends on columns
    anchor: str | None = None  # its own; of an alias the one that it stands for
    entries: list[NodeEntry] = field(default_factory=list)

    def entry(self, key: Any) -> NodeEntry | None:
        """Return the entry of a key that the mapping itself states."""
        return next((each for each in self.entries if each.key == key), None)


def nodes(text: str, is_json: bool) -> Node:
    """Return the tree of a text that holds one document. Raises YAMLError or ValueError."""
    if is_json:
        # YAML has no tabs between values; in JSON they stand nowhere else
        text = text.replace("\t", " ")
    events = YAML(typ="safe", pure=True).parse(text)
    wanted = (each for each in events if isinstance(each, NodeEvent | _ENDS))
    first = next(wanted, None)
    if first is None:
        raise ValueError("it states nothing")
    return _EventReader(text, is_json, wanted).node(first, 0)


_ENDS = MappingEndEvent | SequenceEndEvent


@dataclass
class _EventReader:
    text: str
    is_json: bool
    events: Iterator[Event]

    def node(self, first: Event, after: int) -> Node:
        """Return the value that begins with an event; `after` is where what is before it ends."""
        start = first.start_mark.index
        end = first.end_mark.index
        match first:
            case AliasEvent():
                return Node("alias", start, end, anchor=first.anchor)
            case ScalarEvent():
                return self._scalar(first, start, end, after)
            case SequenceStartEvent():
                return self._collection(first, start, "sequence")
            case MappingStartEvent():
                return self._collection(first, start, "mapping")
        raise YAMLError(f"unexpected {type(first).__name__}")

    def _scalar(self, first: ScalarEvent, start: int, end: int, after: int) -> Node:
        if start == end:
            # Nothing is written there, and the mark is that of what follows
            start = end = after
        elif first.style in ("|", ">"):
            end = start + len(self.text[start:end].rstrip())
        return Node("scalar", start, end, first.style not in ("|", ">"), first.anchor)

    def _collection(
        self,
        first: SequenceStartEvent | MappingStartEvent,
        start: int,
        kind: Literal["sequence", "mapping"],
    ) -> Node:
        found = Node(kind, start, start, bool(first.flow_style), first.anchor)
        while True:
            event = next(self.events)
            if isinstance(event, _ENDS):
                break
            found.entries.append(self._entry(event, kind))
        last = found.entries[-1].end if found.entries else start
        # The end of a block's event is where the next thing begins, behind comments
        found.end = event.end_mark.index if found.is_flow else last
        return found

    def _entry(self, event: Event, kind: str) -> NodeEntry:
        start = event.start_mark.index
        if kind == "sequence":
            return NodeEntry(None, start, self.node(event, start))
        key = self.node(event, start)
        name = self._plain(self.text[key.start : key.end])
        colon = self.text.find(":", key.end) + 1
        return NodeEntry(name, start, self.node(next(self.events), max(colon, key.end)))

    def _plain(self, text: str) -> Any:
        """Return a key as the reader of whole files has it."""
        try:
            return json.loads(text) if self.is_json else parse_yaml(text)
        except (YAMLError, ValueError):
            return text
