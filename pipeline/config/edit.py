"""A YAML or JSON text made to say something else, and changed nowhere but there.

Comments, order, quotes, anchors and layout stay as they are. What is added and taken away again
leaves the same bytes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from ruamel.yaml.error import YAMLError

from .files import parse_text, parse_yaml
from .yaml_nodes import MERGE, Node, NodeEntry, nodes

WIDE = 96  # columns that a list may take in one line
STEP = "  "  # of what is new
# No `?`, which YAML 1.2 has within a word, and PyYAML, with which others read the file, has not
_PLAIN = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./@:~+* -]*")
_MISSING = object()


class NotEditable(ValueError):
    """A text says it in a way (an anchor that is merged, say) that leaves no place to change it."""


def edited(text: str, wanted: dict, is_json: bool) -> str:
    """Return a text that says what is wanted, with as little of it changed as that takes.

    Raises NotEditable, and what reading the text raises.
    """
    before = parse_text(text, is_json)
    edit = _Edit(text, is_json)
    root = nodes(text, is_json)
    edit.change(root, before, wanted)
    edit.write_aliases_out(root, wanted)
    after = edit.result()
    try:
        found = parse_text(after, is_json)
    except (YAMLError, ValueError):
        found = _MISSING
    if not _same(found, wanted):
        raise NotEditable("it cannot be changed there without moving what else it says")
    return after


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of the same types: 1 is not true, nor 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


@dataclass
class _Edit:
    text: str
    is_json: bool
    splices: list[tuple[int, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.newline = "\r\n" if "\r\n" in self.text else "\n"

    def result(self) -> str:
        """Return the text with everything changed."""
        out = []
        at = 0
        # Stable: of two at one place the inner one was asked for first
        for start, end, new in sorted(self.splices, key=lambda each: each[0]):
            out += [self.text[at:start], new]
            at = max(at, end)
        text = "".join([*out, self.text[at:]])
        # Where the last line had no end of its own, the one that is the last now has none either
        return text if self.text.endswith("\n") else text.removesuffix(self.newline)

    def change(self, node: Node, before: Any, wanted: Any) -> None:
        """Make a value one that is wanted."""
        # An alias may go on standing for its anchor, which shows at the end
        if node.kind == "alias" or _same(before, wanted):
            return
        done = False
        if node.kind == "mapping" and isinstance(before, dict) and isinstance(wanted, dict):
            done = self._change_mapping(node, before, wanted)
        if node.kind == "sequence" and isinstance(before, list) and isinstance(wanted, list):
            done = self._change_sequence(node, before, wanted)
        if not done:
            self._replace(node, wanted)

    def _change_mapping(self, node: Node, before: dict, wanted: dict) -> bool:
        """Change a mapping key by key; return whether it could be done so."""
        gone = []
        for at, entry in enumerate(node.entries):
            if entry.key == MERGE and entry.key not in before:
                continue
            if entry.key not in wanted:
                gone.append((at, at + 1))
        stated = [entry.key for entry in node.entries]
        new = [key for key in wanted if key not in stated and not _keeps(before, wanted, key)]
        if len(gone) == len(node.entries):
            return False
        for entry in node.entries:
            if entry.key in wanted:
                self.change(entry.value, before[entry.key], wanted[entry.key])
        self._remove(node, _joined(gone))
        lost = {at for at, _ in gone}
        kept = [at for at in range(len(node.entries)) if at not in lost]
        if new:
            self._insert(node, kept[-1], [(key, wanted[key]) for key in new])
        return True

    def _change_sequence(self, node: Node, before: list, wanted: list) -> bool:
        """Change a list item by item; return whether it could be done so."""
        if not before or not wanted:
            return False
        gone = []
        steps = SequenceMatcher(None, _signs(before), _signs(wanted), autojunk=False).get_opcodes()
        for what, i1, i2, j1, j2 in steps:
            if what == "insert" and not i1:
                return False
            both = min(i2 - i1, j2 - j1) if what == "replace" else 0
            for at in range(both):
                self.change(node.entries[i1 + at].value, before[i1 + at], wanted[j1 + at])
            if what != "equal" and i1 + both < i2:
                gone.append((i1 + both, i2))
            if what != "equal" and j1 + both < j2:
                more = [(None, value) for value in wanted[j1 + both : j2]]
                self._insert(node, i1 + both - 1, more)
        self._remove(node, gone)
        return True

    # --- removing ---

    def _remove(self, node: Node, gone: Sequence[tuple[int, int]]) -> None:
        for first, behind in gone:
            if node.is_flow:
                self._remove_flow(node.entries, first, behind)
            else:
                self._remove_block(node, first, behind)

    def _remove_block(self, node: Node, first: int, behind: int) -> None:
        start = self._block_start(node, node.entries[first])
        line = self._line_start(start)
        if self.text[line:start].strip():
            # It shares its line with the `-` of the item that it begins
            self.splices.append((start, self._block_start(node, node.entries[behind]), ""))
            return
        self._remove_lines(line, node.entries[behind - 1].end)

    def _remove_lines(self, line: int, end: int) -> None:
        after = self.text.find("\n", end) + 1
        self.splices.append((line, after or len(self.text), ""))

    def _remove_flow(self, entries: list[NodeEntry], first: int, behind: int) -> None:
        start = entries[first].start
        end = entries[behind - 1].end
        if not self._has_own_lines(start, end):
            if behind < len(entries):
                self.splices.append((start, entries[behind].start, ""))
            else:
                self.splices.append((entries[first - 1].end, end, ""))
            return
        if behind == len(entries) and first and self._comma(end) is None:
            comma = self._comma(entries[first - 1].end)
            if comma is not None:
                self.splices.append((comma, comma + 1, ""))
        self._remove_lines(self._line_start(start), end)

    # --- adding ---

    def _insert(self, node: Node, at: int, new: list[tuple[Any, Any]]) -> None:
        """Add entries behind the one at a place."""
        last = node.entries[at]
        if node.is_flow:
            self._insert_flow(node, at, new)
            return
        is_item = node.kind == "sequence"
        start = self._block_start(node, last)
        indent = self._column(start)
        like_block = last.value.kind == "mapping" and not last.value.is_flow
        lines = []
        for key, value in new:
            lines += self._item(value, indent, like_block) if is_item else _pair(key, value, indent)
        place = self._line_end(last.end)
        self.splices.append((place, place, "".join(self.newline + line for line in lines)))

    def _item(self, value: Any, indent: str, like_block: bool) -> list[str]:
        """Return the lines of an item of a block, in the way of the one before it."""
        if not (like_block and isinstance(value, dict) and value):
            return [f"{indent}- {_flow(value)}"]
        lines = []
        for key, each in value.items():
            lines += _pair(key, each, indent + STEP)
        lines[0] = f"{indent}- {lines[0].lstrip()}"
        return lines

    def _insert_flow(self, node: Node, at: int, new: list[tuple[Any, Any]]) -> None:
        last = node.entries[at]
        texts = []
        for key, value in new:
            said = self._value(value)
            texts.append(said if node.kind == "sequence" else f"{self._value(key)}: {said}")
        if not self._has_own_lines(last.start, last.end):
            self.splices.append((last.end, last.end, "".join(f", {text}" for text in texts)))
            return
        indent = self.text[self._line_start(last.start) : last.start]
        comma = self._comma(last.end)
        place = self._line_end(last.end)
        ends = [","] * len(texts)
        if comma is None:
            self.splices.append((last.end, last.end, ","))
            ends[-1] = ""
        lines = [f"{indent}{text}{end}" for text, end in zip(texts, ends, strict=True)]
        self.splices.append((place, place, "".join(self.newline + line for line in lines)))

    # --- one value in the place of another ---

    def _replace(self, node: Node, wanted: Any) -> None:
        text = self.text[node.start : node.end]
        new = self._value(wanted)
        if isinstance(wanted, str) and text[:1] == "'" and wanted.isprintable():
            quoted = wanted.replace("'", "''")
            new = f"'{quoted}'"
        elif isinstance(wanted, str) and text[:1] == '"':
            new = json.dumps(wanted, ensure_ascii=False)
        if node.anchor and node.kind != "alias":
            new = f"&{node.anchor} {new}"
        if node.start == node.end:
            new = f" {new}"
        self.splices.append((node.start, node.end, new))

    def write_aliases_out(self, root: Node, wanted: Any) -> None:
        """Give every alias whose anchor says something else now what it stood for."""
        places: list[tuple[Node, Any]] = []
        _walk(root, wanted, places)
        anchors: dict[str | None, Any] = {}
        for node, value in sorted(places, key=lambda each: each[0].start):
            if node.kind != "alias":
                anchors[node.anchor] = value
            elif value is _MISSING or self._is_gone(node.start):
                continue
            elif not _same(anchors.get(node.anchor, _MISSING), value):
                self._replace(node, value)

    def _is_gone(self, at: int) -> bool:
        return any(start <= at < end for start, end, _ in self.splices)

    def _value(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False) if self.is_json else _flow(value)

    # --- places ---

    def _block_start(self, node: Node, entry: NodeEntry) -> int:
        """Where an entry of a block begins: an item with its `-`."""
        if node.kind == "mapping":
            return entry.start
        return self.text.rfind("-", 0, entry.start)

    def _line_start(self, at: int) -> int:
        return self.text.rfind("\n", 0, at) + 1

    def _line_end(self, at: int) -> int:
        end = self.text.find("\n", at)
        if end < 0:
            return len(self.text)
        return end - 1 if self.text[end - 1] == "\r" else end

    def _column(self, at: int) -> str:
        """Return the blanks that bring a line's first sign below that at a place."""
        return " " * (at - self._line_start(at))

    def _has_own_lines(self, start: int, end: int) -> bool:
        """Whether nothing but a comma and a comment stands beside what is from start to end."""
        before = self.text[self._line_start(start) : start]
        behind = self.text[end : self._line_end(end)].lstrip(" ,\t")
        return not before.strip() and (not behind or behind.startswith("#"))

    def _comma(self, at: int) -> int | None:
        """Return where the comma behind a value is; None where there is none."""
        found = re.compile(r"(?:\s|#[^\n]*\n)*,").match(self.text, at)
        return found.end() - 1 if found else None


def _keeps(before: dict, wanted: dict, key: Any) -> bool:
    """Whether a mapping has a key already, by what is merged into it."""
    return key in before and _same(before[key], wanted[key])


def _joined(gone: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges with those that follow each other made one."""
    out: list[tuple[int, int]] = []
    for first, behind in gone:
        if out and out[-1][1] == first:
            first = out.pop()[0]
        out.append((first, behind))
    return out


def _signs(values: list) -> list[str]:
    """Return what tells values apart, as mappings cannot be looked up."""
    return [json.dumps(value, sort_keys=True, default=repr) for value in values]


def _walk(node: Node, wanted: Any, places: list[tuple[Node, Any]]) -> None:
    """Collect what has an anchor or is an alias, with what is wanted there."""
    if node.anchor:
        places.append((node, wanted))
    for at, entry in enumerate(node.entries):
        value = _MISSING
        if node.kind == "mapping" and isinstance(wanted, dict):
            value = wanted.get(entry.key, _MISSING)
        elif isinstance(wanted, list) and at < len(wanted):
            value = wanted[at]
        _walk(entry.value, value, places)


def _pair(key: Any, value: Any, indent: str) -> list[str]:
    """Return the lines of a setting in block style: what is short on a line."""
    name = _flow(key)
    short = f"{indent}{name}: {_flow(value)}"
    if isinstance(value, dict) and value:
        lines = [f"{indent}{name}:"]
        for inner, each in value.items():
            lines += _pair(inner, each, indent + STEP)
        return lines
    has_sections = isinstance(value, list) and any(isinstance(each, dict) for each in value)
    if has_sections or (isinstance(value, list) and len(short) > WIDE):
        return [f"{indent}{name}:", *(f"{indent}{STEP}- {_flow(each)}" for each in value)]
    return [short]


def _flow(value: Any) -> str:
    """Return a value in one line."""
    if isinstance(value, dict):
        inner = [f"{_flow(key)}: {_flow(each)}" for key, each in value.items()]
        return "{" + ", ".join(inner) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    # As little in quotes as can be, wherever it stands
    plain = _PLAIN.fullmatch(value)
    if plain and parse_yaml(f"[{value}]") == [value] and parse_yaml(f"a: {value}") == {"a": value}:
        return value
    return json.dumps(value, ensure_ascii=False)
