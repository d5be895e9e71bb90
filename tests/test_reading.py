"""What the measures of reading count, that each broken one is named, and that a name means one
thing."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from scripts.check_reading import MOST_TOKENS_A_LINE, Reading, read

ROOT = Path(__file__).parent.parent
PLAIN = '''"""A docstring of many words that is no code and no comment, however long it may be."""

# Why: this is the only comment of its own
LIMIT = 3


def go(n):
    """Return n."""
    return n + LIMIT  # a comment beside code is none of its own
'''


def reading(source: str) -> Reading:
    found = Reading()
    found.add("some.py", source)
    return found


def test_tokens_lines_and_comments_are_counted_as_a_reader_would():
    found = reading(PLAIN)
    # LIMIT = 3 | def go ( n ) : | return n + LIMIT
    assert (found.tokens, found.lines, found.comments) == (3 + 6 + 4, 3, 1)
    assert found.functions == [10]
    assert found.comment_share == 1 / 4
    assert found.judge("it") == []


def test_a_string_over_several_lines_is_code_on_all_of_them_and_a_docstring_on_none():
    found = reading('X = """a\nb\nc"""\n')
    assert (found.tokens, found.lines) == (3, 3)
    assert reading('"""a\nb\nc"""\n').lines == 0


DENSE = "# Why\n" + "a, b, c = f(1), [x for x in y if x], {k: v for k, v in z}\n" * 5
BROKEN = {
    "dense": (DENSE, "it: 32.00 tokens a line, over 8.5"),
    "no comments": ("x = 1\n" * 40, "it: 0.0% comment lines, under 3%"),
    "long line": (PLAIN + f"NAME = '{'x' * 100}'\n", "some.py:10: 109 columns"),
    "formatter off": (PLAIN + "x = 1  # fmt: skip\n", "some.py:10: the formatter is switched off"),
    "formatter off above": (PLAIN + "# fmt: off\n", "some.py:10: the formatter is switched off"),
}


@pytest.mark.parametrize(("source", "problem"), BROKEN.values(), ids=BROKEN)
def test_each_broken_measure_is_named(source, problem):
    assert reading(source).judge("it") == [problem]


def test_the_program_prints_a_line_for_each_part_and_fails_when_one_is_too_dense(tmp_path):
    for name, source in (("plain", PLAIN), ("dense", DENSE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some.py").write_text(source)
    program = [sys.executable, ROOT / "scripts/check_reading.py"]
    kept, broken = (
        subprocess.run(
            [*program, *names], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        for names in (["plain"], ["plain", "dense"])
    )
    assert (kept.returncode, kept.stderr) == (0, "")
    assert broken.returncode == 1
    assert [line.split(":")[0] for line in broken.stdout.splitlines()] == ["plain", "dense"]
    assert broken.stderr.startswith(f"dense: 32.00 tokens a line, over {MOST_TOKENS_A_LINE}")


def test_files_and_folders_can_be_measured_together(tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    for name in ("one.py", "folder/two.py", "folder/inner/three.py"):
        (tmp_path / name).write_text(PLAIN)
    assert read(tmp_path, ("one.py", "folder")).files == 3


def test_no_two_modules_of_the_pipeline_have_a_class_of_one_name():
    """A name means one thing; only what implements another's protocol could share its name."""
    places = defaultdict(list)
    for file in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(file.relative_to(ROOT).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
