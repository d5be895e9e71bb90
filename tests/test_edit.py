"""Texts of YAML and JSON that are changed in one place: what else stands in them keeps its bytes.

The texts are made by chance, in every style that people write: blocks, brackets over one line or
several, quotes, comments wherever one may stand, anchors, either end of lines, with or without one
at the end of the file.
"""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.edit import NotEditable, edited
from pipeline.config.files import assigned, parse_text

WORDS = ("law", "3e-4", "900_000", "'it''s'", '"a: b"', "data/*.txt", "true", "~", "C++", "x#y")
COMMENTS = ("", "", "", "  # why", " # [a, b]: {c}", "   #")
RUNS = settings(max_examples=60, deadline=None, derandomize=True)


class Writer:
    """Writes a text at random, line by line."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.number = 0

    def comment(self) -> str:
        return self.draw.choice(COMMENTS)

    def key(self) -> str:
        self.number += 1
        return self.draw.choice((f"k{self.number}", f'"q{self.number}"', f"k-{self.number}"))

    def flow(self, depth: int) -> str:
        kind = self.draw.random()
        if depth > 2 or kind < 0.5:
            return self.draw.choice(WORDS)
        count = self.draw.randrange(4)
        if kind < 0.75:
            items = [self.flow(depth + 1) for _ in range(count)]
            end = "," if items and self.draw.random() < 0.2 else ""
            return f"[{', '.join(items)}{end}]"
        return "{" + ", ".join(f"{self.key()}: {self.flow(depth + 1)}" for _ in range(count)) + "}"

    def lines(self, indent: str, depth: int, is_list: bool) -> list[str]:
        out = []
        for _ in range(self.draw.randrange(1, 4)):
            if self.draw.random() < 0.2:
                out.append(self.draw.choice(("", f"{indent}# of its own")))
            name = "-" if is_list else f"{self.key()}:"
            kind = self.draw.random()
            if depth < 3 and kind < 0.25 and not is_list:
                out.append(f"{indent}{name}{self.comment()}")
                out += self.lines(indent + "  ", depth + 1, self.draw.random() < 0.5)
            elif depth < 3 and kind < 0.4 and is_list:
                inner = self.lines(indent + "  ", depth + 1, False)
                while inner and (not inner[0].strip() or inner[0].lstrip().startswith("#")):
                    inner.pop(0)
                out += [f"{indent}- {inner[0].lstrip()}", *inner[1:]]
            elif kind < 0.5:
                inside = [f"{indent}    {self.flow(1)},{self.comment()}" for _ in range(2)]
                last = f"{indent}    {self.flow(1)}{self.comment()}"
                out += [f"{indent}{name} [", *inside, last, f"{indent}  ]{self.comment()}"]
            elif kind < 0.55 and not is_list:
                out += [f"{indent}{name} |", f"{indent}    text # of it", ""]
            else:
                out.append(f"{indent}{name} {self.flow(0)}{self.comment()}")
        return out

    def text(self) -> str:
        lines = [*self.draw.choice(((), ("# top", ""))), *self.lines("", 0, False)]
        newline = self.draw.choice(("\n", "\n", "\r\n"))
        return newline.join(lines) + self.draw.choice((newline, newline * 2, newline + "# end", ""))


def added(value, draw: random.Random):
    """Return a value with something new at the end of some of its lists and mappings; never of an
    empty one, which has no way of its own to be written."""
    new = draw.choice(("new", 7, {"paths": ["a b", "c:d"], "domain": "new"}, [1, 2], None, 0.5))
    if isinstance(value, dict):
        out = {key: added(each, draw) for key, each in value.items()}
        return out | {"new key": new} if value and draw.random() < 0.4 else out
    if isinstance(value, list):
        out = [added(each, draw) for each in value]
        return [*out, new] if value and draw.random() < 0.4 else out
    return value


@RUNS
@given(st.integers(0, 10**6))
def test_what_is_added_and_taken_away_again_leaves_the_same_bytes(seed):
    text = Writer(seed).text()
    before = parse_text(text, False)
    wanted = added(before, random.Random(seed))
    if json.dumps(wanted, default=repr) == json.dumps(before, default=repr):
        assert edited(text, wanted, False) == text
        return
    there = edited(text, wanted, False)
    assert parse_text(there, False) == wanted
    assert edited(there, before, False) == text


def changed(value, draw: random.Random):
    """Return a value less some of its parts, and with others in the place of some."""
    if isinstance(value, dict):
        return {key: changed(each, draw) for key, each in value.items() if draw.random() > 0.15}
    if isinstance(value, list):
        return [changed(each, draw) for each in value if draw.random() > 0.15]
    return value if draw.random() > 0.1 else draw.choice(("other", "a: b", 3, {"a": [1]}, []))


@RUNS
@given(st.integers(0, 10**6))
def test_a_text_says_what_is_wanted_and_keeps_what_it_says_beside(seed):
    text = Writer(seed).text()
    before = parse_text(text, False)
    wanted = changed(before, random.Random(seed))
    after = edited(text, wanted, False)
    assert parse_text(after, False) == wanted
    # Lines of what nobody asked about are there as they were, in their order
    same = {key for key in wanted if wanted[key] == before[key]}
    kept = [line for line in text.splitlines() if any(f"{key}:" in line for key in same)]
    there = iter(after.splitlines())
    assert all(line in there for line in kept)


@RUNS
@given(st.integers(0, 10**6), st.sampled_from((None, 2, "\t")))
def test_json_is_changed_as_json(seed, indent):
    before = parse_text(Writer(seed).text(), False)
    text = json.dumps(before, indent=indent)
    wanted = added(before, random.Random(seed))
    there = edited(text, wanted, True)
    assert json.loads(there) == wanted
    assert edited(there, before, True) == text


ANCHORS = """\
all: &all [law, math]  # everybody
trunk:
  domains: *all
small: &small {steps: 1}
expert:
  <<: *small
  lr: 1
"""


def test_what_stands_for_an_anchor_keeps_what_it_stood_for():
    before = parse_text(ANCHORS, False)
    wanted = before | {"all": ["law", "math", "new"]}
    assert edited(ANCHORS, wanted, False) == ANCHORS.replace(
        "[law, math]", "[law, math, new]"
    ).replace("*all", "[law, math]")
    # Where both are to change, the one goes on standing for the other
    both = wanted | {"trunk": {"domains": ["law", "math", "new"]}}
    assert edited(ANCHORS, both, False) == ANCHORS.replace("[law, math]", "[law, math, new]")
    own = before | {"trunk": {"domains": ["law"]}}
    assert edited(ANCHORS, own, False) == ANCHORS.replace("*all", "[law]")


def test_what_a_merged_anchor_gives_is_stated_over_it_and_cannot_be_taken_away():
    before = parse_text(ANCHORS, False)
    more = before | {"expert": {"steps": 2, "lr": 1}}
    assert edited(ANCHORS, more, False) == ANCHORS + "  steps: 2\n"
    with pytest.raises(NotEditable):
        edited(ANCHORS, before | {"expert": {"lr": 1}}, False)


@pytest.mark.parametrize(
    ("text", "wanted", "after"),
    [
        ("a: 'x'  # c\n", {"a": "it's"}, "a: 'it''s'  # c\n"),
        ('a: "x"\n', {"a": "y"}, 'a: "y"\n'),
        ("a:\n# c\n", {"a": "y"}, "a: y\n# c\n"),
        ("a: [\n  b,  # one\n  c  # two\n]\n", {"a": ["b"]}, "a: [\n  b  # one\n]\n"),
        ("a:\n  - b\n  # c\n", {"a": []}, "a:\n  []\n  # c\n"),
        ("a: 1", {"a": 1, "b": {"c": [2]}}, "a: 1\nb:\n  c: [2]"),
        ("a: yes\n", {"a": True}, "a: true\n"),
        ("a: 1\n", {"a": 1.0}, "a: 1.0\n"),
    ],
)
def test_one_change_at_a_time(text, wanted, after):
    assert edited(text, wanted, False) == after


def test_a_key_given_twice_is_refused():
    with pytest.raises(Exception, match="a is given twice"):
        edited("a: 1\na: 2\n", {"a": 3}, False)


def test_a_template_that_is_typed_is_text_and_no_object():
    """As a folder of classes needs it: the message was that the answer must be a text."""
    assert assigned("answer={label}", "--option") == {"answer": "{label}"}
    assert assigned("dataset.fields={prompt: q}", "--option") == {
        "dataset": {"fields": {"prompt": "q"}}
    }
