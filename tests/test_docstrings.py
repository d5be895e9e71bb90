"""The docstring check: each rule is broken by a small source, and kept by its neighbour."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_docstrings import check, error_tree, main

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_docstrings.py"
ERRORS = error_tree(
    "class Base(Exception): ...\nclass DiskFull(Base): ...\nclass Other(Base): ...\n"
)
HEAD = '"""Whole sentences. B batch, T tokens, D model width."""\n'


def problems(source, head=HEAD):
    return [f"{line}: {problem}" for line, problem in check(head + source, "store", ERRORS)]


def function(text="Whole sentence.", signature="go(n)", body="return n", indent=""):
    return f'{indent}def {signature}:\n{indent}    """{text}"""\n{indent}    {body}\n'


BROKEN = {
    "module without": ("", "x = 1\n", "1: module store has no docstring"),
    "blank": ("", '"""  """\n', "1: module store has no docstring"),
    "function without": (HEAD, "def go(): ...\n", "2: function go has no docstring"),
    "async without": (HEAD, "async def go(): ...\n", "2: function go has no docstring"),
    "class without": (HEAD, "class Go: ...\n", "2: class Go has no docstring"),
    "method without": (
        HEAD,
        'class Go:\n    """Whole sentence."""\n    def on(self): ...\n',
        "4: function on has no",
    ),
    "inside if": (HEAD, "if 1:\n    def go(): ...\n", "3: function go has no docstring"),
    "comment, not docstring": (
        HEAD,
        "def go():\n    # Whole sentence.\n    return 1\n",
        "2: function go has no docstring",
    ),
    "no period": (
        HEAD,
        function("Half a sentence"),
        "2: function go: the docstring must start with a whole",
    ),
    "no period on two lines": (
        HEAD,
        function("Half\n    a sentence"),
        "2: function go: the docstring must start with a whole",
    ),
    "starts a line late": (
        HEAD,
        function("\n    Whole sentence.\n    "),
        "2: function go: the docstring must start",
    ),
    "module no period": (
        "",
        '"""Half a sentence"""\n',
        "1: module store: the docstring must",
    ),
    "too long": (
        HEAD,
        function("x" * 90 + "."),
        "3: function go: a line of the docstring's start is over 100",
    ),
    "third person": (
        HEAD,
        function("Returns the next n."),
        "2: function go: write an imperative ('Returns' is not",
    ),
    "repeats": (
        HEAD,
        function("Load the config.", "load_config(n)"),
        "2: function load_config: the docstring only",
    ),
    "repeats bent": (
        HEAD,
        function("Load configs.", "load_config(n)"),
        "2: function load_config: the docstring only",
    ),
    "repeats class": (
        HEAD,
        'class StoreReader:\n    """A reader of the store."""\n',
        "2: class StoreReader: the docstring",
    ),
    "repeats owner": (
        HEAD,
        'class Store:\n    """Whole sentence."""\n'
        + function("Close the store.", "close(self)", indent="    "),
        "4: function close: the docstring only",
    ),
    "repeats module": ("", '"""The store."""\n', "1: module store: the docstring only repeats"),
    "raises": (
        HEAD,
        function(body="raise DiskFull(n)"),
        "4: function go raises DiskFull, and its docstring does not",
    ),
    "raises dotted": (
        HEAD,
        function(body="raise errors.DiskFull"),
        "4: function go raises DiskFull",
    ),
    "raises other": (
        HEAD,
        function("Go. Raises Other.", body="raise DiskFull(n)"),
        "4: function go raises DiskFull",
    ),
    "named, not raised": (
        HEAD,
        function("Go on DiskFull.", body="raise DiskFull(n)"),
        "4: function go raises DiskFull",
    ),
    "raises in branch": (
        HEAD,
        function(body="if n: raise DiskFull(n)"),
        "4: function go raises DiskFull",
    ),
    "raises in __init__": (
        HEAD,
        'class Go:\n    """Whole sentence."""\n    def __init__(self):\n'
        "        raise DiskFull(self)\n",
        "5: function __init__ raises DiskFull",
    ),
    "tensor": (
        HEAD,
        function(signature="go(x: torch.Tensor)"),
        "2: function go: name the shape of x: x_BTD, or",
    ),
    "array": (
        HEAD,
        function(signature="go(x: np.ndarray | None)"),
        "2: function go: name the shape of x",
    ),
    "quoted": (
        HEAD,
        function(signature='go(x: "torch.Tensor")'),
        "2: function go: name the shape of x",
    ),
    "one of two": (
        HEAD,
        function(signature="go(x_BTD: Tensor, *, y: Tensor)"),
        "2: function go: name the shape of y",
    ),
    "returned": (
        HEAD,
        function(signature="go() -> tuple[Tensor, int]"),
        "2: function go: name the shape of what it",
    ),
    "no legend": (
        HEAD,
        function(signature="go(x_BZD)"),
        "2: x_BZD: the top of the module has no legend for Z",
    ),
    "no legend, local": (
        HEAD,
        "def _go(n):\n    y_BZ = n\n",
        "3: y_BZ: the top of the module has no legend for Z",
    ),
    "legend below": (
        HEAD,
        "x = 1\n# Z zeros\ndef _go(y_Z): ...\n",
        "4: y_Z: the top of the module has no legend for Z",
    ),
    "does not parse": (HEAD, "def go(:\n", "2: does not parse"),
}


@pytest.mark.parametrize(("head", "source", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_one_problem_on_its_line(head, source, expected):
    (found,) = problems(source, head)
    assert found.startswith(expected)


KEPT = {
    "whole": function("Return twice n, or 0 when there is none."),
    "private": "def _go(): ...\nclass _Go:\n    def on(self): ...\n",
    "dunder": 'class Go:\n    """Whole sentence."""\n    def __len__(self): ...\n',
    "inner": 'def go():\n    """Whole sentence."""\n    def inner(): ...\n    return inner\n',
    "a sentence on two lines": function("Return twice n,\n    or 0 when there is none."),
    "first line fits": function("x" * 89 + "."),
    "more than the name": function(
        "Load the config that the run was started with.", "load_config(n)"
    ),
    "name, then more": function("Load the config.\n\n    Overrides win.\n    ", "load_config(n)"),
    "raises": function("Go. Raises DiskFull when there is no room.", body="raise DiskFull(n)"),
    "raises, a line down": function(
        "Go.\n\n    Raises Other, or\n    DiskFull.\n    ", body="raise DiskFull(n)"
    ),
    "raises a class above": function("Go. Raises Base.", body="raise DiskFull(n)"),
    "builtin": function(body="raise ValueError(n)"),
    "again": function(body="raise"),
    "raised by what it returns": function(
        body="\n    def inner():\n        raise DiskFull(n)\n    return inner"
    ),
    "raised in private": "def _go(): raise DiskFull(1)\n",
    "class says what __init__ raises": (
        'class Go:\n    """Go on. Raises DiskFull."""\n    def __init__(self):\n'
        "        raise DiskFull(self)\n"
    ),
    "suffixes": function(signature="go(x_BTD: torch.Tensor, y_BT: Tensor | None = None) -> Tensor"),
    "digit in suffix": function(signature="go(x_B1D: torch.Tensor)"),
    "shape in brackets": function("Return x [B, T].", "go(x: torch.Tensor)"),
    "shape in parentheses": function("Return starts (n+1,).", "go() -> np.ndarray"),
    "shape in suffix": function("Return logits_BT.", "go() -> Tensor"),
    "shape in words": function("Return a scalar.", "go() -> Tensor"),
    "shape in the name": function("Return what was seen on average.", "mean_D() -> Tensor"),
    "shape in what it returns": function(signature="go() -> Tensor", body="x_BT = 1; return x_BT"),
    "containers": function(signature="go(state: dict[str, Tensor]) -> list[np.ndarray]"),
    "constants": "MAX_TOKENS = 1\n",
    "protocol": 'class Go(Protocol):\n    """Whole sentence."""\n'
    "    def on(self, step) -> None: ...\n",
    "setter": "@x.setter\ndef x(self, n): ...\n",
    "overload": "@typing.overload\ndef go(n): ...\n",
}


@pytest.mark.parametrize("source", KEPT.values(), ids=KEPT)
def test_a_kept_rule_is_no_problem(source):
    assert problems(source) == []


def test_a_legend_may_stand_in_comments_at_the_top():
    assert (
        problems("def _go(x_QZ): ...\n", '"""Whole sentences."""\n\n# Q queries, Z = Q*Q zeros\n')
        == []
    )
    assert len(problems("def _go(x_QZ): ...\n", '"""Whole sentences, Q and Z."""\n')) == 2


def test_problems_are_printed_with_file_and_line_and_the_exit_status_is_one(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "bad.py").write_text('"""Whole sentence."""\n\n\ndef go(): ...\n')
    (tmp_path / "good.py").write_text('"""Whole sentence."""\n')
    assert main([str(tmp_path)]) == 1
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'deep' / 'bad.py'}:4: function go has no docstring\n"
    )
    assert main([str(tmp_path / "good.py")]) == 0
    assert capsys.readouterr().out == ""


def test_pipeline_errors_are_read_from_the_tree(tmp_path, capsys):
    (tmp_path / "bad.py").write_text(
        '"""Whole sentence."""\n\n\ndef go():\n    """Go on."""\n    raise ConfigError("x")\n'
    )
    assert main([str(tmp_path)]) == 1
    assert "bad.py:6: function go raises ConfigError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "status", "text"), [("--help", 0, "house style"), ("absent.py", 2, "absent.py")]
)
def test_it_runs_from_anywhere_as_a_program(tmp_path, argument, status, text):
    run = subprocess.run(
        [sys.executable, SCRIPT, argument],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status
    assert text in run.stdout + run.stderr
